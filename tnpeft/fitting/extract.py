"""`extract`: a full fine-tune as an adapter on its base model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.errors import AttachError, Problem, TnpeftError, clip, near_miss
from tnpeft.fitting.arguments import check_method
from tnpeft.fitting.fit import Fit, FrozenCopy, Method, fit_adapter
from tnpeft.network import Network, Spec
from tnpeft.recipe import Handle, Recipe, Train, attach
from tnpeft.recipe.report import printed
from tnpeft.schedule import DEFAULT_MODE
from tnpeft.surgery import (
    adapters_of,
    base_tensors,
    detach,
    find,
    model_problems,
    parameter_groups,
    record_of,
    statistics_of,
    trained_of,
)

__all__ = [
    "ExtractedLayer",
    "Extraction",
    "Unexplained",
    "check_tensors",
    "extract",
    "fitted_layer",
    "refuse_shared",
    "row_of",
]

_SHOWN = 3  # tensors named in an error


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer: the norm of its full update, and how well its adapter fits it.

    See `Fit`.
    """

    name: str
    layer: str
    spec: str
    parameters: int
    norm: float
    error: float
    captured: float
    method: str
    sweeps: int
    seconds: float
    frozen_copy: FrozenCopy | None = None


@dataclass(frozen=True)
class Unexplained:
    """A tensor that the fine-tune changed and the recipe does not cover, with the norm of its change."""

    name: str
    norm: float


@dataclass(frozen=True)
class Extraction:
    """The adapter that was made of a full fine-tune, and what it leaves out.

    `layers` are the adapted ones. `copied` names the biases, norms and statistics whose tuned values the adapter
    carries. `unexplained` has all other tensors that changed, the largest change first. `norm` is that of the whole
    change.
    """

    handle: Handle
    layers: tuple[ExtractedLayer, ...]
    copied: tuple[str, ...]
    unexplained: tuple[Unexplained, ...]
    norm: float

    @property
    def captured(self) -> float:
        """The share of the whole change's energy (its squared norm) that the adapter carries."""
        if not self.norm:
            return 1.0
        lost = sum((row.error * row.norm) ** 2 for row in self.layers) + sum(row.norm**2 for row in self.unexplained)
        return max(0.0, 1.0 - lost / self.norm**2)

    @property
    def missing(self) -> float:
        """The norm of all changes in `unexplained`."""
        return math.sqrt(sum(row.norm**2 for row in self.unexplained))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {
            "layers": [asdict(row) for row in self.layers],
            "copied": list(self.copied),
            "unexplained": [asdict(row) for row in self.unexplained],
            "norm": self.norm,
            "unexplained_norm": self.missing,
            "captured": self.captured,
        }

    def __str__(self) -> str:
        title = f"{len(self.layers)} layers, {self.captured:.2%} of the energy of the change"
        table = Table(title=title, title_justify="left")
        for heading in ("layer", "spec", "change", "error", "captured"):
            table.add_column(heading, justify="left" if heading in ("layer", "spec") else "right", overflow="fold")
        for row in self.layers:
            table.add_row(row.name, row.spec, f"{row.norm:.3e}", f"{row.error:.3e}", f"{row.captured:.2%}")
        return printed(table)


def extract(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    what: Recipe | Spec | str | Path,
    /,
    *,
    match: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] | None = None,
    layers: Any = None,
    ranks: Mapping[str, Mapping[str, float]] | None = None,
    parameters: str | Sequence[str] | Mapping[str, str] | None = None,
    name: str = "default",
    train: Train | Mapping[str, Any] | None = None,
    scopes: Mapping[str, str] | None = None,
    seed: int | None = None,
    mode: str = DEFAULT_MODE,
    autotune: bool = False,
    method: Method = "auto",
    iterations: int | None = None,
    progress: Callable[[ExtractedLayer, int, int], None] | None = None,
    **params: float,
) -> Extraction:
    """Turn a full fine-tune of `model` into an adapter on it; `save` then writes its file.

    `model` holds the base weights, and `tuned` is the fine-tune's state dict, which is read one tensor at a time.
    `method` and `iterations` are those of `fit`, the other arguments those of `attach`. For every layer that the recipe
    names, an adapter is fitted to the change of its weight. The biases and norms that the recipe trains, and the norms'
    running statistics, are copied. `progress` is called after each layer, with its result, its number and how many
    there are.

    Raises SpecError, BindError or AttachError; the model is then as it was.
    """
    check_method(method, iterations)
    if not isinstance(tuned, Mapping):
        fix = "Pass the state dict of the full fine-tune."
        raise AttachError(Problem("tuned checkpoint", "tensors by name", clip(tuned), fix))
    changes = _Changes(_plain(model), tuned)
    where: dict[str, Any] = {"match": match, "exclude": exclude, "kinds": kinds, "layers": layers, "ranks": ranks}
    where["parameters"] = parameters
    how: dict[str, Any] = {"seed": seed, "mode": mode, "autotune": autotune, **params}
    handle = attach(model, what, **where, name=name, train=train, scopes=scopes, **how)
    try:
        return _extracted(handle, changes, method, iterations, progress)
    except BaseException:
        detach(model)
        raise


