"""Which adapters act: activate, merge, unmerge, disabled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import nn

from tnpeft.adapters.base_weight import dequantiser, described
from tnpeft.adapters.distributed import reshard, split_problem
from tnpeft.adapters.parked import is_parked
from tnpeft.errors import AttachError, Problem, TnpeftWarning, clip, listed
from tnpeft.execution import AdaptedLayer, AdaptedOpaque
from tnpeft.surgery.adapted_model import AdaptedModel, adapted, find, known_adapter
from tnpeft.surgery.passes import register_pass, remove_pass
from tnpeft.surgery.trained import all_tied
from tnpeft.surgery.tree import adapted_layers, slots, ties

__all__ = [
    "acting",
    "activate",
    "apply_state",
    "base_shown",
    "disabled",
    "merge",
    "merge_layers",
    "refuse_disabled",
    "refuse_merged",
    "refuse_rows",
    "scale_problem",
    "unmerge",
    "warn_of_ties",
]


def activate(model: nn.Module, scales: Mapping[str, float] | str) -> None:
    """Let the named adapters act, each at its scale, and no others; `{}` leaves the base model.

    ΔW, each made for the base alone, and the trained biases and norms of several adapters add up,
    scaled. Only active adapters train: their cores do, and what else they train while one of them
    acts alone at scale 1. No parameter becomes another object, so that optimisers stay as they are;
    no base weight is copied, and nothing is planned anew. Run backward passes before the switch:
    what does not act takes no gradients. It acts on the model for all threads: none may run it meanwhile.

    Raises AttachError for unknown names, scales that are not finite in fp32, and merged models.
    """
    root, state = adapted(model)
    refuse_disabled(state)
    refuse_merged(state)
    state.active = _checked(state, {scales: 1.0} if isinstance(scales, str) else scales)
    apply_state(root, state)


def _checked(state: AdaptedModel, scales: object) -> dict[str, float]:
    if not isinstance(scales, Mapping):
        found = type(scales).__name__
        raise AttachError(Problem("activate", "a name, or scales by name", found, 'For example `{"default": 1.0}`.'))
    for name, scale in scales.items():
        known_adapter(state, name)
        if problem := scale_problem(name, scale):
            raise AttachError(problem)
    # In the order in which they were attached: sums must not depend on that of the mapping.
    return {name: float(scales[name]) for name in state.adapters if name in scales}


def scale_problem(name: str, scale: Any) -> Problem | None:
    """Why an adapter cannot act at this scale, or None if it can."""
    what = f"scale of adapter '{name}'"
    if not isinstance(scale, Real) or scale != scale or scale in (math.inf, -math.inf):
        fix = "Use a finite scale, or leave the adapter out."
        return Problem(what, "a finite number", clip(scale), fix)
    largest = torch.finfo(torch.float32).max  # sums are taken in fp32
    if scale < -largest or not scale <= largest:
        found = clip(scale) if isinstance(scale, float) else "one beyond that"  # Python may refuse to print the digits
        return Problem(what, "a number that float32 can hold", found, "Use a smaller scale.")
    return None


def merge(model: nn.Module, name: str | None = None, *, dequantise: bool = False) -> None:
    """Compute every adapted layer's weight once, beside the base weight, for faster inference.

    Merged are the active adapters or, with `name`, this one alone: at the scale at which it acts, at 1
    if it does not. A merged model does not train, and what acts in it stays until `unmerge`. Merging
    what is merged changes nothing. It acts on the model for all threads: none may run it meanwhile. Warns
    (TnpeftWarning) where a merged weight was tied to another layer's.

    The weight of an opaque layer (quantised, computed) has no sum. With `dequantise` a plain layer with the dequantised
    weight and the update computes in its place, where its library can dequantise.

    Raises AttachError for unknown names, where others are merged, and for opaque layers without `dequantise`, or that
    nobody can dequantise.
    """
    root, state = adapted(model)
    refuse_disabled(state)
    wanted = state.active if name is None else {known_adapter(state, name).name: state.scale_of(name)}
    if state.merged:
        if wanted != state.active:
            refuse_merged(state)
        return
    before = state.active
    with acting(root, state, wanted):
        merge_layers(adapted_layers(root), dequantise)
    state.merged, state.before = True, before
    apply_state(root, state)
    warn_of_ties(root, 3)


def warn_of_ties(root: nn.Module, level: int) -> None:
    """Warns (TnpeftWarning) of merged weights that are no longer those of the layers that they are tied to."""
    parameters = slots(root)
    for names in ties(parameters).values():
        changed = [key for key in names if is_parked(parameters[key].owner, parameters[key].table, parameters[key].key)]
        if changed and len({id(parameters[key].owner) for key in names}) > 1:
            others = [key for key in names if key not in changed]
            first = parameters[changed[0]].acting
            if not others and all(torch.equal(parameters[key].acting, first) for key in changed):
                continue  # one copy that trains stands at all of them
            what = f"the merged weight {listed(changed)}"
            tied = f"one tied to {listed(others)}, with the base's values" if others else "several of one base weight"
            fix = (
                "Saved weights of the merged model belong into a model that does not tie them "
                "(`tie_word_embeddings=False` in transformers)."
            )
            warnings.warn(TnpeftWarning(Problem(what, "a tensor of its own", tied, fix)), stacklevel=level)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, to the bit: what acted before acts again. An unmerged model is left as it is.

    It acts on the model for all threads: none may run it meanwhile.
    """
    root, state = adapted(model)
    refuse_disabled(state)
    if not state.merged:
        return
    for layer in adapted_layers(root):
        layer.unmerge()
    state.merged, state.active, state.before = False, state.before, {}
    apply_state(root, state)


