"""One network over several processes: each holds a part of every tensor and gathers a block while it runs (FSDP2).

Whatever calls such a network is called in every process, equally often: each gives its parts to the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["elements_of_part", "is_sharded", "shard", "units_of", "whole_tensors"]


def units_of(unet: nn.Module) -> list[nn.Module]:
    """What is gathered at once: residual, attention and resampling blocks. What is left is one more."""
    levels = [*unet.down_blocks, unet.middle_block, *unet.up_blocks]  # type: ignore[misc]
    parts = [part for level in levels for part in level.children()]
    blocks = [block for part in parts for block in (part if isinstance(part, nn.ModuleList) else (part,))]
    return [block for block in blocks if any(True for _ in block.parameters())]


def shard(unet: nn.Module, device: torch.device, processes: int) -> None:
    """Share the tensors of `unet` out to all processes, each on its device; adapters are attached before.

    The last unit is freed after a forward pass as the others are, so that its parameters are always the parts.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for unit in units_of(unet):
        fully_shard(unit, mesh=mesh)
    fully_shard(unet, mesh=mesh, reshard_after_forward=True)


def elements_of_part(tensor: Tensor, process: int, processes: int) -> int:
    """How many elements of a sharded tensor a process holds: it is cut along its first axis, in equal slices."""
    slices = -(-tensor.shape[0] // processes)
    mine = min(slices, max(0, tensor.shape[0] - process * slices))
    return mine * tensor[0].numel() if mine else 0


def is_sharded(unet: nn.Module) -> bool:
    """Whether each process holds parts of it."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(unet, FSDPModule)


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are; of parts the whole ones, on the CPU of the first process, and none in the others."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part = tensor.detach()
        if not hasattr(part, "full_tensor"):
            found[name] = part
            continue
        whole = part.full_tensor()  # of one at a time, in every process
        if torch.distributed.get_rank() == 0:
            found[name] = whole.cpu()
    return found