def _plain(model: nn.Module) -> nn.Module:
    """The model, if it is a base model with values. Raises AttachError."""
    problems = [*model_problems(model)]
    if not problems and find(model) is not None:
        fix = "Detach the adapters first."
        problems.append(Problem("model", "the base model", "one with adapters attached", fix))
    if not problems and any(tensor.device.type == "meta" for tensor in base_tensors(model).values()):
        fix = "Load the base weights first."
        problems.append(Problem("model", "the base weights' values", "none (it is on the meta device)", fix))
    if problems:
        raise AttachError(*problems)
    return model


def check_tensors(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    groups: Iterable[tuple[str, ...]],
    what: str = "tuned checkpoint",
) -> None:
    """Raises AttachError unless names and shapes are those of the model; for a tied tensor one name is enough."""
    tied = {name: names for names in groups for name in names}
    missing = [name for name in base if not any(other in tuned for other in tied.get(name, (name,)))]
    odd = [name for name in tuned if name not in base]
    found = []
    if missing:
        found.append(f"no '{missing[0]}'" + (f" and {len(missing) - 1} others" if len(missing) > 1 else ""))
    if odd:
        found.append(f"'{odd[0]}'" + (f" and {len(odd) - 1} others" if len(odd) > 1 else "") + " too many")
    if found:
        fix = _prefix(missing, odd) or (near_miss(odd[0], base) if odd else "") or "Pass checkpoints of this model."
        raise AttachError(Problem(what, "the names of the model's tensors", "; ".join(found), fix))
    wrong: dict[str, str] = {}
    for name in tuned:
        value: object = tuned[name]
        if not isinstance(value, Tensor):
            wrong[name] = f"'{name}', a {type(value).__name__}"
        elif value.shape != base[name].shape:
            wrong[name] = f"'{name}' of shape {tuple(value.shape)}"
    if wrong:
        texts = list(wrong.values())[:_SHOWN]
        first = next(iter(wrong))
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        expected = f"the model's shapes, for '{first}' {tuple(base[first].shape)}"
        raise AttachError(Problem(what, expected, "; ".join(texts) + more, "Pass checkpoints of this model."))


def _prefix(missing: Sequence[str], odd: Sequence[str]) -> str:
    """The prefix that a wrapper put before every name, if there is one."""
    for name in odd[:1]:
        prefix = next((name.removesuffix(own) for own in missing if name.endswith(f".{own}")), None)
        if prefix:
            return f"Remove the prefix '{prefix}' from its names."
    return ""


def _extracted(
    handle: Handle,
    changes: _Changes,
    method: Method,
    iterations: int | None,
    progress: Callable[[ExtractedLayer, int, int], None] | None,
) -> Extraction:
    adapters = adapters_of(handle.model, handle.name)
    refuse_shared(adapters, "extract")
    _refuse_opaque(adapters)
    weights = {name: name if name in changes.base else f"{name}.weight" for name in adapters}
    rows: list[ExtractedLayer] = []
    for name, adapter in adapters.items():
        began = time.perf_counter()
        delta = changes.of(weights[name])
        fitted = fitted_layer(name, adapter, changes.base[weights[name]], delta, method, iterations)
        row = row_of(name, fitted, delta, time.perf_counter() - began)
        rows.append(row)
        if progress is not None:
            progress(row, len(rows), len(adapters))
    copied = tuple(_copy(handle, changes))
    unexplained, beside = changes.beside(weights.values(), copied)
    norm = math.hypot(beside, *(row.norm for row in rows))
    return Extraction(handle, tuple(rows), copied, unexplained, norm)


