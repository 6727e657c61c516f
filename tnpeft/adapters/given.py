"""What is wrong with values that a caller gives for cores, in place of those that inits draw."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tnpeft.adapters.distributed import is_distributed
from tnpeft.adapters.places import place_problem
from tnpeft.errors import BindError, Problem
from tnpeft.network import BoundCore, Network
from tnpeft.spec.derived_checks import zeros_in

__all__ = ["given_misfit", "misfit", "unwritten"]

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def misfit(core: BoundCore, value: object) -> tuple[str, str] | None:
    """What a core needs and what a value is instead; None if it can be the core's. Its numbers are checked, too."""
    if not isinstance(value, Tensor):
        return "a tensor", type(value).__name__
    if is_distributed(value):
        return "a whole tensor", "a DTensor, of which each process holds a part"
    if tuple(value.shape) != core.shape:
        return f"the shape {core.shape}", str(tuple(value.shape))
    if core.is_index and value.dtype not in _WHOLE:
        return "whole numbers", str(value.dtype)
    if not core.is_index and not value.is_floating_point():
        return "floating-point numbers", str(value.dtype)
    if value.layout != torch.strided or value.device.type == "meta":
        return "a dense tensor with values", "one on meta" if value.device.type == "meta" else str(value.layout)
    # In fp32, which cores are kept in: an fp64 number may be infinite there.
    if not core.is_index and not bool(torch.isfinite(value.detach().float()).all()):
        return "finite numbers", "nan or inf"
    return None


def given_misfit(network: Network, core: BoundCore, value: object) -> tuple[str, str, str] | None:
    """The same for a value given for one core of a network, with a fix; also checks places, zeros and factors."""
    if found := misfit(core, value):
        return *found, "Give it a tensor like the core."
    assert isinstance(value, Tensor)
    if core.is_index:
        return _places_misfit(network, core, value)
    makes_zero = network.start == "zero" and core.name in {
        one.name for term in network.spec.terms for one in zeros_in(network.spec, term)
    }
    if makes_zero and bool((value != 0).any()):
        expected = "zeros: this core makes `start: zero` hold"
        fix = "Leave it out, or use a spec with `start: frozen_copy`, whose update is what has changed since the start."
        return expected, "other numbers", fix
    return None


def _places_misfit(network: Network, core: BoundCore, value: Tensor) -> tuple[str, str, str] | None:
    """Places must lie in what they point into, and those of `choice` and its kin differ from one another."""
    if core.init.name == "places":
        problem = place_problem(network, {core.name: value})
        return (problem.expected, problem.found, "Count flat places in row-major order, from 0.") if problem else None
    places = math.prod(network.sizes[leg] for leg in core.init.legs)
    if value.numel() and (int(value.min()) < 0 or int(value.max()) >= places):
        into = f"places in `{' '.join(core.init.legs)}`, from 0 to {places - 1}"
        return into, f"{int(value.min())} to {int(value.max())}", "Count flat places in row-major order, from 0."
    if core.init.name == "random":
        return None
    one = network.slice_network is not None and core.shared is None
    slices = value.flatten(1) if one else value.reshape(1, -1)
    if any(len(each.unique()) < len(each) for each in slices):
        return "different places", "one of them twice", "Give each place once."
    return None


def unwritten(given: Mapping[str, Tensor | None], name: str) -> Tensor:
    """The first value given for a core. Raises BindError once it is written, for then it is not kept."""
    value = given[name]
    if value is None:
        fix = "Write it to `adapter.cores`, or attach the adapter anew."
        found = "one that `attach(init=...)` was given, which is not kept"
        raise BindError(Problem(f"core '{name}', first value", "one that its init draws", found, fix, core=name))
    return value
