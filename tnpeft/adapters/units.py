"""What joins a model after FSDP2 has sharded it: adapters whose cores every process holds alike.

FSDP2 takes the parameters of a unit when it is made, and none later. Cores that come later are DTensors that all
processes hold whole (`Replicate`): nothing is gathered for them, the mean of their gradients goes to all, as FSDP2
takes it, and optimisers, clipping and checkpoints see them beside the parts of others. What trains beside the cores is
in parts as its original is, and gathered when it is read.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from tnpeft.adapters.distributed import UNITS, is_distributed, is_sharded, unit_class
from tnpeft.adapters.offload import wrapper_of

__all__ = ["hold_alike", "is_gathered", "mesh_of", "stand_for"]

_FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_gathered(module: nn.Module, tensor: Any) -> bool:
    """Whether a DTensor of a module is whole while the module runs: one that FSDP2 alone has taken apart.

    Its last axis of the mesh has the parts, the others copies; tensor parallelism has parts on another axis.
    """
    return is_sharded(wrapper_of(module)) and all(each.is_replicate() for each in tensor.placements[:-1])


def mesh_of(module: Any) -> tuple[Any, torch.device] | None:
    """The mesh of a layer's parts, and the device on which they lie; None for a layer that is whole."""
    parts: Any = next(filter(is_distributed, module._parameters.values()), None)
    return None if parts is None else (parts.device_mesh, parts.to_local().device)


def hold_alike(adapter: nn.Module, mesh: Any, device: torch.device) -> None:
    """Make DTensors of an adapter's parameters that each process of a mesh holds whole."""
    from torch.distributed.tensor import DTensor, Replicate

    for key, tensor in adapter._parameters.items():
        if tensor is not None and not is_distributed(tensor):
            local = tensor.detach() if tensor.is_meta else tensor.detach().to(device)
            alike = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
            adapter._parameters[key] = nn.Parameter(alike, requires_grad=tensor.requires_grad)


def stand_for(base: Any, wrapper: Any) -> None:
    """Let a module that hangs in a layer's place be what FSDP2 knows: the layer's unit, or a part of another one."""
    if UNITS not in sys.modules:
        return
    wrapper.__dict__.update({flag: base.__dict__[flag] for flag in _FLAGS if flag in base.__dict__})
    kind = unit_class()
    if kind is not None and isinstance(base, kind):
        from torch.distributed._composable_state import _insert_module_state

        _insert_module_state(wrapper, base._get_fsdp_state())
        plain: Any = type(wrapper)
        wrapper.__class__ = _unit(kind, plain)


@lru_cache(maxsize=64)
def _unit(kind: Any, plain: Any) -> type:
    """The class that `fully_shard` gives a module of a plain one."""
    return type(f"FSDP{plain.__name__}", (kind, plain), {})
