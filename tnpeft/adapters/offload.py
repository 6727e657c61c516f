"""Modules whose tensors accelerate moves: hooks around their forward pass bring the tensors and take them away.

accelerate replaces `forward` of each module that has tensors of its own. Between two calls it replaces each tensor by
one on the meta device. What an adapter adds is small and trains, so it stays where it is, the same object for the
optimiser. A module of `preload_module_classes` has one hook for all tensors below it; `mark` tells this to the modules
below. Nothing here imports accelerate: its hooks are known by what they leave on a module (`_hf_hook`, `_old_forward`).
"""

from __future__ import annotations

import functools
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.distributed import DISTRIBUTED, is_distributed, keep_wide

__all__ = [
    "Resident",
    "hook_of",
    "is_bare",
    "is_taken_away",
    "mark",
    "move_hook",
    "present",
    "store",
    "unmark",
    "wrapper_of",
]

_HOOK, _FORWARD = "_hf_hook", "_old_forward"
_AWAY = "_tnpeft_away"
_WRAPPER = "_tnpeft_wrapper"
_RESIDENT = "_tnpeft_of_"
_BELOW = "_tnpeft_below"
"""On a module: the one above it whose hook brings its tensors, and its name below that."""
_GET_PARAMETER = nn.Module.get_parameter.__code__
_TORCH = "torch.nn.modules.module"
_LISTS, _HOOKS = "accelerate.utils.modeling", "accelerate.hooks"
# Files of accelerate, FSDP and distributed checkpoints that ask a module for a tensor as an attribute, and write to its
# table.
_FSDP = "torch.distributed.fsdp"
_MOVERS = frozenset(
    {
        _LISTS,
        f"{_FSDP}._flat_param",
        f"{_FSDP}._init_utils",
        f"{_FSDP}._fully_shard._fsdp_common",
        f"{_FSDP}._fully_shard._fsdp_init",
        f"{_FSDP}._fully_shard._fsdp_param",
        "torch.distributed.checkpoint.state_dict",
    }
)
_CALLS = ("pre_forward", "post_forward", "detach_hook")


