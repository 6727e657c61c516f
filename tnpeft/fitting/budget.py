"""`budget`: the largest rank whose adapter trains at most a given number of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

from tnpeft.adapters import Captured
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.adapters.sharing import sharing_label
from tnpeft.errors import AttachError, BindError, Problem, clip, near_miss, ticked
from tnpeft.network import Layer, Network, Spec, layer_of
from tnpeft.recipe import Entry, Recipe, Train
from tnpeft.recipe.attachment import recipe_of
from tnpeft.recipe.model import train_from
from tnpeft.recipe.parameter_targets import signatures
from tnpeft.recipe.report import printed
from tnpeft.recipe.scopes import captures, scopes_from
from tnpeft.recipe.targets import targets, trained
from tnpeft.spec.habits import advice_on
from tnpeft.surgery import model_problems, plain_parameters
from tnpeft.surgery.parameters import bases_of

__all__ = ["Budget", "BudgetRow", "budget"]

LARGEST = 2**20  # no rank beyond it is tried
LOOK_AHEAD = 8  # ranks looked at before and beyond one that is found: counts need not grow with the rank
SHOWN = 3  # neighbours of the answer on each side


@dataclass(frozen=True)
class BudgetRow:
    """One rank: the elements of all cores, and of all that trains; `share` is relative to the budget."""

    value: int
    cores: int
    total: int
    share: float


@dataclass(frozen=True)
class Budget:
    """The largest adapter within a budget of trainable parameters.

    The answer is `value`, for the param `param` of every spec but the `fixed` ones. `cores`, `bias`, `norm` and `also`
    add up to `total`, in elements. `specs` has the value of `param` in each spec that has it, `rows` the counts at
    nearby ranks. If several params were solved for, `values` has each by name, `param` is the first name, and `value`
    is the rank that all have at least.
    """

    what: str
    param: str
    params: int
    value: int
    total: int
    cores: int
    bias: int
    norm: int
    also: int
    layers: int
    specs: Mapping[str, int | float]
    fixed: tuple[str, ...]
    rows: tuple[BudgetRow, ...]
    values: Mapping[str, int]

    @property
    def settings(self) -> dict[str, int]:
        """The params to pass to `attach`; with fixed specs, those to write for the other specs in the recipe."""
        return dict(self.values)

    def as_dict(self) -> dict[str, Any]:
        """The answer as plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = ", ".join(f"{param}={value}" for param, value in self.values.items())
        title = f"{self.what}: {ranks} trains {self.total:,} of {self.params:,}"
        table = Table(title=title, title_justify="left")
        for heading in (self.param, "cores", "total", "of the budget"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(f"{row.value}", f"{row.cores:,}", f"{row.total:,}", f"{row.share:.1%}")
        return printed(table, width=100)


def budget(
    what: Recipe | Spec | str | Path,
    model: nn.Module,
    params: int,
    /,
    *,
    match: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] | None = None,
    layers: Any = None,
    ranks: Mapping[str, Mapping[str, float]] | None = None,
    parameters: str | Sequence[str] | Mapping[str, str] | None = None,
    param: str | Sequence[str] = "r",
    fixed: Iterable[str] = (),
    train: Train | Mapping[str, Any] | None = None,
    scopes: Mapping[str, str] | None = None,
    **settings: float,
) -> Budget:
    """The largest value of a spec's param (its rank `r`) with which at most `params` parameters train.

    `what`, `match`, `exclude`, `kinds`, `layers`, `ranks`, `parameters`, `train` and `scopes` are those of `attach`,
    and `settings` its params. All specs of a recipe get the same value. The specs named in `fixed` keep the recipe's,
    and layers keep what `ranks` gives them. Biases, norms and whatever else the recipe trains count too; a core that
    layers share counts once.

    Several params, such as the ranks of a network's bonds, are solved for together: all get the largest equal value.
    Then each in turn, in the order of their names in `param`, gets one more while that fits. Only sizes are worked out:
    the model may be on the meta device.

    Raises SpecError, BindError or AttachError, also for a budget that not even rank 1 meets.
    """
    if isinstance(params, bool) or not isinstance(params, int) or params < 1:
        fix = "For example `params=600_000`."
        raise AttachError(Problem("budget", "a positive whole number of parameters", clip(params), fix))
    if problems := list(model_problems(model)):
        raise AttachError(*problems)
    names = _names(param)
    for name in names:
        if name in settings:
            fix = f"Leave `{name}=` out."
            raise AttachError(Problem("budget", f"`{name}` to be solved for", "a value for it", fix))
    selection = {"exclude": exclude, "kinds": kinds, "layers": layers, "ranks": ranks, "parameters": parameters}
    recipe = recipe_of(what, match, settings, **selection)
    recipe = recipe if train is None else replace(recipe, train=train_from(train))
    recipe = replace(recipe, scopes=scopes_from(scopes, recipe))
    fixed = tuple(fixed)
    for name in names:
        _check_names(recipe, name, fixed)
    counts = _Counts(model, recipe, names, fixed)
    return counts.answer(params)


