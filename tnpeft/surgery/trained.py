"""What trains beside the cores: biases, norms, whole layers of a joint training.

There is one mechanism for all. Each adapter has its own copy of every such tensor. All copies are beside the base's
tensor, in the same table of the same module. So code that moves, copies, pickles or saves the model need not know of
them, and an optimiser's parameters stay the same objects. `adapters.parked` says how one of them acts. A tensor with
several names is one tensor under all of them.

The running statistics of norms are handled in the same way: a forward pass in training mode changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tnpeft.adapters.offload import present
from tnpeft.adapters.parked import (
    ORIGINAL,
    acting_scales,
    combined,
    copies_of,
    drop_sum,
    is_parked,
    keep,
    park,
    parked_key,
    show,
    show_sum,
    take_back,
)
from tnpeft.adapters.parked_states import make_again
from tnpeft.surgery.adapted_model import AdaptedModel
from tnpeft.surgery.tree import Slot, slots, ties

__all__ = ["Tied", "all_tied", "norm_statistics"]


class Tied:
    """One tensor of the plain model, under all its names, with the copies of the adapters that train it."""

    def __init__(self, places: Iterable[Slot], trainers: Iterable[str] = ()) -> None:
        self.slots = tuple(places)
        self.trainers = list(trainers)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots)

    @property
    def is_parameter(self) -> bool:
        return self.slots[0].table == "_parameters"

    @property
    def original(self) -> Tensor:
        return self.slots[0].tensor

    def copy_of(self, name: str) -> Tensor:
        """The copy that adapter `name` trains, whether it acts or not."""
        copy = self.slots[0].beside(copies_of(name))
        assert copy is not None
        return copy

    def is_like_base(self, names: Iterable[str]) -> bool:
        """Whether the copies of these adapters have the base's values."""
        copies = [self.copy_of(name) for name in names if name in self.trainers]
        return all(torch.equal(copy, self.original) for copy in copies)

    def new_copy(self) -> Tensor:
        """A new copy for an adapter, with the original's bits."""
        with present(self.slots[0].owner), torch.inference_mode(False):
            copy = self.original.detach().clone()
        return nn.Parameter(copy, requires_grad=False) if self.is_parameter else copy

    def add(self, name: str, copy: Tensor) -> None:
        """Let adapter `name` train this tensor; its copy does not act before `show` says so."""
        for slot in self.slots:
            slot.put_beside(copies_of(name), copy.requires_grad_(False))
            make_again(slot.owner, True)
        self.trainers.append(name)

    def drop(self, name: str) -> None:
        """Forget the copy of an adapter that does not act; without any copy only the original is left."""
        self.trainers.remove(name)
        self._forget([name])

    def show(self, active: Mapping[str, float], original_flag: bool, training: bool, merged: bool) -> None:
        """Let b₀ + Σ s (b - b₀), over the active adapters, act: the original or a copy itself, where it equals one.

        In a merged model the sum takes the original's place. `active` is empty if the base alone is to act.
        """
        scales = {name: active[name] for name in self.trainers if name in active}
        if self.is_parameter:
            for name in self.trainers:
                self.copy_of(name).requires_grad_(training and scales == {name: 1.0})
            self.original.requires_grad_(original_flag and not scales)
        for slot in self.slots:
            place = slot.owner, slot.table, slot.key
            if not merged:
                take_back(*place)
            if is_parked(*place):
                if acting_scales(slot.owner, slot.key):  # else an adapted layer has parked it, and shows it
                    show(*place, None if scales else parked_key(ORIGINAL, slot.key))
                continue
            if merged and scales:
                effective = self._combined(slot, scales)
                drop_sum(slot.owner, slot.key)
                park(*place, scales, effective)
            else:
                self._show_at(slot, scales)

    def _show_at(self, slot: Slot, scales: Mapping[str, float]) -> None:
        place = slot.owner, slot.table, slot.key
        drop_sum(slot.owner, slot.key)
        if not scales:
            show(*place, None)
        elif list(scales.values()) == [1.0]:
            show(*place, parked_key(copies_of(next(iter(scales))), slot.key))
        else:
            show_sum(*place, scales, self._combined(slot, scales))

    def _combined(self, slot: Slot, scales: Mapping[str, float]) -> Tensor:
        with present(slot.owner), torch.inference_mode(False), torch.no_grad():  # it may be trained through later
            return combined(slot.owner, slot.table, slot.key, scales)

    def moved(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """The other adapters' copies, with the values they get when what acts becomes the original: b' + (bₖ - b₀)."""
        with present(self.slots[0].owner):
            original, acts = self.original.detach(), self.slots[0].acting.detach()
            if not original.is_floating_point():
                return []
            wide = torch.promote_types(original.dtype, torch.float32)
            step = acts.to(wide) - original.to(wide)
        copies = [self.copy_of(other).detach() for other in self.trainers if other != name]
        return [(copy, self._bounded(copy.to(wide) + step).to(copy.dtype)) for copy in copies]

    def _bounded(self, total: Tensor) -> Tensor:
        """A sum of differences, clamped in place so that a variance stays one."""
        return total.clamp_(min=0) if self.slots[0].key == "running_var" else total

    def merge_into_base(self, name: str) -> None:
        """Make what acts the original; the adapter `name`, whose copy that is, has none any more."""
        self._keep()
        self._forget([name])
        self.slots[0].tensor.requires_grad_(False)

    def settle(self) -> None:
        """Forget every copy: what acts becomes the model's own."""
        self._keep()
        self._forget(self.trainers)

    def _keep(self) -> None:
        acts = self.slots[0].acting
        for slot in self.slots:
            keep(slot.owner, slot.table, slot.key, acts)
            drop_sum(slot.owner, slot.key)

    def _forget(self, names: Iterable[str]) -> None:
        for slot in self.slots:
            for name in names:
                slot.put_beside(copies_of(name), None)
            make_again(slot.owner, False)


def all_tied(root: nn.Module, state: AdaptedModel) -> list[Tied]:
    """Every tensor that some adapter of the model trains beside its cores."""
    trainers: dict[tuple[str, ...], list[str]] = {}
    for record in state.adapters.values():
        for names in (*record.trained, *record.statistics):
            trainers.setdefault(names, []).append(record.name)
    if not trainers:
        return []
    known = {**slots(root, "_buffers"), **slots(root)}
    return [Tied((known[name] for name in names), who) for names, who in trainers.items()]


def norm_statistics(root: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of the running statistics of every norm that keeps some."""
    norms = {id(module) for module in root.modules() if isinstance(module, _NormBase)}
    found = {name: slot for name, slot in slots(root, "_buffers").items() if id(slot.owner) in norms}
    return tuple(ties(found).values())
