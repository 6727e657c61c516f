"""Rewriting a part into one of the few forms that another library's loader builds, with the same update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnpeft.adapters import Adapter
from tnpeft.errors import Problem
from tnpeft.io.foreign.formats import MERGE
from tnpeft.io.foreign.layer_tensors import SLOTS
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.topologies import KRONS, WRITABLE, found_in, kron_name, topology_named

__all__ = [
    "factors_of",
    "half_ranks_equal",
    "lokr_rank",
    "lokr_tensors",
    "part_of",
    "untuckered",
    "whole_large",
    "whole_small",
]


def part_of(adapter: Adapter, where: str, gain: float) -> LayerUpdate | Problem:
    """The part that an adapter is, with its scale times `gain`; or, for `where`, why no other library has it."""
    network = adapter.network
    stack = len(network.layer.stack)  # 1 where the first axis of every core is the slices
    slices = network.slice_network or network
    cores = {core: _stacked(adapter, core, tensor) for core, tensor in adapter.cores.items()}
    start = {core: _stacked(adapter, core, tensor) for core, tensor in adapter.start.items()}
    what = f"spec '{network.spec.name}'"
    magnitude = None if adapter.magnitude is None else adapter.magnitude.detach().cpu()
    if magnitude is not None and gain != 1.0:
        fix = "Activate it at scale 1: what DoRA adds is no multiple of an update."
        return Problem(what, "a DoRA at scale 1", f"one at {gain:g}", fix, where)
    for topology in WRITABLE:
        found = found_in(slices, topology_named(topology))
        if found is None:
            continue
        orders = {
            core: (ours, (*range(stack), *(stack + axis for axis in order))) for core, (ours, order) in found.items()
        }
        tensors = {core: cores[ours].permute(order) for core, (ours, order) in orders.items()}
        scale = network.scale * network.terms[0].scale * gain
        part = LayerUpdate(topology, tensors, scale, magnitude=magnitude, dropout=adapter.dropout)
        if not any(bool(copy.any()) for copy in start.values()):  # none, or one of zeros, as `fit` leaves it
            return part
        frozen = {core: start.get(ours, cores[ours]).permute(order) for core, (ours, order) in orders.items()}
        if topology == "lora":
            return _doubled(part, frozen)
        fix = "Only LoRA's can be: it is a LoRA of twice the rank. Merge the adapter instead."
        return Problem(what, "an update without a frozen copy", "`start: frozen_copy`", fix, where)
    names = ", ".join(f"'{core.name}'" for core in network.derived)
    derived = f", with the derived core{'s' * (len(network.derived) > 1)} {names}" if names else ""
    shown = f"`{network.einsum}`{derived or ', of references with legs' * bool(network.factors)}"
    return Problem(what, "the network of LoRA, LoCon, LoHa or LoKr", shown, MERGE, where)


def _stacked(adapter: Adapter, name: str, tensor: Tensor) -> Tensor:
    """A core's values, of a stack once for each slice, where slices share it."""
    values, slices = tensor.detach().cpu(), adapter.network.layer.slices
    core = next(core for core in adapter.network.cores if core.name == name)
    return values.expand(slices, *values.shape) if slices and core.shared is not None else values


def _doubled(part: LayerUpdate, start: Mapping[str, Tensor]) -> LayerUpdate:
    """up down - up0 down0 as one product over a bond of twice the rank."""
    stack = part.tensors["up"].ndim - 2
    up = torch.cat([part.tensors["up"], start["up"]], stack + 1)
    down = torch.cat([part.tensors["down"], -start["down"]], stack)
    return replace(part, tensors={"up": up, "down": down})


_WITHOUT_MID = {"locon_tucker": "lora", "loha_tucker": "loha", "lokr_tucker": "lokr", "lokr_both_tucker": "lokr_both"}


def untuckered(part: LayerUpdate) -> LayerUpdate:
    """The same update without a kernel core: it is multiplied into `down`, and the rank stays."""
    if part.topology not in _WITHOUT_MID:
        return part
    tensors = dict(part.tensors)
    for suffix in ("", "_1", "_2"):
        mid, up, down = (f"{core}{suffix}" for core in ("mid", "up", "down"))
        if mid in tensors:
            tensors[down] = torch.einsum("rs...,si->ri...", tensors.pop(mid), tensors[down])
            tensors[up] = tensors[up] if part.topology == "locon_tucker" else tensors[up].T  # else (rank, out)
    return replace(part, topology=_WITHOUT_MID[part.topology], tensors=tensors)


def half_ranks_equal(part: LayerUpdate) -> LayerUpdate:
    """LoHa's two halves with one rank: the smaller one gets terms that are zero."""
    rank = max(part.tensors[f"down_{half}"].shape[0] for half in "12")
    return replace(part, tensors={core: _with_rank(core, tensor, rank) for core, tensor in part.tensors.items()})


def _with_rank(core: str, tensor: Tensor, rank: int) -> Tensor:
    """Zeros behind the bond of an `up` (the last axis) or a `down` (the first one), up to the rank."""
    if core.startswith(("up", "small_up")):
        return pad(tensor, (0, rank - tensor.shape[1]))
    if core.startswith(("down", "small_down")):
        return pad(tensor, (*(0, 0) * (tensor.ndim - 1), 0, rank - tensor.shape[0]))
    return tensor


def factors_of(part: LayerUpdate) -> tuple[Tensor, Tensor]:
    """A Kronecker product's two factors, whole: (a, c) and (b, d, k...)."""
    return whole_small(part).tensors["small"], whole_large(part).tensors["large"]


def whole_small(part: LayerUpdate) -> LayerUpdate:
    """The same with the small factor as one matrix."""
    small, large, inner = KRONS[part.topology]
    if small == "whole":
        return part
    tensors = dict(part.tensors)
    matrix = tensors.pop("small_up") @ tensors.pop("small_down")
    return replace(part, topology=kron_name("whole", large, inner), tensors={"small": matrix, **tensors})


def whole_large(part: LayerUpdate) -> LayerUpdate:
    """The same with the large factor as one tensor."""
    part = untuckered(part)
    small, large, inner = KRONS[part.topology]
    if large == "whole":
        return part
    tensors = dict(part.tensors)
    product = torch.einsum("br,r...->b...", tensors.pop("up"), tensors.pop("down"))
    return replace(part, topology=kron_name(small, "whole", inner), tensors={**tensors, "large": product})


def lokr_rank(part: LayerUpdate) -> int | None:
    """The rank of the factors that are products, the larger one of two; None where the large factor is whole."""
    ranks = [part.tensors[core].shape[0] for core in ("small_down", "down") if core in part.tensors]
    return max(ranks) if "down" in part.tensors else None


def lokr_tensors(part: LayerUpdate, rank: int) -> dict[str, Tensor]:
    """The tensors of a Kronecker product by the ends of their keys; low-rank factors have the rank given."""
    tensors = {core: _with_rank(core, tensor, rank) for core, tensor in part.tensors.items()}
    return {
        f"lokr_{SLOTS['lokr'][core]}": tensor.flatten(1) if core == "down" else tensor
        for core, tensor in tensors.items()
    }
