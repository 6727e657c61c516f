"""Adapters that join a model after FSDP2 has sharded it: every process holds all of their cores.

FSDP2 takes the parameters of a unit when the unit is made, and none later. Cores that come later are DTensors that all
processes hold whole (`Replicate`). Nothing is gathered for them, all get the mean of their gradients, as with FSDP2,
and optimisers, clipping and checkpoints see them along with the parts of other tensors. What trains beside the cores is
in parts, as its original is, and is gathered when it is read.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import nn

from tnpeft.adapters.distributed import UNITS, is_distributed, is_sharded, is_unit, unit_class
from tnpeft.adapters.offload import wrapper_of
from tnpeft.errors import ExecutionError, Problem

__all__ = ["as_unit", "hold_alike", "is_gathered", "mesh_of", "stand_for"]

_FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_gathered(module: nn.Module, tensor: Any) -> bool:
    """Whether a DTensor of a module is whole while the module runs: it is if only FSDP2 has split it.

    FSDP2 has parts on the last axis of the mesh and copies on the others; tensor parallelism has parts on another axis.
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


def stand_for(module: Any, other: Any) -> None:
    """Let FSDP2 know another module in the place of `module`: as its unit, or as a part of a larger one."""
    if UNITS not in sys.modules:
        return
    other.__dict__.update({flag: module.__dict__[flag] for flag in _FLAGS if flag in module.__dict__})
    if is_unit(module) and not is_unit(other):
        from torch.distributed._composable_state import _insert_module_state

        _insert_module_state(other, module._get_fsdp_state())
        plain: Any = type(other)
        other.__class__ = as_unit(plain)


def as_unit(plain: Any) -> Any:
    """The class that `fully_shard` gives a module of a plain one."""
    return _made_unit(plain)


@lru_cache(maxsize=64)
def _made_unit(plain: Any) -> Any:
    return type(f"FSDP{plain.__name__}", (unit_class(), plain), {"__deepcopy__": _uncopied})


def _uncopied(module: nn.Module, _memo: object) -> NoReturn:
    fix = "Copy the model before `fully_shard`, or save it and load it onto another one."
    raise ExecutionError(Problem(f"copying a {type(module).__name__}", "a whole module", "a unit of FSDP2", fix))
