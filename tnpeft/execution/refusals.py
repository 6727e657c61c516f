"""What adapted layers refuse, in words, and the one assignment that they take."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from tnpeft.adapters.parked import is_parked, set_own
from tnpeft.errors import ExecutionError, Problem, TnpeftWarning

__all__ = ["replace_own", "replicated", "taken_away"]


def replace_own(layer: Any, name: str, value: Any) -> None:
    """Put another parameter in place of the base's own, as tying weights does.

    Raises ExecutionError for a merged layer, and TypeError, as torch does, for what is no parameter. Warns
    (TnpeftWarning) if an update acts on it, because reading `weight` gives their sum.
    """
    if value is not None and not isinstance(value, nn.Parameter):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"cannot assign '{kind}' as parameter '{name}' (torch.nn.Parameter or None expected)")
    if value is layer._parameters.get(name):
        return
    what = f"an assignment to `{name}`"
    if is_parked(layer.base, "_parameters", name):
        fix = "Call `tnpeft.unmerge` before, or keep the merged weights with `tnpeft.detach(model, merge=True)`."
        raise ExecutionError(Problem(what, "a layer that is not merged", "a merged one", fix, where=layer.where))
    set_own(layer.base, name, value)
    if name == "weight" and layer.scales and not layer.disabled:
        found = "one where adapters act, whose updates stay on top"
        fix = "If it was made of `layer.weight`, which is W + ΔW, make it of `layer.base.weight`, or merge first."
        problem = Problem(what, "one without adapters, or the base's new weight", found, fix, where=layer.where)
        warnings.warn(TnpeftWarning(problem), stacklevel=3)


def taken_away(layer_name: str, name: str, gone: bool = False) -> ExecutionError:
    """The error if something takes, or has taken, `name` off a layer to compute it from something else."""
    expected = "to stay what it is while adapters are attached"
    found = "something that would compute it, as weight_norm, spectral_norm and pruning do"
    fix = "Take the adapters off first, with `tnpeft.detach(model, merge=True)` to keep what they learned."
    fix = f"It is deleted already: build the model anew. {fix}" if gone else fix
    where = f"layer '{layer_name}'" if layer_name else None
    return ExecutionError(Problem(f"`{name}`", expected, found, fix, where=where))


def replicated(where: str | None) -> ExecutionError:
    """The error for `torch.nn.DataParallel` over several devices."""
    fix = (
        "Use `torch.nn.parallel.DistributedDataParallel`, started with torchrun, or show the process one device "
        "alone (CUDA_VISIBLE_DEVICES=0)."
    )
    found = "`torch.nn.DataParallel`"
    return ExecutionError(Problem("copies for several devices", "a process for each device", found, fix, where=where))
