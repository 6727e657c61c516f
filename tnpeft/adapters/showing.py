"""Modules that show other tensors under some names than those in their tables: subclasses made on the fly.

If something other than a module's own tensor acts, the module's tables `SHOWN` and `READ` say so. While they do, its
class is a subclass in which those names are properties (torch's parametrizations do the same).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnpeft.adapters.distributed import DISTRIBUTED, gathered, is_distributed, is_sharded, unit_class
from tnpeft.adapters.offload import Resident, is_bare, store, wrapper_of
from tnpeft.adapters.units import as_unit
from tnpeft.errors import ExecutionError, Problem

__all__ = [
    "MADE",
    "MANGLED",
    "ON_READING",
    "ORIGINAL",
    "READ",
    "SHOWN",
    "UNSET",
    "bare",
    "combined",
    "copies_of",
    "dress",
    "flat_weights",
    "key_of",
    "own",
    "parked_key",
    "plain_class",
    "require_values",
    "set_own",
    "showing",
    "stored_at",
]

SHOWN = "_tnpeft_shown"
"""On a module: for each tensor in whose place another acts, the key of that one."""
READ = "_tnpeft_read"
"""On a module: for each parameter that reads as its sum with updates, the key of the submodule that makes it."""
UNSET = "_tnpeft_unset"
"""On a module: the keys of copies that were made of tensors without memory, and were not loaded since."""
MANGLED = "_tnpeft_"
ORIGINAL = "original"
MADE = "_tnpeft_made"
"""On a module: for each tensor that is made of several copies, or merged, the adapters and scales that make it."""
ON_READING = ":sum"
"""In `SHOWN`, where a sum of copies acts that is made whenever it is read."""


def key_of(stored: str) -> str:
    return stored.rpartition(":")[2]


def require_values(module: nn.Module, stored: str, copy: Tensor | None) -> None:
    """Raises ExecutionError for a copy that was made on meta and now has memory, but no values."""
    if copy is None or copy.is_meta or stored not in module.__dict__.get(UNSET, ()):
        return
    found = "memory without values (it was made on the meta device)"
    fix = "Load the adapter, or the base's state dict, before the first forward; or attach once the model has values."
    raise ExecutionError(Problem(f"the trained `{key_of(stored)}` of a {type(module).__name__}", "values", found, fix))


def stored_at(module: nn.Module, table: str, stored: str) -> Tensor | None:
    for tensors in (module.__dict__[table], module.__dict__["_buffers"]):
        if stored in tensors:
            return tensors[stored]  # type: ignore[no-any-return]
    return module.__dict__[stored]  # type: ignore[no-any-return] # FSDP has taken the parameter and left a view of it


def parked_key(who: str, key: str) -> str:
    """The key of the tensor that `who` keeps beside `key`. No adapter's name has a colon, so keys never clash."""
    return f"{MANGLED}{who}:{key}"


def copies_of(name: str) -> str:
    """Whose the copies of adapter `name` are, for `parked_key`."""
    return f"of_{name}"


def own(module: nn.Module, table: str, key: str) -> Tensor:
    """The base's own tensor, whatever acts in its place, merged or not."""
    tensors = module.__dict__[table]
    tensor: Tensor | None = tensors.get(f"{MANGLED}{ORIGINAL}:{key}")
    if tensor is None:  # a table alone, as nearly always, takes no call
        tensor = tensors.get(key)
    if tensor is None:
        tensor = stored_at(module, table, key)
    assert tensor is not None
    return tensor


def combined(module: nn.Module, table: str, key: str, scales: Mapping[str, float]) -> Tensor:
    """b0 + sum of s (b - b0) over the copies of some adapters, rounded once; integers stay as they are."""
    original = own(module, table, key).detach()
    for stored in (parked_key(copies_of(name), key) for name in scales):
        require_values(module, stored, stored_at(module, table, stored))
    if list(scales.values()) == [1.0]:
        (name,) = scales
        return _copy(module, table, key, name).clone()
    if not original.is_floating_point():
        return original.clone()
    wide = original.to(torch.promote_types(original.dtype, torch.float32))
    total = wide.clone()
    for name, scale in scales.items():
        total.add_(_copy(module, table, key, name).to(wide.dtype) - wide, alpha=scale)
    # A sum of differences may be no variance any more.
    return (total.clamp_(min=0) if key == "running_var" else total).to(original.dtype)


