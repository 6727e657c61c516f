"""What a search is measured on: updates of layers' weights, read from pairs of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnpeft.errors import AttachError, Problem, TnpeftError, clip, listed
from tnpeft.fitting.arguments import checked
from tnpeft.network import Layer, layer_of
from tnpeft.recipe.attachment import recipe_of
from tnpeft.recipe.targets import targets
from tnpeft.spec.pattern import KINDS
from tnpeft.surgery import plain_modules

__all__ = ["Pair", "Pairs", "Update", "check_kinds", "layers_matching", "named", "updates_of"]

Pair = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
Pairs = Iterable[Pair] | Mapping[str, Pair]


@dataclass(frozen=True)
class Update:
    """The update of one layer in one pair of checkpoints: the tuned weight minus the base weight.

    `pair` is the pair's number, `source` its name.
    """

    name: str
    layer: Layer
    delta: Tensor
    pair: int
    source: str

    def __str__(self) -> str:
        return f"{self.name}, {self.source}"


def named(pairs: Pairs, first: int = 0) -> dict[str, Pair]:
    """Pairs by their names; those without are numbered from `first` on."""
    if isinstance(pairs, Mapping):
        return dict(pairs)
    return {f"pair {number}": pair for number, pair in enumerate(pairs, first)}


def layers_matching(model: nn.Module, match: str | Sequence[str]) -> dict[str, Layer]:
    """The layers of a model whose names match, by name. Raises AttachError."""
    claimed = targets(model, recipe_of("full", match, {}))
    modules = plain_modules(model)
    layers = {name: layer_of(modules[name]) for name in claimed if name in modules}
    odd = [name for name, layer in layers.items() if layer.opaque or layer.slices]
    if odd:
        fix = "Match other layers."
        raise AttachError(Problem("search", "layers with a plain weight each", listed(odd), fix))
    return layers


def check_kinds(layers: Sequence[Layer]) -> None:
    """Raises AttachError unless all layers have the same number of kernel axes, which one network needs."""
    axes = {KINDS[layer.kind] for layer in layers}
    if len(axes) > 1:
        found = ", ".join(sorted({layer.kind for layer in layers}))
        fix = "Search for each kind by itself: match the layers of one."
        raise AttachError(Problem("search", "layers with equally many kernel axes", found, fix))


def updates_of(layers: Mapping[str, Layer], pairs: Mapping[str, Pair], first: int = 0) -> list[Update]:
    """The updates of layers in pairs of a base's and a tuned state dict, in that order. Raises AttachError.

    A layer that no pair changes has nothing to capture and is passed over.
    """
    updates = []
    for number, (source, (base, tuned)) in enumerate(pairs.items(), first):
        for name, layer in layers.items():
            update = Update(name, layer, _delta(name, layer, base, tuned, source), number, source)
            if bool(update.delta.any()):
                updates.append(update)
    return updates


def _delta(name: str, layer: Layer, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], source: str) -> Tensor:
    weights = []
    for what, state in (("base", base), ("tuned", tuned)):
        weight = state.get(f"{name}.weight")
        where = f"{what} checkpoint of {source}"
        fix = "Pass checkpoints of this model."
        if not isinstance(weight, Tensor):
            raise AttachError(Problem(where, f"a tensor '{name}.weight'", clip(weight), fix))
        if tuple(weight.shape) != layer.stored_shape:
            expected = f"'{name}.weight' of shape {layer.stored_shape}"
            raise AttachError(Problem(where, expected, f"{tuple(weight.shape)}", fix))
        weights.append(weight.detach().to("cpu", torch.float64))
    try:
        return checked(weights[1] - weights[0], layer.stored_shape)
    except TnpeftError as error:
        problem = error.problems[0]
        raise AttachError(
            Problem(f"{source}, '{name}.weight'", problem.expected, problem.found, problem.fix)
        ) from error
