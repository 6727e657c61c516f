"""State dicts and tensors that are kept beside a module's own: which values they get, and under which names.

`parked` says where tensors are kept. Hooks of the module translate what is loaded, and copy what would share memory.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.parked import MANGLED, ORIGINAL, TABLES, UNSET, key_of, own, parked_key, remake, table_of

__all__ = ["forget_hook", "make_again", "note_tie", "note_values", "set_to_base", "translate"]

_TIED = "_tnpeft_tied"
"""On a module: the keys of its own tensors that stand elsewhere too."""


def translate(module: nn.Module, state: MutableMapping[str, Any], prefix: str) -> None:
    """Rename the keys of a state dict that is about to be loaded to those that the module has now.

    It may be a checkpoint of the base, of an adapted or of a merged model, or one from when acting copies had the plain
    names. Each gives the base's values to the base's own tensors.
    """
    _give_values(module, state, prefix)
    for table in TABLES:
        tensors: dict[str, Tensor | None] = module.__dict__[table]
        for key in [key for key in tensors if not key.startswith(MANGLED)]:
            parked = prefix + parked_key(ORIGINAL, key)
            plain = prefix + key
            if parked in state:
                copies = [name for name in tensors if name.endswith(f":{key}") and name.startswith(f"{MANGLED}of_")]
                # Without copies it is of the time when the acting one had the plain name, and the only one here is it.
                if len(copies) == 1 and plain in state and not _has_copy(state, prefix, key):
                    state[prefix + copies[0]] = state[plain]
                if parked_key(ORIGINAL, key) not in tensors:
                    state[plain] = state.pop(parked)
            elif parked_key(ORIGINAL, key) in tensors and plain in state:
                state[parked] = state[plain]
                state[plain] = tensors[key]


def _has_copy(state: Mapping[str, Any], prefix: str, key: str) -> bool:
    return any(name.startswith(f"{prefix}{MANGLED}of_") and name.endswith(f":{key}") for name in state)


def _give_values(module: nn.Module, state: MutableMapping[str, Any], prefix: str) -> None:
    """Copies without values get theirs, or those of the base where a state dict has none for them."""
    unset: frozenset[str] = module.__dict__.get(UNSET, frozenset())
    for stored in unset:
        parked, plain = (prefix + key for key in (parked_key(ORIGINAL, key_of(stored)), key_of(stored)))
        origin = state.get(parked, state.get(plain))
        if prefix + stored not in state and origin is not None:
            state[prefix + stored] = origin.detach().clone()
    _remember_unset(module, frozenset(stored for stored in unset if prefix + stored not in state))


def note_values(module: nn.Module, table: str, stored: str) -> None:
    """Remember whether a new copy has no values because it was made on meta."""
    unset = module.__dict__.get(UNSET, frozenset()) - {stored}
    copy = module.__dict__[table].get(stored)
    _remember_unset(module, unset | {stored} if copy is not None and copy.is_meta else unset)


def _remember_unset(module: nn.Module, unset: frozenset[str]) -> None:
    if unset:
        module.__dict__[UNSET] = unset
    else:
        module.__dict__.pop(UNSET, None)


def set_to_base(module: nn.Module) -> None:
    """Give copies without values those of the module's own tensors."""
    for stored in module.__dict__.get(UNSET, ()):
        key = key_of(stored)
        table = table_of(module, key)
        copy, origin = module.__dict__[table][stored], own(module, table, key)
        if not copy.is_meta and not origin.is_meta:
            with torch.no_grad():
                copy.copy_(origin)
            note_values(module, table, stored)


def make_again(module: nn.Module, listening: bool) -> None:
    """While a module has copies, let loading a state dict give each of its tensors its own values."""
    tables = *TABLES, "_modules"  # adapted parameters have a module of their own below their owner
    copies = any(key.startswith(MANGLED) for table in tables for key in module.__dict__[table])
    hooks = module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks
    known = [number for number, hook in hooks[1].items() if hook is _loaded]
    if listening and not known:
        module.register_load_state_dict_pre_hook(_loading)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]
    elif not copies:
        forget_hook(hooks[0], _loading)
        forget_hook(hooks[1], _loaded)
        if "_tnpeft_wrapper" not in module.__dict__:
            note_tie(module, None)


def note_tie(module: nn.Module, key: str | None) -> None:
    """Remember that a module's own tensor is also elsewhere (tied); with None, that none is.

    What is kept beside such a tensor is copied into state dicts: libraries that save them know which plain names share
    memory, and refuse other names that do.
    """
    if key is None:
        module.__dict__.pop(_TIED, None)
        forget_hook(module._state_dict_hooks, _unshare)
    elif key not in module.__dict__.get(_TIED, ()):
        if _TIED not in module.__dict__:
            module.register_state_dict_post_hook(_unshare)  # type: ignore[no-untyped-call]
        module.__dict__[_TIED] = module.__dict__.get(_TIED, frozenset()) | {key}


def _unshare(module: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: object) -> None:
    base = module.__dict__.get("_base", module)  # an adapted layer shows its base's tensors
    keys: frozenset[str] = base.__dict__.get(_TIED, frozenset())
    for table in TABLES:
        for stored, tensor in module.__dict__[table].items():
            tied = stored.startswith(MANGLED) and key_of(stored) in keys
            # With `keep_vars=True` a state dict has the tensors themselves.
            if tied and prefix + stored in state and state[prefix + stored] is not tensor:
                state[prefix + stored] = state[prefix + stored].clone()


def forget_hook(table: MutableMapping[int, Any], hook: object) -> None:
    """Take a hook off a module's table of hooks."""
    for number in [number for number, known in table.items() if getattr(known, "hook", known) is hook]:
        del table[number]


def _loading(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_rest: Any) -> None:
    translate(module, state, prefix)


def _loaded(module: nn.Module, _incompatible: object) -> None:
    remake(module)