def _refuse_opaque(adapters: Mapping[str, Adapter]) -> None:
    """Raises AttachError for opaque layers: a checkpoint has no plain weight of theirs to read the update from."""
    hidden = [name for name, adapter in adapters.items() if adapter.network.layer.opaque]
    if hidden:
        fix = "Match other layers, or extract from the unquantised model."
        problem = Problem("extracting", "a weight that can be read", "an opaque layer", fix, layers=tuple(hidden))
        raise AttachError(problem)


def refuse_shared(adapters: Mapping[str, Adapter], verb: str) -> None:
    """Raises AttachError for trained cores that layers share; `verb` is what cannot be done with them."""
    for name, adapter in adapters.items():
        shared = [core for core in adapter.network.cores if core.shared and not core.frozen]
        if shared:
            core = shared[0].name
            raise AttachError(
                Problem(
                    f"spec '{adapter.network.spec.name}', core '{core}'",
                    "cores that each belong to one layer: layers are fitted one by one",
                    f"one shared by layers, such as '{name}'",
                    f"Freeze it (`frozen: true`), or {verb} with a spec without shared cores.",
                    core=core,
                )
            )


def fitted_layer(
    name: str, adapter: Adapter, weight: Tensor, delta: Tensor, method: Method, iterations: int | None
) -> Fit:
    """The adapter of a layer, fitted to an update of its weight. Raises AttachError that names the layer."""
    try:
        return fit_adapter(adapter, weight, delta, method=method, iterations=iterations)
    except TnpeftError as error:
        raise AttachError(*(replace(problem, layers=(name,)) for problem in error.problems)) from error


def row_of(name: str, fitted: Fit, delta: Tensor, seconds: float) -> ExtractedLayer:
    """The report's row for a layer that was fitted to an update."""
    network: Network = fitted.adapter.network
    norm = float(torch.linalg.vector_norm(delta))
    return ExtractedLayer(
        name,
        str(network.layer),
        network.spec.name,
        network.num_parameters,
        norm,
        fitted.error,
        fitted.captured,
        fitted.method,
        fitted.sweeps,
        seconds,
        fitted.frozen_copy,
    )


def _copy(handle: Handle, changes: _Changes) -> Iterator[str]:
    """Give the adapter the tuned values of all that trains beside the cores; returns all their names."""
    record = record_of(handle.model, handle.name)
    copies = {**trained_of(handle.model, handle.name), **statistics_of(handle.model, handle.name)}
    for names in (*record.trained, *record.statistics):
        with torch.no_grad():
            copies[names[0]].copy_(changes.tuned_value(names))
        yield from names


class _Changes:
    """The fine-tune minus the base, one tensor at a time in float64; it is made before anything is attached."""

    def __init__(self, model: nn.Module, tuned: Mapping[str, Tensor]) -> None:
        groups = parameter_groups(model)
        self.base = base_tensors(model)
        check_tensors(self.base, tuned, groups)
        self.tuned = tuned
        self.groups = {name: names for names in groups for name in names}

    def tuned_value(self, names: Sequence[str]) -> Tensor:
        """A tuned tensor by any of its names. Raises AttachError where training has diverged."""
        name = next(name for name in names if name in self.tuned)
        value = self.tuned[name]
        if not bool(torch.isfinite(value).all()):
            fix = "Choose an earlier checkpoint: training has diverged."
            raise AttachError(Problem(f"tuned tensor '{name}'", "finite numbers", "nan or inf", fix))
        return value

    def of(self, name: str) -> Tensor:
        base = self.base[name].detach()
        return self.tuned_value(self.groups.get(name, (name,))).to(base.device, torch.float64) - base.to(torch.float64)

    def beside(self, adapted: Iterable[str], copied: Iterable[str]) -> tuple[tuple[Unexplained, ...], float]:
        """Changes that nothing covers, and the norm of all changes but the adapted weights'. Counters are left out."""
        seen = {id(self.base[name]) for name in adapted}
        covered = set(copied)
        total, left = 0.0, []
        for name, tensor in self.base.items():
            if id(tensor) in seen or not tensor.is_floating_point():
                continue
            seen.add(id(tensor))
            norm = float(torch.linalg.vector_norm(self.of(name)))
            total += norm**2
            if norm and name not in covered:
                left.append(Unexplained(name, norm))
        return tuple(sorted(left, key=lambda row: -row.norm)), math.sqrt(total)
