"""What each of several processes would hold of a run, counted without any of them, without data and without a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ddpm_lab.config.settings import Config, Method
from ddpm_lab.model.accelerator import micro_batches
from ddpm_lab.model.method import apply_method, check_parts
from ddpm_lab.model.sharding import elements_of_part, units_of
from ddpm_lab.model.unet import build_unet
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json, writing
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone_in_out

__all__ = ["Holding", "dry_run", "holdings", "largest_unit"]

MOMENTS = 2  # of Adam, for each element that trains
NAME = "dry-run.json"


@dataclass(frozen=True)
class Holding:
    """What one process holds between two steps; the last four are bytes."""

    parameters: int
    trained: int
    weights: int  # of parameters and buffers: each process has all buffers
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


@alone_in_out("dry run")
def dry_run(command: str, processes: int, config: Config, out: Path, screen: Screen) -> dict[str, Any]:
    """Say what each of so many processes would hold, and write it to `dry-run.json`; nothing trains."""
    if command == "pretrain":
        config = config.model_copy(update={"method": Method(kind="full")})
    check_parts(config.method)
    share = config.training.accumulation
    sharded = config.distributed.shard is not None
    if sharded:
        share = micro_batches(config.training, processes)
    with torch.device("meta"):  # sizes are enough
        unet: nn.Module = build_unet(config.model, config.base)
        trained = apply_method(unet, config.method)
    held = holdings(unet, processes if sharded else 1, config.training.ema is not None)
    name, size = largest_unit(unet)
    found = {
        "method": trained.title,
        "processes": processes,
        "sharded": sharded,
        "micro_batches": share,
        "ranks": [{**vars(each), "total": each.total} for each in (held if sharded else held * processes)],
        "largest_unit": {"name": name, "bytes": size},
    }
    make_folder(out)
    with writing(out, "the dry run"):
        write_json(out / NAME, found)
    _show(found, screen)
    return found


def holdings(unet: nn.Module, processes: int, averaged: bool) -> list[Holding]:
    """What each of the processes holds of a network whose tensors are shared out to all of them."""
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in unet.buffers())
    found = []
    for process in range(processes):
        parts = [(each, elements_of_part(each, process, processes)) for each in unet.parameters()]
        trained = [(each, count) for each, count in parts if each.requires_grad]
        gradients = _bytes(trained)
        found.append(
            Holding(
                sum(count for _, count in parts),
                sum(count for _, count in trained),
                _bytes(parts) + buffers,
                gradients,
                MOMENTS * gradients,
                gradients if averaged else 0,
            )
        )
    return found


def largest_unit(unet: nn.Module) -> tuple[str, int]:
    """The name and the bytes of what a process gathers at once, the largest; the model itself has no name."""
    names = {module: name for name, module in unet.named_modules()}
    sizes: dict[str, int] = {}
    counted: set[nn.Parameter] = set()
    for unit in (*units_of(unet), unet):
        parameters = {parameter for parameter in unit.parameters() if parameter not in counted}
        sizes[names[unit]] = _bytes([(each, each.numel()) for each in parameters])
        counted |= parameters
    name = max(sizes, key=lambda each: sizes[each])
    return name, sizes[name]


def _bytes(parts: list[tuple[nn.Parameter, int]]) -> int:
    return sum(count * parameter.element_size() for parameter, count in parts)


def _show(found: dict[str, Any], screen: Screen) -> None:
    title = f"{found['method']}: what each of {found['processes']} processes holds, in elements and megabytes"
    table = Table(title=title, title_justify="left", title_style="bold")
    sizes = {"weights": "weights", "gradients": "gradients", "Adam": "optimizer", "average": "average", "all": "total"}
    for name in ("rank", "parameters", "trained", *sizes):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, each in enumerate(found["ranks"]):
        megabytes = [f"{each[key] / 1e6:,.1f}" for key in sizes.values()]
        table.add_row(str(rank), f"{each['parameters']:,}", f"{each['trained']:,}", *megabytes)
    screen.console.print(table)
    largest = found["largest_unit"]
    if found["sharded"]:
        name = largest["name"] or "what stands in no block"
        screen.line(
            f"Blocks are gathered whole while they run, one and the next; the largest, {name}, has "
            f"{largest['bytes'] / 1e6:,.1f} MB. Activations come on top. Micro-batches of an optimiser step for each "
            f"process: {found['micro_batches']}."
        )
    else:
        screen.line("Each holds the whole model; `distributed.shard=block` shares it out. Activations come on top.")
