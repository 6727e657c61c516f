"""Tensors of which each process holds a part: DTensors, as FSDP2 and tensor parallelism make them.

An adapted layer contracts cores that belong to whole weights, and is refused where something is split. Each process
may hold all of the model, as with DistributedDataParallel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tnpeft.errors import ExecutionError, Problem

__all__ = ["SPLIT_FIX", "is_distributed", "refuse_distributed", "split_problem"]

SPLIT_FIX = (
    "Train the whole model in each process, in DistributedDataParallel, or split it after "
    "`tnpeft.detach(model, merge=True)`."
)
EXPECTED = "plain tensors"
FOUND = "DTensors, of which each process holds a part (FSDP2, tensor parallelism)"


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor; the class is not imported for that."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def split_problem(modules: Iterable[tuple[str, nn.Module]], fix: str) -> Problem | None:
    """What is wrong with the first of some named modules that has a DTensor, or that FSDP2 has taken over, if any."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for name, module in modules:
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(map(is_distributed, tensors)) or (sharded is not None and isinstance(module, sharded)):
            where = f"module '{name}'" if name else None
            return Problem("the weights of the model", EXPECTED, FOUND, fix, where=where)
    return None


def refuse_distributed(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Raises ExecutionError where one of them is a DTensor; `name` is the layer's."""
    if torch.compiler.is_compiling() or "torch.distributed.tensor" not in sys.modules:
        return
    if not any(map(is_distributed, tensors)):
        return
    where = f"layer '{name}'" if name else None
    raise ExecutionError(Problem("an adapted layer's input and weights", EXPECTED, FOUND, SPLIT_FIX, where=where))
