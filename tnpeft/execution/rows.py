"""Batches whose rows have adapters of their own: each update is added to the output of its own rows.

    y[i] = base(x[i]) + update of the i-th row's adapter (x[i])

The base computes all rows at once. If a layer's input has k times as many rows as the batch (tokens of all sequences
one after the other, windows of images), each row of the batch stands for k consecutive ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tnpeft.errors import ExecutionError, Problem
from tnpeft.execution.base_call import BaseCall, plain_call
from tnpeft.execution.batch_rows import Rows
from tnpeft.execution.dispatch import execute, is_looked_on
from tnpeft.execution.dropout import drawn, on_its_own
from tnpeft.execution.site import Site
from tnpeft.execution.updates import with_updates
from tnpeft.network import Layer

__all__ = ["execute_rows", "updates_of_rows"]


def execute_rows(site: Site, x: Tensor, *rest: Any) -> Tensor:
    """The output of a layer with adapters for single rows; the usual output in threads without rows."""
    rows = site.results.rows
    if rows is None:
        output: Tensor = site.usual.way(site.usual, x, *rest)
        return output
    if isinstance(x, torch.fx.Proxy):
        return execute(site, x, *rest)
    is_looked_on(site, x)  # for what it refuses
    output = site.base.forward(x, *rest)
    for acting in site.every.values():
        layer = acting.adapter.network.layer
        return _with_rows(site, rows, layer, plain_call(site.base, layer, output, x), output)
    return output


def updates_of_rows(site: Site, layer: Layer, called: BaseCall, output: Tensor) -> Tensor:
    """The output of an opaque layer with adapters for single rows."""
    rows = site.results.rows
    if rows is not None:
        return _with_rows(site, rows, layer, called, output)
    usual: Site = site.usual
    return output if usual.idle else usual.way(usual, layer, called, output)


def _with_rows(site: Site, rows: Rows, layer: Layer, called: BaseCall, output: Tensor) -> Tensor:
    """The output with the update of each adapter on its rows."""
    each = _rows_for_each(site, rows, layer, called.x)
    if each == 0:
        return output
    split = rows.split(site.every, each, output.device)
    pieces = []
    for part in split.parts:
        own = called._replace(output=part.of(output), x=part.of(called.x))
        pieces.append(own.output if part.name is None else _updated(site, part.name, layer, own))
    return split.together(pieces)


def _updated(site: Site, name: str, layer: Layer, called: BaseCall) -> Tensor:
    acting, read = drawn(site.every[name], called.x)
    return with_updates(on_its_own(site, acting), layer, called._replace(x=read), called.output)


def _rows_for_each(site: Site, rows: Rows, layer: Layer, x: Tensor) -> int:
    """How many rows of a layer's input there are for each row of the batch. Raises ExecutionError for a remainder."""
    unbatched = x.dim() < (len(layer.kernel_size) + 2 if layer.kernel_size else 2)
    if not unbatched and not x.is_nested and x.shape[0] % len(rows.names) == 0:
        return x.shape[0] // len(rows.names)
    count = len(rows.names)
    what = f"rows of the input, {count} of which `tnpeft.rows` names"
    found = "an input without a batch" if unbatched else f"an input of the shape {tuple(x.shape)}"
    found = "a nested tensor" if x.is_nested else found
    fix = "Give one name for each row of the batch, which is the first axis of what layers see."
    where = f"layer '{site.name}'" if site.name else None
    raise ExecutionError(Problem(what, f"{count} rows, or a multiple of that", found, fix, where=where))