def _copy(module: nn.Module, table: str, key: str, name: str) -> Tensor:
    copy = stored_at(module, table, parked_key(copies_of(name), key))
    assert copy is not None
    return copy.detach()


class _Showing(Resident):
    """What the subclasses have in common in whose place of a module's class they stand."""

    _tnpeft_plain: type[nn.Module]
    _tnpeft_tables: tuple[tuple[str, str], ...]

    def __setattr__(self, name: str, value: Any) -> None:
        table = dict(self._tnpeft_tables).get(name)
        if table is None:
            super().__setattr__(name, value)
        elif table == "_buffers":  # as a norm that puts a new tensor in place of its running mean
            store(self, table, self.__dict__[SHOWN][name], value)  # type: ignore[arg-type]
        else:
            if name in self.__dict__["_parameters"] and not is_bare(self):
                _require_parameter(self, name, value)
            set_own(self, name, value)

    def __delattr__(self, name: str) -> None:
        held = dict(self._tnpeft_tables).get(name) == "_parameters" and name in self.__dict__["_parameters"]
        if held and not is_bare(self):
            raise _taken_away(self, name)
        if name in dict(self._tnpeft_tables) and name not in self.__dict__["_parameters"]:
            del self.__dict__[name]
        else:
            super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        tables = dict(self._tnpeft_tables)
        for read in self.__dict__.get(READ, {}):
            gone = read not in self.__dict__["_parameters"]  # weight normalisation of old has deleted it
            if name.startswith(f"{read}_") and (gone or not isinstance(param, nn.Parameter)):  # pruning has its sum
                raise _taken_away(self, read, gone)
        if tables.get(name) == "_parameters" and not is_bare(self):
            _require_parameter(self, name, param)
        super().register_parameter(name, param)  # type: ignore[misc]

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = super()._call_impl  # type: ignore[misc]
        maker = next(iter(self.__dict__.get(READ, {}).values()), None)
        if maker is None:
            return call(*args, **kwargs)
        with self.__dict__["_modules"][maker].reading():
            return call(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The subclass is made on the fly: what is unpickled is of the plain class first."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        plain = self._tnpeft_plain
        arguments = tuple(plain if argument is type(self) else argument for argument in arguments)
        return (_made_again, (self._tnpeft_tables, make, arguments), *rest)


def _require_parameter(module: Any, name: str, value: Any) -> None:
    """Raises for what cannot stand where a parameter does: TypeError as torch does, ExecutionError under updates."""
    if value is not None and not isinstance(value, nn.Parameter):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"cannot assign '{kind}' as parameter '{name}' (torch.nn.Parameter or None expected)")
    if value is None:
        raise _taken_away(module, name)
    shape = tuple(module.__dict__["_parameters"][name].shape)
    if name in module.__dict__.get(READ, {}) and tuple(value.shape) != shape:
        what = f"an assignment to `{name}` of a {module._tnpeft_plain.__name__}"
        fix = "Take the adapters off first, with `tnpeft.detach(model, merge=True)` to keep what they learned."
        raise ExecutionError(Problem(what, f"the shape {shape}, which adapters stand on", str(tuple(value.shape)), fix))


def _taken_away(module: Any, name: str, gone: bool = False) -> ExecutionError:
    """The error for who would take an adapted parameter off its owner, to compute it from something else."""
    expected = "to stay what it is while adapters are attached"
    found = "something that would delete or compute it, as weight_norm and parametrizations do"
    fix = "Take the adapters off first, with `tnpeft.detach(model, merge=True)` to keep what they learned."
    fix = f"It is deleted already: build the model anew. {fix}" if gone else fix
    return ExecutionError(Problem(f"`{name}` of a {module._tnpeft_plain.__name__}", expected, found, fix))


def _made_again(tables: tuple[tuple[str, str], ...], make: Any, arguments: Any) -> Any:
    module = make(*arguments)
    module.__class__ = showing(type(module), tables)  # type: ignore[arg-type]
    return module


