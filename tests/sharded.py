"""Small models of which each process holds parts, beside the same model in one process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tnpeft

ROWS = 6  # shared out to 1, 2 or 3 processes
PATTERNS = {"layer": r"^(\d+)\.", "matrix": r"\.([ab])$"}  # for the scopes of specs whose cores are shared
WAYS = ("layers", "blocks", "blocks alone", "whole", "FSDP1", "DDP")


class Block(nn.Module):
    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.a: nn.Module = nn.Conv3d(8, 16, 3, padding=1) if conv else nn.Linear(16, 24)
        self.b: nn.Module = nn.Conv3d(16, 8, 3, padding=1) if conv else nn.Linear(24, 16)
        self.norm: nn.Module = nn.GroupNorm(2, 8) if conv else nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.b(torch.tanh(self.a(x))))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 4) for shape in ((4, 32, 16), (4, 32, 16)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x)[0]
        hidden = torch.relu(torch.einsum("bti,eoi->beto", x, self.up))
        return x + torch.einsum("beti,eio->bto", hidden, self.down) / 4


def base(conv: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(conv) for _ in range(3)])


def adapted(spec: str, mode: str = "auto", conv: bool = False, **options: Any) -> nn.Sequential:
    model = base(conv)
    attach(model, spec, mode, **options)
    return model


def late(
    spec: str, mode: str = "auto", conv: bool = False, way: str = "blocks", sharding: Any = None, **options: Any
) -> nn.Sequential:
    """The same, sharded (with these arguments) and called before the adapter is attached."""
    model = sharded(base(conv), way, **(sharding or {}))
    with torch.no_grad():
        model(rows(conv)[0])  # leaves what the root holds gathered
    attach(model, spec, mode, **options)
    return model


def attach(model: nn.Module, spec: str, mode: str = "auto", **options: Any) -> None:
    scopes = {core.shared: PATTERNS[core.shared] for core in tnpeft.load_spec(spec).cores if core.shared in PATTERNS}
    tnpeft.attach(model, spec, match=r"\.[ab]$", mode=mode, **({"scopes": scopes} if scopes else {}), **options)


def changed(model: nn.Sequential, seed: int) -> nn.Sequential:
    """The adapted model with other values in all that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tnpeft.Handle(model, "default").parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) / 10)
    return model


def sharded(model: nn.Sequential, way: str, **options: Any) -> nn.Module:
    """The model, taken apart in one of the `WAYS`."""
    if way == "FSDP1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if way == "DDP":
        return DistributedDataParallel(model)
    for block in model if way != "whole" else ():
        for part in (block.a, block.b) if way == "layers" else (block,):
            fully_shard(part, **options)
    if way != "blocks alone":
        fully_shard(model, **options)
    return model


def rows(conv: bool = False) -> tuple[Tensor, Tensor]:
    """The inputs and targets of this process."""
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, 8, 3, 3, 3) if conv else (ROWS, 16)
    both = [torch.randn(shape, generator=generator) for _ in range(2)]
    each = ROWS // distributed.get_world_size()
    start = distributed.get_rank() * each
    x, y = (tensor[start : start + each] for tensor in both)
    return x, y


def everyones(conv: bool = False) -> tuple[Tensor, Tensor]:
    """The inputs and targets of all processes."""
    found = []
    for mine in rows(conv):
        parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, mine.contiguous())
        found.append(torch.cat(parts))
    return found[0], found[1]


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([each for each in model.parameters() if each.requires_grad], 1e-2)


def losses(model: nn.Module, x: Tensor, y: Tensor, steps: int = 4, adam: torch.optim.Optimizer | None = None) -> Tensor:
    """Those of some Adam steps on these rows."""
    adam = adam or optimiser(model)
    found = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def run(worker: Callable[..., None], processes: int, folder: Path, *arguments: Any) -> None:
    """Run `worker(folder, *arguments)` in some processes that know each other; what one raises is raised here."""
    multiprocessing.spawn(_enter, (worker, processes, str(folder), arguments), nprocs=processes)


def _enter(rank: int, worker: Callable[..., None], processes: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=tnpeft.TnpeftWarning)
    store = f"file://{folder}/store-{worker.__name__}-{processes}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    worker(Path(folder), *arguments)
    distributed.barrier()
    distributed.destroy_process_group()
    # Threads of groups that are gone may stand a moment longer: the interpreter's end would abort over one of them.
    os._exit(0)


def cores(model: nn.Module) -> Iterator[Tensor]:
    """All trained cores as they stand."""
    return (tensor for name, tensor in model.named_parameters() if ".core_" in name)
