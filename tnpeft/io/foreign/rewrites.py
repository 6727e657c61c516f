"""A part in the few shapes that another library's loader builds, computing the same update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tnpeft.adapters import Adapter
from tnpeft.errors import Problem
from tnpeft.io.foreign.formats import MERGE
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.topologies import KRONS, WRITABLE, found_in, kron_name, topology_named

__all__ = ["factors_of", "half_ranks_equal", "padded", "part_of", "untuckered", "whole_large", "whole_small"]


def part_of(adapter: Adapter, name: str, gain: float) -> LayerUpdate | Problem:
    """The part that an adapter is, its scale times `gain`; or why no other library has it."""
    network = adapter.network
    cores = {core: tensor.detach().cpu() for core, tensor in adapter.cores.items()}
    start = {core: tensor.detach().cpu() for core, tensor in adapter.start.items()}
    where, what = f"layer '{name}'", f"spec '{network.spec.name}'"
    magnitude = None if adapter.magnitude is None else adapter.magnitude.detach().cpu()
    if magnitude is not None and gain != 1.0:
        fix = "Activate it at scale 1: what DoRA adds is no multiple of an update."
        return Problem(what, "a DoRA at scale 1", f"one at {gain:g}", fix, where)
    for topology in WRITABLE:
        found = found_in(network, topology_named(topology))
        if found is None:
            continue
        tensors = {core: cores[ours].permute(order) for core, (ours, order) in found.items()}
        scale = network.scale * network.terms[0].scale * gain
        part = LayerUpdate(topology, tensors, scale, magnitude=magnitude)
        if not any(bool(copy.any()) for copy in start.values()):  # none, or one of zeros, as `fit` leaves it
            return part
        frozen = {core: start.get(ours, cores[ours]).permute(order) for core, (ours, order) in found.items()}
        if topology == "lora":
            return _doubled(part, frozen)
        fix = "Only LoRA's can be: it is a LoRA of twice the rank. Merge the adapter instead."
        return Problem(what, "an update without a frozen copy", "`start: frozen_copy`", fix, where)
    return Problem(what, "the network of LoRA, LoCon, LoHa or LoKr", f"`{network.einsum}`", MERGE, where)


def _doubled(part: LayerUpdate, start: Mapping[str, Tensor]) -> LayerUpdate:
    """up down - up0 down0 as one product over a bond of twice the rank."""
    up = torch.cat([part.tensors["up"], start["up"]], 1)
    down = torch.cat([part.tensors["down"], -start["down"]])
    return replace(part, tensors={"up": up, "down": down})


def untuckered(part: LayerUpdate) -> LayerUpdate:
    """The same without a core for the kernel: it goes into `down`, and the rank stays."""
    tensors, name = dict(part.tensors), part.topology
    if name == "locon_tucker":
        down = torch.einsum("rs...,si->ri...", tensors["mid"], tensors["down"])
        return replace(part, topology="lora", tensors={"up": tensors["up"], "down": down})
    if name == "loha_tucker":
        halves: dict[str, Tensor] = {}
        for half in "12":
            halves[f"up_{half}"] = tensors[f"up_{half}"].T
            down = torch.einsum("rq...,qi->ri...", tensors[f"mid_{half}"], tensors[f"down_{half}"])
            halves[f"down_{half}"] = down
        return replace(part, topology="loha", tensors=halves)
    if name in KRONS and KRONS[name][1] == "tucker":
        tensors["down"] = torch.einsum("rq...,qi->ri...", tensors.pop("mid"), tensors["down"])
        tensors["up"] = tensors["up"].T
        return replace(part, topology=kron_name(KRONS[name][0], "low"), tensors=tensors)
    return part


def half_ranks_equal(part: LayerUpdate) -> LayerUpdate:
    """LoHa's two halves with one rank: the smaller one gets terms that are zero."""
    tensors = dict(part.tensors)
    ranks = {half: tensors[f"down_{half}"].shape[0] for half in "12"}
    for half in "12":
        more = max(ranks.values()) - ranks[half]
        down = tensors[f"down_{half}"]
        tensors[f"up_{half}"] = pad(tensors[f"up_{half}"], (0, more))
        tensors[f"down_{half}"] = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
    return replace(part, tensors=tensors)


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


def padded(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind an axis, up to the rank that another factor has."""
    shape = list(tensor.shape)
    full = tensor.new_zeros([*shape[:axis], size, *shape[axis + 1 :]])
    full.narrow(axis, 0, shape[axis]).copy_(tensor)
    return full
