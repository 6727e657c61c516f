"""What a model knows of its adapters: a record of plain Python on the root module.

The record lives in the root's `__dict__`, holds no tensor and no module, and so travels through
deepcopy and pickle by itself. Names in it are those of the plain model, as if nothing were adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tnpeft.adapters.offload import mark
from tnpeft.adapters.parked import is_parked_unmade
from tnpeft.errors import AttachError, Problem, clip, near_miss
from tnpeft.execution import Batching, ModelResults

__all__ = ["AdaptedModel", "AdapterRecord", "adapted", "find", "kind_problem", "known_adapter", "record_on"]

_KEY, _OPEN = "_tnpeft", "_tnpeft_results"


@dataclass(frozen=True)
class AdapterRecord:
    """One named adapter of a model.

    `targets` are the adapted layers. `trained` lists every parameter that trains beside the cores, with all of its
    names (tied ones have several). `statistics` lists the running statistics of norms in the same way: training changes
    them too. `about` is JSON-like data of the caller.
    """

    name: str
    targets: tuple[str, ...]
    trained: tuple[tuple[str, ...], ...] = ()
    statistics: tuple[tuple[str, ...], ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class AdaptedModel:
    """All adapters of a model and which of them act.

    `requires_grad` holds the flags from before the first attach, `active` the scales of the adapters that act, `before`
    those that acted before they were merged, `disabled` how many `disabled` contexts are open. `places` is a version
    number for where copies are kept; older pickles, in which acting copies had the plain names, have none.
    """

    requires_grad: dict[str, bool]
    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    merged: bool = False
    before: dict[str, float] = field(default_factory=dict)
    disabled: int = 0
    places: int = 2
    results: ModelResults = field(default_factory=ModelResults)
    batching: Batching = field(default_factory=Batching)

    def __setstate__(self, known: dict[str, Any]) -> None:
        """Accept pickles of earlier versions, which have no results."""
        self.__dict__.update({"results": ModelResults(), "batching": Batching(), **known})

    def forget(self) -> None:
        """Drop kept results after a change of the layers, their adapters or scales."""
        self.results.forget()
        self.batching = Batching()

    def scale_of(self, name: str) -> float:
        """The scale at which to save or merge one adapter: that at which it acts, or 1 if it does not act."""
        return self.active.get(name, 1.0)

    @classmethod
    def new(cls, root: nn.Module, requires_grad: dict[str, bool]) -> AdaptedModel:
        """A new record for a root that has none."""
        return cls(requires_grad, results=root.__dict__.pop(_OPEN, None) or ModelResults())

    def keep_on(self, root: nn.Module) -> None:
        root.__dict__[_KEY] = self

    def is_on(self, root: nn.Module) -> bool:
        return root.__dict__.get(_KEY) is self

    def drop_from(self, root: nn.Module) -> None:
        del root.__dict__[_KEY]
        if self.results.is_opened:  # for whom is attached before `accumulating` or `serving` ends
            root.__dict__[_OPEN] = self.results


def record_on(root: nn.Module) -> AdaptedModel | None:
    """The record of a root that something is attached to; None of any other module."""
    return root.__dict__.get(_KEY)


def kind_problem(model: object) -> Problem | None:
    """Why `model` is no model, or None if it is one."""
    if isinstance(model, nn.Module):
        return None
    found = f"the class {model.__name__}" if isinstance(model, type) else clip(model)
    return Problem("model", "a torch.nn.Module", found, "Pass the model itself.")


def find(model: nn.Module) -> tuple[nn.Module, AdaptedModel] | None:
    """The adapted root in `model` (itself, or inside wrappers such as DistributedDataParallel) and its state.

    Raises AttachError where two parts of `model` are adapted on their own, or it is no model.
    """
    problem = None if isinstance(model, nn.Module) else kind_problem(model)
    if problem is not None:
        raise AttachError(problem)
    mark(model)
    roots = {name: (module, module.__dict__[_KEY]) for name, module in model.named_modules() if _KEY in module.__dict__}
    if len(roots) > 1:
        parts = ", ".join(f"'{name}'" for name in roots)
        raise AttachError(Problem("model", "one adapted model", f"several, at {parts}", "Pass the part that is meant."))
    for root, state in roots.values():
        if "places" not in vars(state):
            _check_places(root, state)
    return next(iter(roots.values()), None)


def _check_places(root: nn.Module, state: AdaptedModel) -> None:
    """Raises AttachError for an old pickle, in which acting copies have the plain names."""
    tied = [names for record in state.adapters.values() for names in (*record.trained, *record.statistics)]
    keys = {name.rpartition(".")[2] for names in tied for name in names}
    if any(is_parked_unmade(module, keys) for module in root.modules()):
        fix = "Write the adapter with `tnpeft.save` in the version that pickled it, and load it onto the base here."
        found = "biases, norms or statistics in the places of an earlier version"
        raise AttachError(Problem("the pickled model", "one of this version, or cores alone", found, fix))
    state.places = 2


def adapted(model: nn.Module) -> tuple[nn.Module, AdaptedModel]:
    """The adapted root in `model` and its state. Raises AttachError where nothing is attached."""
    found = find(model)
    if found is None:
        fix = "Attach one with `tnpeft.attach`, or pass the whole model that it was attached to."
        raise AttachError(Problem("model", "an attached adapter", "none", fix))
    return found


def known_adapter(state: AdaptedModel, name: object) -> AdapterRecord:
    """The record of the adapter `name`. Raises AttachError with a near miss."""
    record = state.adapters.get(name) if isinstance(name, str) else None
    if record is None:
        known = ", ".join(f"'{known}'" for known in state.adapters)
        fix = near_miss(str(name), state.adapters) or "Use one of these names."
        raise AttachError(Problem("adapter name", f"one of {known}", clip(name), fix))
    return record
