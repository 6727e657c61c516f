"""A stack of Linear layers whose weights are one tensor: each slice has its own cores, and all are one network.

    dW[e, o, i] = sum over bonds of core_1[e, ...] core_2[e, ...] ...

Every core gets the leg of the slices before its own legs; cores that layers share do not. The contraction keeps this
leg as it keeps any hyperedge of the weight, and so contracts all slices together.
"""

from __future__ import annotations

from dataclasses import replace

from tnpeft.errors import BindError, Problem
from tnpeft.network.layer import Layer
from tnpeft.network.model import Network, with_slices

__all__ = ["stacked"]


def stacked(slice_network: Network, layer: Layer) -> Network:
    """The network of a stack, from that of one of its slices. Raises BindError if all slices would be the same."""
    for term in slice_network.terms:
        if all(core.shared is not None for core in slice_network.plain.cores if core.name in term.cores):
            what = f"spec '{slice_network.spec.name}' on {layer}"
            fix = "Choose a spec of which each layer has a core of its own."
            raise BindError(Problem(what, "a core of its own for each slice", "cores that layers share alone", fix))
    leg = "slice"
    while leg in slice_network.sizes:
        leg += "_"
    return replace(
        slice_network,
        layer=layer,
        sizes={leg: layer.slices, **slice_network.sizes},
        cores=tuple(with_slices(core, leg, layer.slices) for core in slice_network.cores),
        terms=tuple(replace(term, weight=((leg,), *term.weight)) for term in slice_network.terms),
        formula=f"{layer.slices} ({slice_network.formula})",
        slice_network=slice_network,
    )
