"""`anchor`: the current cores become the frozen copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.core_keys import START
from tnpeft.adapters.distributed import whole, write
from tnpeft.adapters.missing_values import without_values
from tnpeft.errors import AttachError, Problem
from tnpeft.surgery.adapted_model import adapted, known_adapter
from tnpeft.surgery.queries import adapters_of
from tnpeft.surgery.refill import make_sums_again
from tnpeft.surgery.switch import refuse_disabled, refuse_merged

__all__ = ["anchor"]


def anchor(model: nn.Module, name: str = "default") -> None:
    """Make an adapter's current cores its frozen copy, in all of its layers.

    Its update, T(cores) - T(copy), is then exactly zero: the base keeps its values, and the model computes what it
    computed without the adapter, whatever the adapter had learned. Call it after writing cores by hand, for a start
    that no init gives; `attach(init=...)` does both in one step. To go on from what an adapter has learned, put its
    update into the base first and begin anew with its cores:

        cores = {f"{layer}.{core}": value.detach().clone()
                 for layer, adapter in handle.adapters.items() for core, value in adapter.cores.items()}
        handle.detach(merge=True)
        handle = tnpeft.attach(model, spec, match=..., init=cores)

    From then on a trained magnitude (`compose: dora`) counts from its current value. Parameters and optimisers stay as
    they are.

    Raises AttachError for specs with `start: zero`, which have no copy, and for merged or disabled models; the model is
    then as it was.
    """
    root, state = adapted(model)
    known_adapter(state, name)
    refuse_disabled(state)
    refuse_merged(state)
    adapters = adapters_of(root, name)
    if problems := [*_problems(adapters)]:
        raise AttachError(*problems)
    for layer, adapter in adapters.items():
        if not adapter.has_values:
            raise without_values(layer, False)
    for adapter in adapters.values():
        _anchor(adapter)
    make_sums_again(root, state, name)


def _anchor(adapter: Adapter) -> None:
    """Anchor the cores that this adapter itself trains: a shared core belongs to its holder."""
    with torch.no_grad():
        for name, trained in adapter.trained.items():
            write(adapter.get_buffer(START + name), whole(trained))
    adapter.changes += 1


def _problems(adapters: dict[str, Adapter]) -> Iterator[Problem]:
    """Specs without a frozen copy, each once with its layers."""
    specs: dict[str, list[str]] = {}
    for layer, adapter in adapters.items():
        if adapter.network.start == "zero":
            specs.setdefault(adapter.network.spec.name, []).append(layer)
    for spec, layers in specs.items():
        expected, found = "`start: frozen_copy`, a copy to write to", f"`start: zero` in spec '{spec}'"
        fix = "Its update is zero where its core of zeros is: write zeros there, or use a spec with a frozen copy."
        yield Problem("anchor", expected, found, fix, layers=tuple(layers))
