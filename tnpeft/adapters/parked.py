"""Tensors kept beside a module's own, in the same table: copies that adapters train, and those that merging parks.

A module's own tensor keeps its own name. So a state dict of an adapted model holds the base under the base's names, and
all that adapters add under other names. If a copy acts instead, the module's table `SHOWN` says so. While it does, the
module's class is a subclass whose attributes read that table (`showing`). While a model is merged, the effective
tensors have the plain names, and the module's own tensors are parked as `ORIGINAL`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from tnpeft.adapters.distributed import whole
from tnpeft.adapters.offload import store
from tnpeft.adapters.showing import (
    MADE,
    MANGLED,
    ON_READING,
    ORIGINAL,
    READ,
    SHOWN,
    UNSET,
    _made_again,
    bare,
    combined,
    copies_of,
    dress,
    flat_weights,
    key_of,
    own,
    parked_key,
    plain_class,
    set_own,
    stored_at,
)
from tnpeft.network import Layer

__all__ = [
    "LOOKUPS",
    "MANGLED",
    "ORIGINAL",
    "TABLES",
    "UNSET",
    "ParameterLayer",
    "acting",
    "acting_scales",
    "bare",
    "combined",
    "copies_of",
    "drop_sum",
    "is_parked",
    "is_parked_unmade",
    "keep",
    "key_of",
    "own",
    "own_weight",
    "park",
    "parked_key",
    "read_through",
    "reads_through",
    "remake",
    "set_own",
    "show",
    "show_sum",
    "table_of",
    "take_back",
]

_SUM = "sum"
_FLAT = "_fsdp_flattened"  # what FSDP1 leaves on the parameters that it holds in pieces
TABLES = ("_parameters", "_buffers")


LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
"""Modules that look rows of their weight up, and are adapted by the weight that they read."""


class ParameterLayer:
    """A parameter of `owner` as the weight of a Linear layer, or of a stack of them; `signature` has its orientation.

    This is not a module: the parameter stays in its owner's table, under its own name.
    """

    def __init__(self, owner: nn.Module, key: str, signature: Layer) -> None:
        self.owner, self.key, self.signature = owner, key, signature
        self._tnpeft_wrapper = owner  # whose hooks bring the tensor, for `offload`

    @property
    def weight(self) -> Tensor:
        """The tensor that acts as the parameter: its own, or the copy of an adapter that trains it as a whole."""
        return acting(self.owner, "_parameters", self.key)

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        return self.owner._parameters

    @property
    def training(self) -> bool:
        return self.owner.training

    @property
    def is_whole(self) -> bool:
        """Whether its owner is itself the layer: an embedding, which has no other parameter."""
        return self.key == "weight" and isinstance(self.owner, LOOKUPS)

    def extra_repr(self) -> str:
        return f"{self.key}, {self.signature}"


def own_weight(base: nn.Module | ParameterLayer) -> Tensor:
    """The base's own weight, whatever an adapter that trains the layer as a whole has put in its place."""
    if isinstance(base, ParameterLayer):
        return own(base.owner, "_parameters", base.key)
    return own(base, "_parameters", "weight")


def acting(module: nn.Module, table: str, key: str) -> Tensor:
    """The tensor with which the module computes."""
    stored = module.__dict__.get(SHOWN, {}).get(key, key)
    if stored == ON_READING:
        return combined(module, table, key, module.__dict__[MADE][key])
    tensor = stored_at(module, table, stored)
    assert tensor is not None
    return tensor


def show(module: nn.Module, table: str, key: str, stored: str | None) -> None:
    """Let the tensor stored as `stored` act as `key`; with None, the one at `key` itself."""
    shown = {name: other for name, other in module.__dict__.get(SHOWN, {}).items() if name != key}
    if stored is not None:
        shown[key] = stored
    _take_class(module, SHOWN, shown)


def read_through(module: nn.Module, key: str, maker: str | None) -> None:
    """Let reading a parameter give what the submodule `maker` makes of it, by `effective`; with None, the parameter."""
    read = {name: other for name, other in module.__dict__.get(READ, {}).items() if name != key}
    if maker is not None:
        read[key] = maker
    _take_class(module, READ, read)


def reads_through(module: nn.Module) -> bool:
    """Whether reading some parameter of a module gives its sum with updates."""
    return READ in module.__dict__


def _take_class(module: nn.Module, where: str, names: dict[str, str]) -> None:
    """Keep a table of what reads otherwise than it stands, and give the module the class that reads it so."""
    if names:
        module.__dict__[where] = names
    else:
        module.__dict__.pop(where, None)
    read = {**module.__dict__.get(SHOWN, {}), **module.__dict__.get(READ, {})}
    tables = tuple(sorted((name, table_of(module, name)) for name in read))
    dress(module, tables)
    if not tables:
        _list_anew(module)


