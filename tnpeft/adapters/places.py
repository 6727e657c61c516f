"""What index cores may hold: whole numbers in range, and each only once if a map writes to the places."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableSequence
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.errors import Problem
from tnpeft.network import Network
from tnpeft.spec.maps import place_legs, repeats_places

__all__ = ["place_problem", "with_good_places"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_FIX = "Give it the places that the adapter was trained with; nothing else can stand in for them."


def place_problem(network: Network, cores: Mapping[str, Tensor]) -> Problem | None:
    """The first index core, by name, whose values some map cannot use; cores without values are passed over."""
    one = network.slice_network or network
    for derived in one.derived:
        for each in derived.maps:
            values = None if each.at is None else cores.get(each.at)
            if values is None or values.is_meta or not values.numel():
                continue
            _, bounds = place_legs(each.name, each.takes, each.gives)
            count = math.prod(one.sizes[leg] for leg in bounds)
            shared = next(core.shared for core in one.cores if core.name == each.at)
            rows = values.reshape(network.layer.slices if network.layer.slices and shared is None else 1, -1)
            if found := _misfit(rows, count, repeats_places(each.name)):
                kind = "whole numbers" if repeats_places(each.name) else "different whole numbers"
                expected = f"{kind} of 0 to {count - 1} (`{each.name}` in '{derived.name}')"
                return Problem(f"index core '{each.at}'", expected, found, _FIX, core=each.at)
    return None


def _misfit(rows: Tensor, count: int, repeats: bool) -> str | None:
    """What is wrong with places (slices, places) below `count`."""
    if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        return f"numbers of type {str(rows.dtype).removeprefix('torch.')}"
    ordered = rows.to(torch.int64).sort(dim=1).values
    least, most = int(ordered[:, 0].min()), int(ordered[:, -1].max())
    if least < 0 or most >= count:
        return str(least if least < 0 else most)
    twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    return None if repeats or not twice.numel() else f"{int(twice[0])} twice"


def with_good_places(
    adapter: Any, state_dict: Mapping[str, Any], prefix: str, errors: MutableSequence[str]
) -> Mapping[str, Any]:
    """A state dict for an adapter. Index cores in it that a map cannot use are errors, and are not loaded."""
    given: dict[str, Tensor] = {}
    for core in adapter.network.cores if adapter.network.derived else ():
        tensor = state_dict.get(f"{prefix}core_{core.name}") if core.is_index else None
        if (
            tensor is not None and type(tensor) in _PLAIN and tensor.shape == core.shape
        ):  # torch itself refuses other shapes
            given[core.name] = tensor
    good = state_dict
    while problem := place_problem(adapter.network, given):
        name = str(problem.core)
        errors.append(str(problem))
        del given[name]
        good = {**good, f"{prefix}core_{name}": adapter.cores[name]}
    return good