def dress(module: nn.Module, tables: tuple[tuple[str, str], ...]) -> None:
    """Give a module the class in which these names read other tensors; without names, its plain class.

    A class of torch's parametrizations stays above it, for torch takes off its own.
    """
    kind: Any = type(module)
    above: Any = next(filter(_is_of_parametrizations, kind.__mro__), None)
    plain: Any = plain_class(module)
    below = showing(plain, tables) if tables else plain
    if above is None:
        module.__class__ = below
    elif kind is not above or above.__bases__ != (below,):  # another one: copies of the module have the same
        names = {key: value for key, value in vars(above).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(above.__name__, (below,), names)


def _is_of_parametrizations(kind: type) -> bool:
    """Whether a class is one that `register_parametrization` has made for a module."""
    made = getattr(vars(kind).get("__getstate__"), "__module__", None)
    return made == parametrize.__name__ and len(kind.__bases__) == 1


@lru_cache(maxsize=1024)
def showing(plain: type[nn.Module], tables: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """The subclass of `plain` in which some names read `SHOWN`; each name comes with the table of its tensor."""

    def reading(name: str, table: str) -> Callable[[Any], Tensor | None]:
        def read(module: Any) -> Tensor | None:
            shown = module.__dict__.get(SHOWN, {})
            if is_bare(module):
                return bare(module, name) if table == "_parameters" else stored_at(module, table, name)
            if shown.get(name) == ON_READING:
                return combined(module, table, name, module.__dict__[MADE][name])
            acts = stored_at(module, table, shown.get(name, name))
            if UNSET in module.__dict__:
                require_values(module, shown.get(name, name), acts)
            if DISTRIBUTED in sys.modules and name in shown and acts is not None and is_sharded(wrapper_of(module)):
                own = stored_at(module, table, name)
                if own is not None and not is_distributed(own):  # the module runs
                    acts = gathered([acts])[0].to(own.dtype)  # that of FSDP2's MixedPrecisionPolicy
            maker = module.__dict__.get(READ, {}).get(name)
            return acts if maker is None else module._modules[maker].effective(acts)

        return read

    names: dict[str, Any] = {name: property(reading(name, table)) for name, table in tables}
    if issubclass(plain, nn.RNNBase):
        names["_flat_weights"] = property(flat_weights, lambda module, weights: None)
    if plain.forward is nn.Embedding.forward:
        names["forward"] = _look_up
    names |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    names |= {"_tnpeft_plain": plain, "_tnpeft_tables": tables}
    return type(plain.__name__, (_Showing, plain), names)


def _look_up(module: Any, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
    """An embedding's forward pass, by what makes its weight where that can do without the whole of it."""
    maker = module.__dict__.get(READ, {}).get("weight")
    rows = None if maker is None else module._modules[maker].looked_up(input)
    return nn.Embedding.forward(module, input) if rows is None else rows


def bare(module: nn.Module, name: str) -> Tensor | None:
    """The tensor under a parameter's name. Raises AttributeError if there is none, as while FSDP exchanges it."""
    if name not in module._parameters and name not in module.__dict__:
        raise AttributeError(name)
    return stored_at(module, "_parameters", name)


def set_own(module: Any, name: str, value: Tensor | None) -> None:
    """Set a module's own parameter, or the view that FSDP puts in place of one that it has taken."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.__dict__[name] = value
    else:
        module.__dict__.pop(name, None)
        module.__dict__["_parameters"][name] = value


def flat_weights(module: Any) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without subclasses that show or compute tensors; a unit of FSDP2 stays one."""
    kind: Any = type(module)
    unit = None
    while True:
        if _is_of_parametrizations(kind):
            (kind,) = kind.__bases__
        elif "_tnpeft_plain" in vars(kind):
            kind = kind._tnpeft_plain
        elif kind.__bases__[:1] == (unit_class(),):
            unit, kind = kind, kind.__bases__[1]
        else:
            break
    if unit is None:
        return kind  # type: ignore[no-any-return]
    return unit if unit.__bases__[1] is kind else as_unit(kind)  # type: ignore[no-any-return]
