"""Several adapters in one batch, one for each row."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.base_weight import never_called
from tnpeft.errors import AttachError, ExecutionError, Problem, clip, listed
from tnpeft.execution import Rows
from tnpeft.surgery.adapted_model import AdaptedModel, adapted, known_adapter, record_on
from tnpeft.surgery.switch import refuse_merged
from tnpeft.surgery.trained import all_tied
from tnpeft.surgery.tree import adapted_layers

__all__ = ["rows", "unhook"]


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Inside, each row of a batch gets the update of the adapter named for it; None: the base alone.

        with tnpeft.rows(model, ["a", "b", None]):
            y = model(x)  # x has three rows

    The base computes all rows at once. An adapter acts at the scale at which it is active, or 1. Rows are counted along
    the first axis of a layer's input. Where a layer sees k times as many (all tokens, one sequence after the other),
    each k consecutive ones get the same adapter. Gradients reach adapters that are active, each from its own rows.
    Backward passes of checkpointed models must run inside, too. The context is for the thread that opens it: others go
    on with what acts, or with rows of their own. Contexts nest; the inner one counts.

    Raises AttachError for unknown names, merged models, and adapters with biases, norms or statistics of their own,
    which all rows would share; and ExecutionError, inside, for inputs with another number of rows.
    """
    root, state = adapted(model)
    refuse_merged(state)
    given = _checked(root, state, names)
    results = state.results
    _count(root, state, 1)
    before, results.rows = results.rows, Rows(given)
    try:
        yield
    finally:
        results.rows = before
        _count(root, state, -1)


def _count(root: nn.Module, state: AdaptedModel, step: int) -> None:
    """Open or close a context; layers ask for the rows of their thread while any is open."""
    results = state.results
    with results.lock:
        results.rows_opened += step
        if results.rows_opened == max(step, 0):  # the first is opened, or the last closed
            for layer in adapted_layers(root):
                layer.act(layer.scales, results)
            if step > 0:
                root.register_forward_pre_hook(_check_batch, with_kwargs=True)
            else:
                unhook(root)


def unhook(root: nn.Module) -> None:
    """Remove the hook that checks batches; a copy that was made inside `rows` has it, too."""
    for number in [number for number, hook in root._forward_pre_hooks.items() if hook is _check_batch]:
        del root._forward_pre_hooks[number]
        root._forward_pre_hooks_with_kwargs.pop(number, None)


def _checked(root: nn.Module, state: AdaptedModel, names: object) -> tuple[str | None, ...]:
    """The names, all of them known. Raises AttachError for adapters that rows cannot have."""
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, Hashable) for name in names):
        fix = 'One name for each row: `["a", "b", None]`, None for the base alone.'
        raise AttachError(Problem("rows", "a list of adapters' names", clip(names), fix))
    for name in dict.fromkeys(names):
        if name == "__base__" and name not in state.adapters:
            known = ", ".join(f"'{each}'" for each in state.adapters)
            raise AttachError(Problem("adapter name", f"one of {known}", clip(name), "Write None for the base alone."))
        if name is not None:
            known_adapter(state, name)
    used = [name for name in state.adapters if name in names or name in state.active]
    if problems := [*_problems(root, state, used)]:
        raise AttachError(*problems)
    return tuple(names)


def _problems(root: nn.Module, state: AdaptedModel, used: Sequence[str]) -> Iterator[Problem]:
    """What all rows would share of named or active adapters; and adapted weights whose layers are not called."""
    fix = "Run its rows by themselves, with `tnpeft.activate`."
    for name in used:
        if trained := state.adapters[name].trained:
            what = f"rows, adapter '{name}'"
            yield Problem(what, "one that trains its cores alone", f"{listed([each[0] for each in trained])} too", fix)
    statistics = [tied for tied in all_tied(root, state) if tied.original.is_floating_point() and not tied.is_parameter]
    changed = [tied for tied in statistics if not tied.is_like_base(used)]
    if changed:
        owners = dict.fromkeys(tied.names[0].rpartition(".")[0] for tied in changed)
        found = f"others in {listed([*owners])}"
        yield Problem("rows, running statistics of norms", "the base's, for all rows", found, fix)
    layers = [layer for layer in adapted_layers(root) if not set(layer.names).isdisjoint(used)]
    unseen: dict[str, list[str]] = {}
    for layer in layers:
        if kind := never_called(layer.base):
            unseen.setdefault(kind, []).append(layer.layer_name)
    for kind, places in unseen.items():
        yield Problem("rows", "layers whose input is seen", f"{kind}: {listed(places)}", "Leave them out (`exclude`).")


def _check_batch(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check, before a forward pass of the model, that its inputs have a row for each name. Raises ExecutionError."""
    record = record_on(root)
    rows = None if record is None else record.results.rows
    if rows is None:
        return
    sizes = [tensor.shape[0] for tensor in _tensors((args, kwargs)) if tensor.dim()]
    count = len(rows.names)
    if sizes and count not in sizes:
        found = f"inputs of {sizes[0]} row{'s' * (sizes[0] != 1)}"
        fix = "Give one name for each row of the batch; with beams, each name as often as its prompt has beams."
        raise ExecutionError(Problem(f"rows, {count} of which `tnpeft.rows` names", f"inputs of {count}", found, fix))


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in arguments, and in lists and mappings among them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each, depth - 1)