def merge_layers(layers: Iterable[AdaptedLayer], dequantise: bool = False) -> None:
    """Merge all of them or, where one cannot be merged for want of memory or values, none.

    Raises AttachError where one is split over processes, or opaque and not to be dequantised.
    """
    layers, done = list(layers), []
    if problems := [*_opaque_problems(layers, dequantise)]:
        raise AttachError(*problems)
    fix = "Write the adapter with `tnpeft.save`, load it onto the base in one process, and merge there."
    parts = (
        (layer.adapter(name).layer_name, part) for layer in layers for name in layer.names for part in layer.modules()
    )
    if problem := split_problem(parts, fix):
        raise AttachError(problem)
    try:
        for layer in layers:
            done.append(layer)
            layer.merge()
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def _opaque_problems(layers: Iterable[AdaptedLayer], dequantise: bool) -> Iterator[Problem]:
    """Opaque layers on which something acts that has no weight to be added to."""
    for layer in layers:
        if not isinstance(layer, AdaptedOpaque) or not layer.scales:
            continue
        fix, found = "Keep the adapter beside it: `tnpeft.save` writes that.", described(layer.base)
        if dequantiser(layer.base) is not None:
            if dequantise:
                continue
            fix = "Let `dequantise=True` put a plain layer with the dequantised weight in its place."
        yield Problem("merging", "a weight that the update can be added to", found, fix, layers=(layer.layer_name,))


@contextmanager
def acting(root: nn.Module, state: AdaptedModel, scales: dict[str, float]) -> Iterator[None]:
    """Let other adapters act from here on; those that did act again where what is done inside fails."""
    before, state.active = state.active, scales
    try:
        apply_state(root, state)
        yield
    except BaseException:
        state.active = before
        apply_state(root, state)
        raise


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes exactly what its base computes, merged or not; contexts nest.

    It acts on the model for all threads: none may run it while a context begins or ends.
    """
    root, state = adapted(model)
    _disable(root, state, 1)
    try:
        yield
    finally:
        if state.is_on(root):  # not if everything was detached meanwhile
            _disable(root, state, -1)


def base_shown(model: nn.Module) -> AbstractContextManager[None]:
    """`disabled`, for models that nothing may be attached to yet."""
    return nullcontext() if find(model) is None else disabled(model)


def apply_state(root: nn.Module, state: AdaptedModel) -> None:
    """Bring layers and trained tensors to what the state says. Nothing in here can be refused."""
    reshard(root)
    (remove_pass if state.merged else register_pass)(root)  # TorchScript would compile the hooks of a merged model too
    state.forget()
    for layer in adapted_layers(root):
        layer.act({name: scale for name, scale in state.active.items() if name in layer.names}, state.results)
        for name in layer.names:
            layer.adapter(name).requires_grad_(name in state.active and not state.merged)
    _show(root, state)


def refuse_rows(state: AdaptedModel) -> None:
    """Raises AttachError inside a `rows` context, whose rows would have other adapters than they ask for."""
    if state.results.rows_opened:
        fix = "Leave the `rows` context first, in every thread."
        raise AttachError(Problem("model", "adapters of all rows", "some for single rows, by `tnpeft.rows`", fix))


def refuse_disabled(state: AdaptedModel) -> None:
    """Raises AttachError inside a `disabled` or `rows` context, which could not end after the change."""
    refuse_rows(state)
    if state.disabled:
        fix = "Leave the `disabled` context first."
        raise AttachError(Problem("model", "enabled adapters", "adapters disabled by `tnpeft.disabled`", fix))


def refuse_merged(state: AdaptedModel) -> None:
    """Raises AttachError for a merged model, whose weights would not follow the change."""
    if state.merged:
        fix = "Call `tnpeft.unmerge(model)` first."
        raise AttachError(Problem("model", "an unmerged model", "a merged one", fix))


def _disable(root: nn.Module, state: AdaptedModel, step: int) -> None:
    before, state.disabled = state.disabled, state.disabled + step
    if bool(before) == bool(state.disabled):
        return
    for layer in adapted_layers(root):
        layer.disable(bool(state.disabled))
    if not state.disabled and list(state.active.values()) != [1.0]:  # sums are made anew, of parts
        reshard(root)
    _show(root, state)


def _show(root: nn.Module, state: AdaptedModel) -> None:
    """Install the biases, norms and statistics that act."""
    for tied in all_tied(root, state):
        flag = bool(state.disabled) and state.requires_grad.get(tied.names[0], False)
        tied.show({} if state.disabled else state.active, flag, not state.merged, state.merged)
