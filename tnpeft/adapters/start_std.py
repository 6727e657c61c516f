"""`start_std`: trained cores scaled so that T has a given size relative to the layer's weight.

Singular vectors and orthogonal cores have no closed form for the size of T: it is measured, once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tnpeft.adapters.distributed import whole, write
from tnpeft.errors import BindError, Problem
from tnpeft.network import Network
from tnpeft.spec.start_std import degree_of

__all__ = ["scale_start"]


def scale_start(
    network: Network, value: Tensor, weight: Tensor | None, cores: Mapping[str, Tensor], copies: Mapping[str, Tensor]
) -> None:
    """Scale trained `cores` and their frozen `copies` by (x std(W) / std(T))^(1 / K), for T = `value`; x = `start_std`.

    Each slice of a stack has its own factor. Raises BindError if T is zero, or the weight's size is not known.
    """
    fix = "Remove `start_std`, or match other layers."
    if weight is None or weight.device.type == "meta":
        raise BindError(Problem("`start_std`", "the base weight's values", "none", fix))
    slices = max(network.layer.slices, 1)
    have = value.detach().double().reshape(slices, -1).std(1, correction=0)
    base = whole(weight.detach()).double().reshape(slices, -1).std(1, correction=0).to(have.device)
    for what, std in (("T(start)", have), ("the base weight", base)):
        if not bool((std > 0).all() & torch.isfinite(std).all()):
            found = "0: all of its entries are equal" if bool((std == 0).any()) else "nan or inf"
            raise BindError(Problem("`start_std`", f"{what} with a standard deviation", found, fix))
    assert network.start_std is not None
    factor = (network.start_std * base / have) ** (1 / degree_of(network.spec))
    with torch.no_grad():
        for name, copy in copies.items():
            core = cores[name]
            shape = (slices, *[1] * (core.ndim - 1)) if network.layer.slices else ()
            scaled = whole(core) * factor.reshape(shape).to(core.dtype)
            write(core, scaled)
            copy.copy_(scaled)
