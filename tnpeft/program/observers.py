"""Who looks on while a layer runs: whoever records operations, or differentiates in ways that autograd does not.

A tracer records operations to run them again, `torch.func` and forward-mode differentiation follow each of them, and
tensors that stand in for others need not be what they seem. None of them sees through an autograd Function, a write
to `.data`, a table that was made earlier, or tensors that were made for several layers at once. For all of them
layers run plain differentiable operations of torch, which have the same values.

Modes that only count what runs (`FlopCounterMode`, profilers, counters of memory) see every operation within a
Function as well, and are shown what runs without them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "is_recorded",
    "needs_plain_ops",
    "records_sizes",
    "saved_tensor_hooks",
    "saved_tensors_are_hooked",
    "without_inference_gradients",
]

_tracing_state = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_mode_before_dispatch = torch._ops._get_dispatch_mode_pre_dispatch

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
_STAND_INS = {torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.FUNCTIONAL}
_RECORDERS = {torch._C._TorchDispatchModeKey.PROXY}
# Selective activation checkpointing hands out kept tensors, which nobody may write to.
_KEEPERS = {"_CachingTorchDispatchMode", "_CachedTorchDispatchMode"}


def needs_plain_ops(*tensors: Tensor) -> bool:
    """Whether layers must run plain differentiable operations of torch alone: somebody looks on.

    That is a tracer (`torch.jit.trace`, both ONNX exporters, `torch.fx`, `make_fx`), `torch.compile`, `torch.export`,
    `torch.func`, forward-mode differentiation, a mode that records or stands in for tensors; or one of `tensors` is of
    another class than torch's own, has no memory (meta, fake), or is on another device than the first one.
    """
    if (
        torch.compiler.is_compiling()  # first, for a compiler knows it without looking at the rest
        or _tracing_state() is not None
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or (_dispatch_modes() and _stand_in())
        or (_function_modes() and _recorded_by_function_mode())
    ):
        return True
    device = None
    for tensor in tensors:  # a loop, for every layer of a pass asks
        if type(tensor) not in _PLAIN_TYPES or tensor.is_meta or (device is not None and tensor.device != device):
            return True
        device = tensor.device
    return False


def is_recorded() -> bool:
    """Whether operations must be plain: autograd records them one by one, or somebody looks on."""
    return torch.is_grad_enabled() or needs_plain_ops()


def records_sizes() -> bool:
    """Whether operations are recorded to run again on inputs of any size, without a check that the size is the same.

    `torch.compile` and `torch.export` do check, and `torch.func` records nothing.
    """
    if torch.compiler.is_compiling():
        return False
    return _tracing_state() is not None or _mode_of(_RECORDERS) or _proxy_before_dispatch() is not None


def saved_tensors_are_hooked() -> bool:
    """Whether tensors that autograd saves go through hooks, as under activation checkpointing."""
    return saved_tensor_hooks() is not None


def saved_tensor_hooks() -> object:
    """The hooks through which tensors go that autograd saves; None where there are none."""
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def without_inference_gradients() -> AbstractContextManager[Any]:
    """Inside, nothing is recorded where inference mode is on: autograd's functions may save nothing there."""
    return torch.no_grad() if torch.is_inference_mode_enabled() else nullcontext()


def _proxy_before_dispatch() -> object:
    """The mode with which `make_fx(pre_dispatch=True)` records, if it does."""
    mode: object = _mode_before_dispatch(torch._C._TorchDispatchModeKey.PROXY)  # type: ignore[no-untyped-call]
    return mode


def _stand_in() -> bool:
    if _mode_of(_STAND_INS | _RECORDERS):
        return True
    return any(type(mode).__name__ in _KEEPERS for mode in _get_current_dispatch_mode_stack())


def _mode_of(keys: set[torch._C._TorchDispatchModeKey]) -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in keys)


def _recorded_by_function_mode() -> bool:
    """A default device is no recorder."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
