"""Tensors of which each process holds a part: DTensors, as FSDP2 (`fully_shard`) and tensor parallelism make them.

FSDP2 gathers the tensors of a unit while the unit runs, so that an adapted layer finds whole ones. Cores that a layer
shares with one of another unit are still in parts then, and are gathered here. Tensor parallelism never gathers, and is
refused. Each process may also hold all of the model, as with DistributedDataParallel.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.errors import ExecutionError, Problem

__all__ = [
    "DISTRIBUTED",
    "SPLIT_FIX",
    "UNITS",
    "gathered",
    "is_distributed",
    "is_sharded",
    "is_split",
    "is_unit",
    "keep_wide",
    "outline",
    "refuse_distributed",
    "refuse_flattened",
    "reshard",
    "split_problem",
    "unit_class",
    "whole",
    "write",
    "zero_problem",
]

SPLIT_FIX = (
    "Call the model, or the part that `fully_shard` was given: the tensors are whole inside. In place of tensor "
    "parallelism use `fully_shard`, or split the model after `tnpeft.detach(model, merge=True)`."
)
EXPECTED = "plain tensors"
FOUND = "DTensors, of which each process holds a part (FSDP2, tensor parallelism)"
DISTRIBUTED, UNITS = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor; the class is not imported for that."""
    kind = getattr(sys.modules.get(DISTRIBUTED), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers its tensors while it runs, and frees them afterwards."""
    return "_is_fsdp_managed_module" in module.__dict__


def is_split(*modules: Any) -> bool:
    """Whether processes hold parts of a layer's tensors."""
    return any(is_sharded(module) or any(map(is_distributed, module._parameters.values())) for module in modules)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, as a constant; every process that holds a part must call this."""
    return _all_of(tensor) if is_distributed(tensor) else tensor


def _all_of(parts: Any) -> Tensor:
    """A DTensor as the whole tensor, on the mesh's device: FSDP2 may offload the parts to the CPU."""
    from torch.distributed.tensor import DTensor

    mesh, local = parts.device_mesh, parts.detach().to_local()
    local = local if local.is_meta else local.to(mesh.device_type)
    shape = {"shape": parts.shape, "stride": parts.stride()}
    tensor: Tensor = DTensor.from_local(local, mesh, parts.placements, run_check=False, **shape).full_tensor()
    return tensor.detach()


def outline(tensor: Any) -> Tensor:
    """A tensor with the same device, dtype and shape; for one in parts, without values. Nothing is gathered."""
    if not is_distributed(tensor):
        return tensor  # type: ignore[no-any-return]
    local = tensor.to_local()
    device = local.device if local.is_meta else tensor.device_mesh.device_type
    return local.new_empty(1, device=device).expand(tensor.shape)  # type: ignore[no-any-return]


def write(target: Any, values: Tensor) -> None:
    """Copy values into a tensor of the same shape: all of them, or those of the part that this process holds.

    Every process must have the values: nothing is exchanged.
    """
    if DISTRIBUTED not in sys.modules or not is_distributed(target):
        target.copy_(values)
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    alike = DTensor.from_local(values.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    target.to_local().copy_(alike.redistribute(mesh, target.placements).to_local())


def unit_class() -> Any:
    """The class of the modules that FSDP2 gathers as units; None if it is not imported."""
    return getattr(sys.modules.get(UNITS), "FSDPModule", None)


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers it as a unit."""
    kind = unit_class()
    return kind is not None and isinstance(module, kind)


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has gathered: if a unit keeps it after a forward pass, the parts may be newer."""
    for module in model.modules() if UNITS in sys.modules else ():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def gathered(tensors: Sequence[Tensor | None]) -> list[Any]:
    """The tensors, whole: parts come from all processes, and the mean of their gradients goes back to the parts."""
    if DISTRIBUTED not in sys.modules:
        return list(tensors)
    return [
        _Gathered.apply(tensor) if is_distributed(tensor) else tensor  # type: ignore[no-untyped-call]
        for tensor in tensors
    ]


class _Gathered(torch.autograd.Function):
    """A DTensor as the whole tensor, on the mesh's device; gradients are means over processes, as FSDP2 takes them."""

    @staticmethod
    def forward(ctx: Any, parts: Any) -> Tensor:
        ctx.placements, ctx.mesh, ctx.device = parts.placements, parts.device_mesh, parts.to_local().device
        return _all_of(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        mesh, placements = ctx.mesh, ctx.placements
        mean = (gradient / mesh.size()).contiguous()
        parts = DTensor.from_local(mean, mesh, [Partial()] * mesh.ndim, run_check=False)
        for axis in range(mesh.ndim):  # one by one: torch warns of several at once
            parts = parts.redistribute(mesh, [*placements[: axis + 1], *[Partial()] * (mesh.ndim - axis - 1)])
        local = parts.to_local().to(ctx.device)
        shape = {"shape": gradient.shape, "stride": mean.stride()}
        return DTensor.from_local(local, mesh, placements, run_check=False, **shape)


def keep_wide(parts: Any) -> None:
    """Let FSDP2 gather a parameter in its own dtype, whatever the unit's MixedPrecisionPolicy is.

    FSDP2's hook on gathering (`fsdp_pre_all_gather`) is put on the part itself.
    """
    part = parts._local_tensor
    part.fsdp_pre_all_gather = lambda mesh: ((_padded(part, parts.shape, mesh.size()),), None)
    part.fsdp_post_all_gather = _as_gathered


def _padded(part: Tensor, shape: Sequence[int], processes: int) -> Tensor:
    """A process's part, with zeros to the size of the first process's; only the first axis is cut unevenly."""
    missing = math.ceil(shape[0] / processes) - part.shape[0] if part.shape[1:] == tuple(shape[1:]) else 0
    return torch.cat([part, part.new_zeros((missing, *part.shape[1:]))]) if missing > 0 else part


def _as_gathered(outputs: Sequence[Tensor], _about: None, _dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
    (tensor,) = outputs
    return None if out is not None else (tensor, (tensor,))


def split_problem(modules: Iterable[tuple[str, nn.Module]], fix: str) -> Problem | None:
    """The problem of the first named module that has a DTensor or that FSDP2 has taken over, if there is one."""
    if DISTRIBUTED not in sys.modules:
        return None
    for name, module in modules:
        tensors = (*module._parameters.values(), *module._buffers.values())
        if is_sharded(module) or any(map(is_distributed, tensors)):
            where = f"module '{name}'" if name else None
            return Problem("the weights of the model", EXPECTED, FOUND, fix, where=where)
    return None


def zero_problem(modules: Iterable[nn.Module]) -> Problem | None:
    """The problem if DeepSpeed's ZeRO-3 has split a module's tensors: it gathers only those of called modules."""
    if not any(hasattr(tensor, "ds_id") for module in modules for tensor in module._parameters.values()):
        return None
    fix = "Shard the model with `torch.distributed.fsdp.fully_shard`, or use ZeRO stage 2, which splits no parameters."
    return Problem("the weights of the model", EXPECTED, "pieces of one process (DeepSpeed, ZeRO stage 3)", fix)


def refuse_flattened(name: str, cores: Sequence[Tensor | None], shapes: Iterable[Sequence[int]]) -> None:
    """Raises ExecutionError for cores that FSDP1 has cut into pieces (while their unit does not run) or cast."""
    if UNITS not in sys.modules or torch._C._get_tracing_state() is not None:
        return
    where = f"layer '{name}'" if name else None
    if any(core is not None and core.shape != tuple(shape) for core, shape in zip(cores, shapes, strict=True)):
        found = "pieces of one process (FullyShardedDataParallel, in another unit than this layer)"
        fix = "Wrap the model as a whole, without `auto_wrap_policy`, or shard it with `fully_shard`."
        raise ExecutionError(Problem("cores that are shared with other layers", "whole tensors", found, fix, where))
    if any(core is not None and core.dtype.itemsize < 4 for core in cores):
        found = "narrower ones (`mixed_precision` of FullyShardedDataParallel)"
        fix = "Use `fully_shard`, whose `mp_policy` leaves cores alone, or `torch.autocast` in its place."
        raise ExecutionError(Problem("cores", "numbers of 32 bits or more", found, fix, where=where))


def refuse_distributed(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Raises ExecutionError where one of them is a DTensor; `name` is the layer's."""
    if torch.compiler.is_compiling() or DISTRIBUTED not in sys.modules:
        return
    if not any(map(is_distributed, tensors)):
        return
    where = f"layer '{name}'" if name else None
    raise ExecutionError(Problem("an adapted layer's input and weights", EXPECTED, FOUND, SPLIT_FIX, where=where))
