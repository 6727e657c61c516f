"""What layers compute from their cores: shared within a forward pass of the model, and kept from pass to pass.

The root module has a hook before its forward pass, which opens a pass for the thread that runs it, and one after it,
which closes it. While one is open, layers contract equal networks together. The record has the results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tnpeft.adapters.distributed import zero_problem
from tnpeft.errors import ExecutionError
from tnpeft.execution import AdaptedLayer
from tnpeft.execution.calls import Acting
from tnpeft.program import needs_plain_ops
from tnpeft.surgery.adapted_model import AdaptedModel, adapted, record_on
from tnpeft.surgery.tree import adapted_layers

__all__ = ["accumulating", "register_pass", "remove_pass"]


def register_pass(root: nn.Module) -> None:
    """Let forward passes of `root` batch its layers."""
    if _open not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(_open)
        root.register_forward_hook(_close, always_call=True)


def remove_pass(root: nn.Module) -> None:
    """Undo `register_pass`."""
    for table, hook in ((root._forward_pre_hooks, _open), (root._forward_hooks, _close)):
        for number in [number for number, known in table.items() if known is hook]:
            del table[number]
            root._forward_hooks_always_called.pop(number, None)


def _open(root: nn.Module, _inputs: Any) -> None:
    if needs_plain_ops():
        return
    if "deepspeed" in sys.modules and (problem := zero_problem(root.modules())):
        raise ExecutionError(problem)
    record = record_on(root)
    if record is not None and not record.results.is_serving:
        record.results.open_pass(record.batching.new_pass(lambda: _acting_alone(root, record), record.results))


def _close(root: nn.Module, _inputs: Any, _output: Any) -> None:
    if not torch.compiler.is_compiling() and (record := record_on(root)) is not None:
        record.results.close_pass()


def _acting_alone(root: nn.Module, record: AdaptedModel) -> list[tuple[nn.Module, Acting]]:
    """The base layers on which a single adapter acts, at scale 1, each with it; also while it is disabled."""
    pairs = [(layer.base, layer.alone) for layer in _with_results(root, record)]
    return [(base, alone) for base, alone in pairs if alone is not None]


def _with_results(root: nn.Module, record: AdaptedModel) -> list[AdaptedLayer]:
    """Make all adapted layers use the model's results: layers from earlier pickles have results of their own."""
    layers = adapted_layers(root)
    for layer in layers:
        if layer.results is not record.results:
            layer.act(layer.scales, record.results)
    return layers


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """For gradient accumulation: inside, delta weights and contracted cores are kept from one forward pass to the next.

        with tnpeft.accumulating(model):
            for x, target in micro_batches:
                loss(model(x), target).backward()
        optimiser.step()

    Each forward pass has the gradients that it would have without the context. So `backward` may be called after each
    pass or once for several, within DistributedDataParallel too. What is kept is W + ΔW of dense and hybrid layers, and
    the contracted clusters of cores of hybrid and factored ones. It is dropped at the end, and when the model is moved,
    loaded, attached to or switched. Contexts nest. Compiled graphs keep nothing, and calls within hooks on saved
    tensors (`checkpoint(..., use_reentrant=False)`, `save_on_cpu`) contract anew. The context holds for all threads,
    until the last one ends: other threads use what is kept, and compute what they would without it.

    The cores must not change inside: a forward pass after an optimiser step raises ExecutionError. Writes by fused
    optimisers and to `.data` cannot be seen. Raises AttachError where nothing is attached.
    """
    root, state = adapted(model)
    _with_results(root, state)
    with state.results.cache.open():
        yield
