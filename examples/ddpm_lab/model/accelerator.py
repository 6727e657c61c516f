"""Accelerate set up for a run: the device, the precision, accumulation and several processes."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from ddpm_lab.config.settings import Distributed, Training
from ddpm_lab.support.faults import fault

__all__ = ["make_accelerator", "micro_batches"]

WHOLE = Distributed()

# What `accelerate launch` puts into the environment for a configuration that asks for it.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def make_accelerator(training: Training, distributed: Distributed = WHOLE) -> Accelerator:
    """The device, the precision and the processes of a run; raises LabError for what it cannot have.

    Where the model is sharded, `gradient_accumulation_steps` are this process's share of `training.accumulation`.
    """
    _refuse_sharding()
    cpu = training.device == "cpu" or not torch.cuda.is_available()
    precision: str = training.precision
    if precision == "auto":
        precision = _fast_precision(cpu)
    if precision == "fp16" and cpu:
        raise fault("training.precision", "the precision", "fp32 or bf16 on a CPU", "fp16", "Use `auto`.")
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    plugin = GradientAccumulationPlugin(num_steps=training.accumulation, adjust_scheduler=False)
    mixed = "no" if precision == "fp32" else precision
    _make_way(mixed, cpu)
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed, gradient_accumulation_plugin=plugin)
    found = accelerator.num_processes
    if training.processes not in (None, found):
        # `accelerate launch --cpu --num_processes 2` starts one process and does not say so.
        fix = f"Start the driver with `torchrun --nproc_per_node {training.processes} examples/ddpm.py ...`."
        raise fault("training.processes", "the processes", str(training.processes), str(found), fix)
    if distributed.shard is not None:
        accelerator.gradient_accumulation_steps = micro_batches(training, found)
        if accelerator.mixed_precision == "fp16":
            fix = "Set `training.precision=fp32`."
            raise fault("training.precision", "the precision of a sharded model", "fp32 or bf16", "fp16", fix)
    return accelerator


def micro_batches(training: Training, processes: int) -> int:
    """The micro-batches of an optimiser step that each process of a sharded run takes; raises LabError."""
    total = training.accumulation
    if total % processes:
        counts = ", ".join(str(count) for count in range(1, total + 1) if total % count == 0)
        found = f"{total} for {processes} processes"
        fix = f"Start {counts} with `torchrun --nproc_per_node`, or start anew with another accumulation."
        raise fault("training.accumulation", "micro-batches", "as many for each process", found, fix)
    return total // processes


def _refuse_sharding() -> None:
    """Raise LabError where accelerate's configuration spreads one model over processes.

    The driver shards a model itself, after adapters are attached; on a CPU accelerate passes over FSDP and does not
    say so.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t"):
            expected = "none that shards the model, for the driver does (FSDP2)"
            fix = f"Start the driver with `torchrun`, without {variable}, and set `distributed.shard=block`."
            raise fault("accelerate's configuration", "several processes", expected, f"{name} ({variable})", fix)


def _make_way(mixed: str, cpu: bool) -> None:
    """Let go of an earlier run's precision and device: accelerate has one of each, and a study's methods may differ."""
    if AcceleratorState._shared_state:
        earlier = AcceleratorState()
        if (earlier.mixed_precision, earlier.device.type == "cpu") != (mixed, cpu):
            AcceleratorState._reset_state(reset_partial_state=earlier.num_processes == 1)


def _fast_precision(cpu: bool) -> str:
    """bf16 where the hardware multiplies in it (without AMX a CPU is slower in bf16 than in fp32)."""
    if cpu:
        return "bf16" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
