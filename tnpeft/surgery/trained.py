"""What trains beside the cores: biases, norms, whole layers of a joint training.

One mechanism for all. Each adapter has its own copy of every such tensor. The one that acts is
installed where the base's was, and those that do not act (the original among them) wait frozen
in the same table of the same owner under mangled names, so that moving, copying, pickling and
saving the model need to know nothing of it, and an optimiser's parameters stay the same objects.
A tensor with several names is one tensor at all of them.

The running statistics of norms are handled alike: a forward in training mode changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tnpeft.modules.waiting import ORIGINAL, waiting_key
from tnpeft.surgery.state import ModelState
from tnpeft.surgery.tree import Slot, slots, ties

__all__ = ["Tied", "all_tied", "norm_statistics"]


class Tied:
    """One tensor of the plain model at all its names, with the copies of the adapters that train it."""

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
        return self._held(ORIGINAL)

    def copy_of(self, name: str) -> Tensor:
        """What adapter `name` trains, installed or not."""
        return self._held(f"of_{name}")

    def new_copy(self) -> Tensor:
        """The start of an adapter's own copy: the original's bits."""
        with torch.inference_mode(False):
            copy = self.original.detach().clone()
        return nn.Parameter(copy, requires_grad=False) if self.is_parameter else copy

    def add(self, name: str, copy: Tensor) -> None:
        """Let adapter `name` train this tensor; its copy waits until `show`."""
        self._wait(f"of_{name}", copy)
        self.trainers.append(name)

    def drop(self, name: str) -> None:
        """Forget the copy of an adapter that does not act; without trainers the original is all there is."""
        self.trainers.remove(name)
        self._forget(f"of_{name}")

    def show(self, active: Mapping[str, float], original_flag: bool, training: bool) -> None:
        """Install what acts: b₀ + Σ s (b - b₀) over the active trainers, the original or a copy where it is one."""
        acting = {name: active[name] for name in self.trainers if name in active}
        if acting and list(acting.values()) != [1.0]:
            with torch.inference_mode(False), torch.no_grad():  # it may be trained through later
                content, flag = self._combined(acting), False
            self._put_back()
        else:
            self._put_back()
            who = f"of_{next(iter(acting))}" if acting else ORIGINAL
            content, flag = self._held(who), training if acting else original_flag
            self._forget(who)
        acts = self._as_found(content, flag)
        for slot in self.slots:
            slot.put(acts)

    def moved(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Other adapters' copies with their values once what is installed is the original: b' + (bₖ - b₀)."""
        original, acts = self.original.detach(), self.slots[0].tensor.detach()
        if not original.is_floating_point():
            return []
        wide = torch.promote_types(original.dtype, torch.float32)
        step = acts.to(wide) - original.to(wide)
        copies = [self.copy_of(other).detach() for other in self.trainers if other != name]
        return [(copy, self._bounded(copy.to(wide) + step).to(copy.dtype)) for copy in copies]

    def fold(self, name: str) -> None:
        """Make what is installed the original; `name`, the adapter that acts, has no copy any more."""
        for who in (ORIGINAL, f"of_{name}"):
            self._forget(who)
        self.slots[0].tensor.requires_grad_(False)

    def settle(self) -> None:
        """Forget every copy: what is installed becomes the model's own."""
        for who in (ORIGINAL, *(f"of_{name}" for name in self.trainers)):
            self._forget(who)

    def _as_found(self, content: Tensor, flag: bool) -> Tensor:
        if not self.is_parameter:
            return content
        # What is combined of several copies is no parameter yet.
        parameter = content if isinstance(content, nn.Parameter) else nn.Parameter(content, requires_grad=flag)
        return parameter.requires_grad_(flag)

    def _combined(self, acting: Mapping[str, float]) -> Tensor:
        original = self.original.detach()
        if not original.is_floating_point():
            return original.clone()
        wide = original.to(torch.promote_types(original.dtype, torch.float32))
        total = wide.clone()
        for name, scale in acting.items():
            total.add_(self.copy_of(name).detach().to(wide.dtype) - wide, alpha=scale)
        return self._bounded(total).to(original.dtype)

    def _bounded(self, total: Tensor) -> Tensor:
        """A sum of differences, which may be no variance any more; written to in place."""
        return total.clamp_(min=0) if self.slots[0].key == "running_var" else total

    def _put_back(self) -> None:
        for who in (ORIGINAL, *(f"of_{name}" for name in self.trainers)):
            if self._waiting(who) is None:
                self._wait(who, self.slots[0].tensor)

    def _held(self, who: str) -> Tensor:
        waiting = self._waiting(who)
        return self.slots[0].tensor if waiting is None else waiting

    def _waiting(self, who: str) -> Tensor | None:
        return _beside(self.slots[0], who).find()

    def _wait(self, who: str, tensor: Tensor) -> None:
        for slot in self.slots:
            _beside(slot, who).put(tensor.requires_grad_(False))

    def _forget(self, who: str) -> None:
        for slot in self.slots:
            _beside(slot, who).clear()


def all_tied(root: nn.Module, state: ModelState) -> list[Tied]:
    """Every tensor that some adapter of the model trains beside its cores."""
    found = {**slots(root, "_buffers"), **slots(root)}
    trainers: dict[tuple[str, ...], list[str]] = {}
    for record in state.adapters.values():
        for names in (*record.trained, *record.statistics):
            trainers.setdefault(names, []).append(record.name)
    return [Tied((found[name] for name in names), who) for names, who in trainers.items()]


def _beside(slot: Slot, who: str) -> Slot:
    """Where a copy for `slot` waits."""
    return slot._replace(key=waiting_key(who, slot.key))


def norm_statistics(root: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of the running statistics of every norm that keeps some."""
    norms = {id(module) for module in root.modules() if isinstance(module, _NormBase)}
    found = {name: slot for name, slot in slots(root, "_buffers").items() if id(slot.owner) in norms}
    return tuple(ties(found).values())