def _names(param: object) -> tuple[str, ...]:
    """The params to solve for. Raises AttachError for what are no names, or one twice."""
    names = (param,) if isinstance(param, str) else tuple(param) if isinstance(param, list | tuple) else ()
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        fix = 'For example `param="r"`, or `param=["r_a", "r_b"]`.'
        raise AttachError(Problem("budget, `param`", "a param, or a list of different ones", clip(param), fix))
    return names


def _check_names(recipe: Recipe, param: str, fixed: Sequence[str]) -> None:
    names = list(dict.fromkeys(entry.spec.name for entry in recipe.entries))
    for name in fixed:
        if name not in names:
            fix = near_miss(name, names) or "Name a spec of the recipe."
            raise AttachError(Problem(f"fixed spec {clip(name)}", f"one of {', '.join(names)}", ticked(name), fix))
    free = [entry.spec for entry in recipe.entries if entry.spec.name not in fixed]
    known = sorted({known for spec in free for known in spec.params})
    if param not in known:
        expected = f"one of {', '.join(known)}" if known else "a spec with params that is not fixed"
        fix = advice_on(param, known) or "Name the param that sets the adapter's size."
        found = ticked(param) if known else "none"
        raise AttachError(Problem(f"recipe '{recipe.name}', param {clip(param)}", expected, found, fix))


class _Place(NamedTuple):
    """An adapted layer: all that determines the size and the sharing of its cores."""

    entry: Entry
    layer: Layer
    captured: Captured
    wide: bool
    own: Mapping[str, Any]  # params that the recipe gives to this layer


