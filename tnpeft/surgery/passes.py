"""Forward passes of an adapted model: while one is open, its layers contract together what is alike of their cores.

The root module has a hook before its forward pass, which opens a pass for the thread that runs it, and one after it,
which closes it. Both are told of the model by its record.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tnpeft.adapters.distributed import SPLIT_FIX, split_problem
from tnpeft.errors import ExecutionError
from tnpeft.execution.calls import Acting
from tnpeft.program import needs_plain_ops
from tnpeft.surgery.adapted_model import record_on
from tnpeft.surgery.tree import adapted_layers

__all__ = ["register_pass", "remove_pass"]


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
    if problem := split_problem([("", root)], SPLIT_FIX):
        raise ExecutionError(problem)
    record = record_on(root)
    record.results.open_pass(record.batching.new_pass(lambda: _acting_alone(root), record.results))


def _close(root: nn.Module, _inputs: Any, _output: Any) -> None:
    if not torch.compiler.is_compiling():
        record_on(root).results.close_pass()


def _acting_alone(root: nn.Module) -> list[tuple[nn.Module, Acting]]:
    """The base layers on which one adapter acts, at scale 1, with it."""
    sites = [layer.site for layer in adapted_layers(root)]
    return [(site.base, site.alone) for site in sites if site.alone is not None]