class Resident:
    """A mixin for a module with tensors that accelerate must not move."""

    def resident_keys(self) -> list[str]:
        """The keys of tensors that stay where they are: what adapters train beside the module's own tensors."""
        return _copies(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate keeps the old forward, looks at the module's tensors and leaves its hook, in this order.
        if name == _FORWARD:
            _take_away(self)
        elif name == _HOOK:
            _put_back(self)
            _guard(value)
        elif DISTRIBUTED in sys.modules and is_distributed(value) and name in self.resident_keys():  # FSDP2 takes it
            keep_wide(value)
        super().__setattr__(name, value)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        """As for any module; to a hook that offloads it shows only what the hook may move."""
        modules: Iterator[Any] = super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[misc]
        return _as_offloaded(self, modules) if _is_for_offloading() else modules


def is_bare(module: Any) -> bool:
    """Whether accelerate, FSDP or `get_parameter` is reading the module, which then shows its own tensors.

    It is for a module's attributes: the caller of the caller counts. These libraries read a tensor as an attribute and
    write it to the module's table, even if the module has no hook of theirs.
    """
    if _AWAY in module.__dict__:
        return True
    if torch.compiler.is_compiling():
        return False
    caller = sys._getframe(2)
    return caller.f_globals.get("__name__") in _MOVERS or caller.f_code is _GET_PARAMETER


def mark(root: nn.Module) -> None:
    """Tell each module if one above it has a hook for all tensors below; call it after hooks were added."""
    for above in [*root.modules()]:
        hook = above.__dict__.get(_HOOK)
        if hook is not None and _is_wide(hook):  # few have one, and every act on the model asks
            for name, module in [*above.named_modules()]:
                for below in (module, module.__dict__.get("_base")):  # an adapted layer, and what it wraps
                    if below is not None and below is not above:
                        below.__dict__[_BELOW] = above, name
            _guard(hook)


def unmark(root: nn.Module) -> None:
    """Forget what `mark` told."""
    for module in root.modules():
        module.__dict__.pop(_BELOW, None)


def wrapper_of(base: nn.Module) -> nn.Module:
    """The adapted layer around a base layer; any other module itself."""
    wrapper: nn.Module = base.__dict__.get(_WRAPPER, base)
    return wrapper


def hook_of(module: nn.Module) -> Any:
    """accelerate's hook that brings a module's tensors, or None."""
    around, _ = _hooked_at(module)
    return around.__dict__.get(_HOOK)


def is_taken_away(module: nn.Module) -> bool:
    """Whether accelerate takes a module's tensors away between two calls."""
    return _offloading(hook_of(module)) is not None


def _hooked_at(module: nn.Module) -> tuple[nn.Module, str]:
    """The module whose hook brings another's tensors, and what their names begin with there.

    It is the module itself, the adapted layer around it, or one above that is preloaded as a whole.
    """
    around = wrapper_of(module)
    for hooked in (module, around):
        if _HOOK in hooked.__dict__:
            return hooked, ""
    for below in (module, around):
        above, name = below.__dict__.get(_BELOW, (None, ""))
        if above is not None and _is_wide(above.__dict__.get(_HOOK)):
            return above, f"{name}."
    return around, ""


def _is_wide(hook: Any) -> bool:
    """Whether a hook takes away all tensors below its module: that of one in `preload_module_classes`."""
    return any(getattr(each, "place_submodules", False) and getattr(each, "offload", False) for each in _each(hook))


def _each(hook: Any) -> tuple[Any, ...]:
    """A hook, or those in a row."""
    return tuple(getattr(hook, "hooks", (hook,)))


def _is_for_offloading() -> bool:
    """Whether the caller of the caller lists modules for a hook of accelerate that takes tensors away."""
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(2)
    for files in ((_TORCH, __name__), (_LISTS,)):
        passed = False
        while frame is not None and frame.f_globals.get("__name__") in files:
            frame, passed = frame.f_back, True  # type: ignore[assignment]
    while passed and frame is not None and frame.f_globals.get("__name__") == _HOOKS:
        if "self" in frame.f_locals:  # not so in a comprehension
            return bool(getattr(frame.f_locals["self"], "offload", False))
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _as_offloaded(module: Resident, modules: Iterator[Any]) -> Iterator[Any]:
    """Modules with their names, this one without what stays where it is."""
    for name, each in modules:
        if each is not module:
            yield name, each
            continue
        stays = set(module.resident_keys())
        tables: dict[str, Any] = {"_non_persistent_buffers_set": module.__dict__["_non_persistent_buffers_set"]}
        for table in ("_parameters", "_buffers"):
            tensors = module.__dict__[table]
            tables[table] = {key: tensor for key, tensor in tensors.items() if key not in stays}
        yield name, SimpleNamespace(**tables)


def move_hook(source: nn.Module, target: nn.Module) -> None:
    """Move accelerate's hook from one module to another one with the same tensors."""
    hook = source.__dict__.pop(_HOOK, None)
    if source.__dict__.pop(_FORWARD, None) is not None or hook is not None:
        source.__dict__.pop("forward", None)
    if hook is None:
        return
    target.__dict__.pop("forward", None)
    target.__dict__[_FORWARD] = target.forward
    target.__dict__[_HOOK] = hook
    _guard(hook)
    target.__dict__["forward"] = functools.update_wrapper(functools.partial(_hooked, target), target.forward)


def _hooked(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What accelerate makes of a module's forward pass."""
    hook = module._hf_hook
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
        output = module._old_forward(*args, **kwargs)
    return hook.post_forward(module, output)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside, the tensors of a module are on the device where it computes, as during its forward pass."""
    around, _ = _hooked_at(module)
    hook = around.__dict__.get(_HOOK)
    if hook is None or not any(tensor.is_meta for tensor in module._parameters.values() if tensor is not None):
        yield
        return
    hook.pre_forward(around)
    try:
        yield
    finally:
        hook.post_forward(around, None)


def store(module: nn.Module, table: str, key: str, tensor: Tensor | None, of: str | None = None) -> None:
    """Put a tensor into a module's table (None removes it) and, if it is one that accelerate moves, into the hook's.

    `of` is the key that it had until now.
    """
    tensors: dict[str, Tensor | None] = module.__dict__[table]
    around, prefix = _hooked_at(module)
    any_hook = around.__dict__.get(_HOOK)
    if key.startswith(_RESIDENT) and any_hook is not None:
        _guard(any_hook)
    hook = _offloading(any_hook)
    if hook is not None and not key.startswith(_RESIDENT):
        away = table == "_parameters" or hook.offload_buffers
        tensor = _restocked(hook, prefix + key, tensor, None if of is None else prefix + of, away)
    if tensor is None:
        tensors.pop(key, None)
    else:
        tensors[key] = tensor


def _restocked(hook: Any, key: str, tensor: Tensor | None, of: str | None, away: bool) -> Tensor | None:
    """What stands for a tensor between two calls; its values are with the hook from here on, which gives them back.

    `away`: it is one that is taken away.
    """
    if not isinstance(hook.weights_map, ChainMap):
        hook.weights_map = ChainMap({}, hook.weights_map)
    stock: Any = hook.weights_map.maps[0]
    if tensor is None:
        stock.pop(key, None)
        hook.original_devices.pop(key, None)
        return None
    if tensor.is_meta:
        assert of is not None
        stock[key] = hook.weights_map[of]
    else:
        stock[key] = tensor.detach().cpu()
    devices = hook.original_devices
    devices[key] = devices.get(of or key, tensor.device)
    if not away:
        return tensor
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _offloading(hook: Any) -> Any:
    """The hook, of those in a row, that takes tensors away; None if none does."""
    takers = (each for each in _each(hook) if getattr(each, "offload", False) and each.weights_map is not None)
    return next(takers, None)


def _guard(hook: Any) -> None:
    """Let a hook see a module without what stays where it is."""
    for name in _CALLS:
        call = getattr(hook, name)
        if not isinstance(call, _Guarded):
            setattr(hook, name, _Guarded(call))


class _Guarded:
    """A hook's function, called on a bare module."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        wide = _is_wide(getattr(self.call, "__self__", None))
        modules = [below for below in (module.modules() if wide else (module,)) if _AWAY not in below.__dict__]
        for below in modules:
            _take_away(below)
        try:
            return self.call(module, *args, **kwargs)
        finally:
            for below in modules:
                _put_back(below)


def _copies(module: Any) -> list[str]:
    tables = module.__dict__["_parameters"], module.__dict__["_buffers"]
    return [key for table in tables for key in table if key.startswith(_RESIDENT)]


def _take_away(module: Any) -> None:
    keys = module.resident_keys() if isinstance(module, Resident) else _copies(module)
    away = {}
    for table in ("_parameters", "_buffers"):
        tensors = module.__dict__[table]
        away[table] = {key: tensors.pop(key) for key in keys if key in tensors}
    module.__dict__[_AWAY] = away


def _put_back(module: Any) -> None:
    for table, tensors in module.__dict__.pop(_AWAY, {}).items():
        module.__dict__[table].update(tensors)