def acting_scales(module: nn.Module, key: str) -> dict[str, float]:
    """The adapters whose copies make the tensor that acts as `key`, with their scales; none for the module's own."""
    if key in module.__dict__.get(MADE, {}):
        return dict(module.__dict__[MADE][key])
    stored = module.__dict__.get(SHOWN, {}).get(key, "")
    name = stored.removeprefix(f"{MANGLED}of_").rpartition(":")[0]
    return {name: 1.0} if stored.startswith(f"{MANGLED}of_") else {}


def park(module: nn.Module, table: str, key: str, scales: Mapping[str, float], tensor: Tensor) -> None:
    """Put an effective `tensor` in place of the module's own, which is parked.

    `scales` say which copies it is made of, so that it can be made anew.
    """
    tensors = module.__dict__[table]
    show(module, table, key, None)
    if parked_key(ORIGINAL, key) not in tensors:
        store(module, table, parked_key(ORIGINAL, key), tensors[key], of=key)
    effective = nn.Parameter(tensor, requires_grad=False) if table == "_parameters" else tensor
    store(module, table, key, effective)
    if scales:
        module.__dict__.setdefault(MADE, {})[key] = dict(scales)
    _list_anew(module)


def is_parked(module: nn.Module, table: str, key: str) -> bool:
    """Whether an effective tensor is in place of the module's own."""
    return parked_key(ORIGINAL, key) in module.__dict__[table]


def is_parked_unmade(module: nn.Module, keys: Collection[str]) -> bool:
    """Whether a copy acts under the plain name of one of these tensors, as in pickles of the first version."""
    made = module.__dict__.get(MADE, {})
    wrapped = "_base" in module.__dict__ or "_tnpeft_wrapper" in module.__dict__
    return any(
        is_parked(module, table, key) and key not in made
        for table in TABLES
        for key in keys
        if not (wrapped and key == "weight")
    )


def take_back(module: nn.Module, table: str, key: str) -> None:
    """Undo `park`."""
    tensors = module.__dict__[table]
    parked = parked_key(ORIGINAL, key)
    if parked in tensors:
        store(module, table, key, tensors[parked], of=parked)
        store(module, table, parked, None)
        if module.__dict__.get(SHOWN, {}).get(key) == parked:  # a copy made while the base was shown
            show(module, table, key, None)
        _list_anew(module)
    module.__dict__.get(MADE, {}).pop(key, None)


def keep(module: nn.Module, table: str, key: str, tensor: Tensor) -> None:
    """Make `tensor` the module's own for good; the old one is forgotten."""
    show(module, table, key, None)
    if tensor is own(module, table, key):
        take_back(module, table, key)
        return
    if table == "_parameters" and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    if tensor is not module.__dict__[table][key]:
        store(module, table, key, tensor)
    if is_parked(module, table, key):
        store(module, table, parked_key(ORIGINAL, key), None)
    module.__dict__.get(MADE, {}).pop(key, None)
    _list_anew(module)


def show_sum(module: nn.Module, table: str, key: str, scales: Mapping[str, float], tensor: Tensor) -> None:
    """Let a sum of copies act; it moves with the module and is not saved."""
    if getattr(own(module, table, key), _FLAT, False):  # whole while the module runs, and not now
        module.__dict__.setdefault(MADE, {})[key] = dict(scales)
        show(module, table, key, ON_READING)
        return
    stored = parked_key(_SUM, key)
    module._buffers[stored] = whole(tensor)  # FSDP gathers no buffers
    module._non_persistent_buffers_set.add(stored)
    module.__dict__.setdefault(MADE, {})[key] = dict(scales)
    show(module, table, key, stored)


def drop_sum(module: nn.Module, key: str) -> None:
    """Forget a sum of copies."""
    stored = parked_key(_SUM, key)
    if module._buffers.pop(stored, None) is not None or module.__dict__.get(SHOWN, {}).get(key) == ON_READING:
        module._non_persistent_buffers_set.discard(stored)
        module.__dict__.get(MADE, {}).pop(key, None)


def remake(module: nn.Module) -> None:
    """Compute sums and merged tensors anew, after their parts got new values."""
    for key, scales in module.__dict__.get(MADE, {}).items():
        if module.__dict__.get(SHOWN, {}).get(key) == ON_READING:
            continue
        table = table_of(module, key)
        stored = parked_key(_SUM, key) if parked_key(_SUM, key) in module._buffers else key
        target = stored_at(module, table, stored)
        assert target is not None
        with torch.no_grad():
            target.copy_(whole(combined(module, table, key, scales)))


def table_of(module: nn.Module, key: str) -> str:
    return "_parameters" if key in module._parameters else "_buffers"


def _list_anew(module: nn.Module) -> None:
    """Renew the list of parameters that recurrent layers keep beside the table."""
    if isinstance(module, nn.RNNBase) and type(module) is plain_class(module):
        module.__dict__["_flat_weights"] = flat_weights(module)


_earlier = _made_again  # pickled models of earlier versions know it here