class _Counts:
    """What the recipe trains on the model at each value of the param; a spec is bound once to each kind of layer."""

    def __init__(self, model: nn.Module, recipe: Recipe, params: tuple[str, ...], fixed: tuple[str, ...]) -> None:
        self.recipe, self.params, self.param, self.fixed = recipe, params, params[0], fixed
        self.raised = 0  # how many of the params have one more than the value
        claimed = targets(model, recipe)
        bases = bases_of(model, signatures(model, claimed))
        also = trained(model, recipe.train, claimed)
        parameters = plain_parameters(model)
        sizes = {"bias": also.bias, "norm": also.norm, "also": also.also}
        self.beside = {
            reason: sum({id(parameters[name]): parameters[name].numel() for name in names}.values())
            for reason, names in sizes.items()
        }
        captured = captures(claimed, recipe.scopes)
        layers: dict[int, _Place] = {}
        for name, entry in claimed.items():
            base: Any = bases[name]
            wide = getattr(getattr(base, "weight", None), "dtype", None) == torch.float64
            own = entry.selection.params_at(name)
            layer = base.signature if isinstance(base, ParameterLayer) else layer_of(base)
            layers.setdefault(id(base), _Place(entry, layer, captured[name], wide, own))
        self.places = list(layers.values())
        self.known: dict[tuple[int, int], int | BindError] = {}
        self.bound: dict[tuple[Any, ...], Network] = {}

    def answer(self, params: int) -> Budget:
        smallest = self._smallest()
        if self._total(smallest) > params:
            found = f"{self._total(smallest):,} at {self.param}={smallest}, the least it takes"
            fix = f"Allow {self._total(smallest):,}, adapt fewer layers, or train fewer biases and norms."
            raise AttachError(Problem(f"budget of {params:,}", "room for the smallest adapter", found, fix))
        best = self._largest(smallest, params)
        if best is None:
            found = f"{self._total(smallest):,} at every {self.param}"
            fix = "Name another param."
            raise AttachError(Problem(f"param '{self.param}'", "one that changes the count", found, fix))
        self.raised = self._raised(best, params)
        return self._budget(best, params)

    def _raised(self, best: int, params: int) -> int:
        """How many params, in their order, can have one more than the rest."""
        count = 0
        for raised in range(1, len(self.params)):
            self.raised = raised
            if self._total(best) > params:
                break
            count = raised
        return count

    def _smallest(self) -> int:
        """The first value that every spec accepts."""
        for value in range(1, LOOK_AHEAD + 1):
            if not isinstance(self._count(value), BindError):
                return value
        error = self._count(1)
        assert isinstance(error, BindError)
        raise error

    def _largest(self, smallest: int, params: int) -> int | None:
        """Doubling, then halving; then nearby values are tried, in case counts fall again."""
        low, high = smallest, smallest + 1
        while self._total(high) <= params:
            low, high = high, high * 2
            if high > LARGEST:
                return self._most()
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._total(middle) <= params else (low, middle)
        tried = [*(value for value, _ in self.known), *range(max(1, low - LOOK_AHEAD), low + LOOK_AHEAD)]
        fits = [value for value in dict.fromkeys(tried) if self._total(value) <= params]
        # Of equal counts the smallest value: a greater one would add nothing.
        best: int = max(fits, key=lambda value: (self._total(value), -value))
        return best

    def _most(self) -> int | None:
        """If every value fits, the smallest of those that train the most; None if all train equally many."""
        tried = dict.fromkeys(value for value, _ in self.known)
        totals = {value: self._total(value) for value in tried if self._total(value) != float("inf")}
        most = max(totals.values())
        high = min(value for value, total in totals.items() if total == most)
        low = max((value for value in totals if value < high), default=0)
        if most == min(totals.values()):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._total(middle) == most else (middle, high)
        return high

    def _total(self, value: int) -> float:
        """All that trains; infinite where a spec does not take the value."""
        count = self._count(value)
        return float("inf") if isinstance(count, BindError) else count + sum(self.beside.values())

    def _count(self, value: int) -> int | BindError:
        """The elements of all cores."""
        key = (value, self.raised)
        if key not in self.known:
            try:
                self.known[key] = self._counted(value)
            except BindError as error:
                self.known[key] = error
        return self.known[key]

    def _values(self, value: int) -> dict[str, int]:
        """Each param's value."""
        return {param: value + (place < self.raised) for place, param in enumerate(self.params)}

    def _counted(self, value: int) -> int:
        total = 0
        shared: dict[tuple[Any, ...], int] = {}
        for place in self.places:
            network = self._network(place, value)
            total += network.num_parameters
            for core in network.cores:
                if core.shared is not None and not core.frozen:
                    total -= core.numel
                    label = sharing_label(network.spec, core, place.captured)
                    shared[network.spec, core.name, label, core.shape, place.wide] = core.numel
        return total + sum(shared.values())

    def _network(self, place: _Place, value: int) -> Network:
        entry, own = place.entry, place.own
        known = () if entry.spec.name in self.fixed else entry.spec.params.keys() - own.keys()
        varies = {param: rank for param, rank in self._values(value).items() if param in known}
        key = (id(entry), place.layer, *varies.items(), None, *own.items())
        if key not in self.bound:
            self.bound[key] = entry.spec.bind(place.layer, **{**entry.params, **own, **varies})
        return self.bound[key]

    def _budget(self, best: int, params: int) -> Budget:
        near = range(max(1, best - SHOWN), best + SHOWN + 1)
        beside = sum(self.beside.values())
        values, cores = self._values(best), self._count(best)
        assert isinstance(cores, int)
        self.raised = 0
        counted = {value: count for value in near if not isinstance(count := self._count(value), BindError)}
        rows = tuple(
            BudgetRow(value, count, count + beside, (count + beside) / params) for value, count in counted.items()
        )
        specs: dict[str, int | float] = {}
        for entry in self.recipe.entries:
            if self.param in entry.spec.params and entry.spec.name not in self.fixed:
                specs[entry.spec.name] = best
            elif self.param in entry.spec.params:
                layer = next(place.layer for place in self.places if place.entry is entry)
                specs[entry.spec.name] = entry.spec.bind(layer, **entry.params).params[self.param]
        return Budget(
            self.recipe.name,
            self.param,
            params,
            best,
            cores + beside,
            cores,
            **self.beside,
            layers=len(self.places),
            specs=specs,
            fixed=self.fixed,
            rows=rows,
            values=values,
        )
