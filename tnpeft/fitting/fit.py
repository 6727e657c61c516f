"""`fit`: the cores of a spec that come nearest to a given full weight update."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.base_weight import base_weight
from tnpeft.adapters.dora import magnitudes
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.errors import BindError, Problem
from tnpeft.execution import AdaptedLayer
from tnpeft.fitting import problem as fitting_problem
from tnpeft.fitting.arguments import check_frozen_copy, check_method, checked
from tnpeft.fitting.descent import Descent, adam, alternate, balanced, quasi_newton
from tnpeft.fitting.mapped import linear_cores
from tnpeft.fitting.problem import Cores
from tnpeft.fitting.setup import FACTOR, build_problem, build_problem_with_factor, vector_of_channels
from tnpeft.fitting.slices import fit_slices
from tnpeft.fitting.start import random_start, tree_start
from tnpeft.network import Network, Spec, load_spec
from tnpeft.spec.inits import SINGULAR_INITS

__all__ = ["Fit", "FrozenCopy", "Method", "fit", "fit_adapter"]

Method = Literal["auto", "als", "adam"]
FrozenCopy = Literal["zeros", "drawn"]

SWEEPS, STEPS = 100, 2000  # by default, of alternating least squares and of Adam
STARTS = 3  # random ones beside the adapter's own, where no singular vectors are at hand
MANY, SMALL = 15, 2**12  # more of them for a target of so few elements, while none has led to an exact fit
TRIAL = 15  # sweeps from each start before the best goes on
TOLERANCE = 1e-6
TURNS, ENOUGH = 6, 1e-3  # of L-BFGS and least squares, while a turn brings so much
GOOD = 1e-6  # a relative error that needs no polishing


@dataclass(frozen=True)
class Fit:
    """An adapter fitted to a full update, `delta`.

    `error` is |dW - delta| / |delta| in Frobenius norms, with the cores as the adapter holds them. `method` says what
    found them. `sweeps` says how often each core was solved for (with Adam: the number of steps). `history` has the
    relative error before the first sweep and after each.
    """

    adapter: Adapter
    error: float
    method: str
    sweeps: int
    history: tuple[float, ...]

    @property
    def relative_error(self) -> float:
        """`error` under its full name."""
        return self.error

    @property
    def captured(self) -> float:
        """The share of delta's energy (its squared norm) that the adapter's update captures: 1 - error²."""
        return max(0.0, 1.0 - self.error**2)

    @property
    def frozen_copy(self) -> FrozenCopy | None:
        """With `start: frozen_copy`: whether the frozen copy is `zeros`, or `drawn` as an init draws it; else None."""
        if self.adapter.network.start == "zero":
            return None
        return "drawn" if any(bool(core.any()) for core in self.adapter.start.values()) else "zeros"

    def __str__(self) -> str:
        network = self.adapter.network
        return (
            f"{network.spec.name} on {network.layer}, {network.num_parameters:,} parameters: relative error "
            f"{self.error:.3e} ({self.captured:.2%} of the energy) by {self.method}, sweeps {self.sweeps}"
            + {None: "", "zeros": ", frozen copy of zeros", "drawn": ", frozen copy as drawn"}[self.frozen_copy]
        )


def fit(
    spec: Spec | str,
    delta: Tensor,
    layer: Any,
    *,
    method: Method = "auto",
    iterations: int | None = None,
    frozen_copy: FrozenCopy | None = None,
    seed: int | None = None,
    name: str = "",
    **params: Any,
) -> Fit:
    """Fit a spec to a full update of a layer's weight, for example of a fine-tuned checkpoint minus its base.

    `delta` has the shape of the layer's weight. `layer` is a `torch.nn` layer, a `Layer`, or the name of a kind of
    layer with its sizes among `params`, as in `Spec.bind`. The work is done in float64 on delta's device. `als` is
    alternating least squares, one core at a time. `adam` takes gradient steps. `auto` starts with alternating least
    squares; where they slow down in a flat valley, L-BFGS goes on. Cores behind nonlinear maps, and cores that occur
    twice in a term, are found by L-BFGS; `als` leaves them as they are. Their fit is not convex, and `error` says what
    is left. A network that is a tree starts from singular vectors, so that one of two cores (LoRA) gets the best fit
    there is. Other networks end in a local minimum, the best that a few starts lead to.

    With `start: frozen_copy` the frozen copy is chosen as well: zeros, with which the network is as free as with
    `start: zero`, or the copy that inits draw, where that comes nearer. `frozen_copy="zeros"` or `"drawn"` fixes the
    choice. With `"drawn"` the fit says how much of the update training could reach from its usual start.

    `iterations` bounds the sweeps (100) or Adam's steps (2000). Equal arguments give equal bits; `seed` and `name` are
    those of `compile`.

    Raises SpecError and BindError.
    """
    check_method(method, iterations)
    check_frozen_copy(frozen_copy)
    spec = spec if isinstance(spec, Spec) else load_spec(spec)
    layer = layer.base if isinstance(layer, AdaptedLayer) else layer
    network = spec.bind(layer.signature if isinstance(layer, ParameterLayer) else layer, **params)
    delta = checked(delta, network.layer.stored_shape)
    if not isinstance(layer, nn.Module) or base_weight(layer, network).is_meta:
        layer = _stand_in(network, delta, layer)
    adapter = Adapter(network, layer, seed=seed, name=name)
    weight = base_weight(layer, network)
    return fit_adapter(adapter, weight, delta, method=method, iterations=iterations, frozen_copy=frozen_copy)


def _stand_in(network: Network, delta: Tensor, layer: object) -> nn.Module:
    """A layer of the update's type and shape, for a network that does not need the base weight's values."""
    readers = (*SINGULAR_INITS, "largest", "smallest")
    cores = [core for core in network.cores if core.origin is not None or core.init.name in readers]
    if network.compose is not None or cores:
        reader = "`compose`" if network.compose is not None else f"core '{cores[0].name}'"
        found = "a layer on the meta device" if isinstance(layer, nn.Module) else f"only its signature, {network.layer}"
        fix = "Pass the layer itself, with its base weight."
        raise BindError(
            Problem(f"layer, for {reader} of '{network.spec.name}'", "the base weight's values", found, fix)
        )
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros_like(delta), requires_grad=False)
    return module


def fit_adapter(
    adapter: Adapter,
    weight: Tensor,
    delta: Tensor,
    *,
    method: Method = "auto",
    iterations: int | None = None,
    frozen_copy: FrozenCopy | None = None,
) -> Fit:
    """Fit an adapter that has its initial values, in place; `weight` is its layer's base weight. Raises BindError."""
    check_method(method, iterations)
    check_frozen_copy(frozen_copy)
    delta = checked(delta, adapter.network.layer.stored_shape).detach()
    if not bool(delta.any()):
        return Fit(adapter, 0.0, "start", 0, (0.0,))
    if adapter.network.slice_network is not None:

        def fit_slice(part: Adapter, part_weight: Tensor, part_delta: Tensor) -> tuple[float, str, int]:
            fitted = fit_adapter(
                part, part_weight, part_delta, method=method, iterations=iterations, frozen_copy=frozen_copy
            )
            return fitted.error, fitted.method, fitted.sweeps

        error, said, sweeps = fit_slices(adapter, weight, delta, fit_slice)
        return Fit(adapter, error, said, sweeps, (error,))
    steps = iterations if iterations is not None else STEPS if method == "adam" else SWEEPS
    # Some descents take gradients, wherever they are asked for; a tensor of inference mode has none.
    with torch.inference_mode(False), torch.enable_grad():
        delta = (delta.cpu() if delta.device.type not in ("cpu", "cuda") else delta).to(torch.float64, copy=True)
        before = [(parameter, parameter.detach().clone()) for parameter in adapter.parameters()]
        copy = {name: core.clone() for name, core in adapter.start.items()}
        fitted = _fitted(adapter, weight, delta, method, steps, frozen_copy)
        if fitted.error < 1:
            return fitted
        # Rounded to the adapter's own type, a small change of large cores may be worse than none.
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        _keep(adapter, {}, copy)
        return Fit(adapter, 1.0, "start", 0, (1.0,))


class _Trial(NamedTuple):
    """A possible frozen copy (none with `start: zero`), and the descent from it."""

    start: Cores
    problem: fitting_problem.Problem
    descent: Descent


def _fitted(
    adapter: Adapter, weight: Tensor, delta: Tensor, method: Method, steps: int, frozen_copy: FrozenCopy | None
) -> Fit:
    with_factor = adapter.magnitude is not None
    _refuse_als(adapter.network, method)
    curved = bool(_curved(adapter.network))
    first = "als" if with_factor and not curved else method
    trial = _best_trial(adapter, weight, delta, first, steps, frozen_copy)
    if with_factor:
        descent, said, error = _with_factor(adapter, weight, delta, trial, method, steps)
    else:
        descent, said = _finished(trial.problem, trial.descent, method, steps)
        _keep(adapter, descent.cores, trial.start)
        error = trial.problem.error(_held(adapter, trial.problem))
    return Fit(adapter, error, said, len(descent.errors) - 1, tuple(descent.errors))


def _best_trial(
    adapter: Adapter, weight: Tensor, delta: Tensor, method: Method, steps: int, frozen_copy: FrozenCopy | None
) -> _Trial:
    """The nearest of two ways, as the adapter would store it: with a frozen copy of zeros, and with the copy as it is.

    A copy of zeros subtracts nothing, and leaves the network as free as with `start: zero`. The copy as drawn is right
    for an update that training made from it; of any other update the network then reaches little.
    """
    drawn = {name: core.to(delta.device, torch.float64) for name, core in adapter.start.items()}
    zeros = {name: torch.zeros_like(core) for name, core in drawn.items()}
    copies = [zeros, drawn] if any(bool(core.any()) for core in drawn.values()) else [drawn]
    if frozen_copy is not None:
        copies = [zeros if frozen_copy == "zeros" else drawn]
    trials: list[tuple[float, _Trial]] = []
    for copy in copies:
        problem = build_problem(adapter, weight, delta, copy)
        descent = _tried(problem, _starts(problem, _held(adapter, problem), copy is zeros), method, steps)
        trials.append((problem.error(_stored(adapter, descent.cores)), _Trial(copy, problem, descent)))
        if trials[-1][0] < GOOD:
            break
    return min(trials, key=lambda trial: trial[0])[1]


def _with_factor(
    adapter: Adapter, weight: Tensor, delta: Tensor, trial: _Trial, method: Method, steps: int
) -> tuple[Descent, str, float]:
    """`compose: dora`: first the network alone, then with a factor for each channel, which gives the magnitude."""
    network, magnitude, plain = adapter.network, adapter.magnitude, trial.problem
    problem = build_problem_with_factor(adapter, weight, delta, trial.start)
    assert magnitude is not None
    ones = problem.target.new_ones(problem.shapes[FACTOR])
    first = _finished(plain, trial.descent, "als" if plain.multilinear else method, steps)[0]
    # What scales each channel of the base weight alone nearest to its target, or leaves it as it is.
    base = problem.terms[-1].fixed[0][0]
    along = (base * problem.target).reshape(ones.numel(), -1).sum(1) / base.square().reshape(ones.numel(), -1).sum(1)
    scaled = torch.where(along.isfinite() & (along != 0), along, 1.0).reshape(ones.shape)
    factors = ({**first.cores, FACTOR: factor} for factor in (ones, scaled))
    descent, said = _finished(problem, _tried(problem, factors, method, steps), method, steps)
    _keep(adapter, {name: core for name, core in descent.cores.items() if name != FACTOR}, trial.start)
    held = {**_held(adapter, plain), FACTOR: ones}
    norms = vector_of_channels(network, problem.value(held).reshape(ones.numel(), -1).norm(dim=1))
    factor = vector_of_channels(network, descent.cores[FACTOR])
    # A channel of zeros has no direction: its magnitude acts as a factor that starts as one.
    moves = magnitudes(network.layer, weight.detach()).to(norms) > 0
    with torch.no_grad():
        magnitude.copy_(torch.where(moves, factor * norms, factor - 1))
    stored = magnitude.detach().to(norms)
    safe = torch.where(norms > 0, norms, 1.0)
    kept = ones.flatten().clone()
    kept[: len(stored)] = torch.where(moves, stored / safe, stored + 1)
    return descent, said, problem.error({**held, FACTOR: kept.reshape(ones.shape)})


def _keep(adapter: Adapter, cores: Cores, start: Cores) -> None:
    with torch.no_grad():
        for name, value in cores.items():
            adapter.cores[name].copy_(value)
    holders = adapter.shared
    for name, value in start.items():  # by way of its module, which forgets what was made of the earlier copy
        holders.get(name, adapter).load_state_dict({f"start_{name}": value}, strict=False)


def _held(adapter: Adapter, problem: fitting_problem.Problem) -> Cores:
    """The adapter's cores as they are."""
    device = problem.target.device
    return {name: adapter.cores[name].detach().to(device, torch.float64) for name in problem.shapes if name != FACTOR}


def _stored(adapter: Adapter, cores: Cores) -> Cores:
    """The cores as the adapter would store them."""
    return {name: core.to(adapter.cores[name].dtype).to(core.dtype) for name, core in cores.items()}


def _starts(problem: fitting_problem.Problem, own: Cores, both_ends: bool) -> Iterator[Cores]:
    """Starts: singular vectors, or the adapter's own start and random ones; one is enough for a single core.

    Cores are solved for in their order, one of zeros first. With `both_ends` the adapter's own start is also tried in
    reverse order.
    """
    tree = tree_start(problem)
    yield own if tree is None else tree
    if tree is None and (len(problem.shapes) > 1 or problem.curved):
        many = MANY if problem.target.numel() <= SMALL else STARTS
        yield from (random_start(problem, seed) for seed in range(many))
        if both_ends:
            last = list(problem.shapes)[-1]
            yield {**own, last: torch.zeros_like(own[last])}


def _tried(problem: fitting_problem.Problem, starts: Iterable[Cores], method: Method, steps: int) -> Descent:
    """The start with the least error after a few sweeps, and these sweeps; for Adam, which has one start, all steps.

    Behind nonlinear maps a few sweeps tell little: for small targets every start is followed to its end.
    """
    if not problem.shapes:  # `compose: dora` may train its magnitude alone
        return Descent({}, [problem.error({})], done=True)
    descents = (_begun(problem, start) for start in starts)
    if method == "adam":
        # From a start with zeros, half the gradients would be zero: the random ones come last.
        few = list(itertools.islice(descents, STARTS + 1))[-STARTS:]
        return adam(problem, min(few, key=lambda descent: descent.error), steps)
    sweeps = min(TRIAL, steps)
    to_the_end = method == "auto" and problem.curved and problem.target.numel() <= SMALL
    best: Descent | None = None
    for start in descents:
        descent = _few_sweeps(problem, start, method, sweeps)
        if to_the_end and descent.error >= GOOD:
            descent = _in_turns(problem, descent, steps)[0]
        best = descent if best is None else min(best, descent, key=lambda one: one.error)
        if best.error < GOOD:
            break
    assert best is not None
    return best


def _few_sweeps(problem: fitting_problem.Problem, start: Descent, method: Method, sweeps: int) -> Descent:
    """Least squares for the cores that they can solve for; then, if there are others, some steps of all cores."""
    descent = alternate(problem, start, sweeps, TOLERANCE)
    if method == "als" or not problem.curved or descent.error < GOOD:
        return descent
    return quasi_newton(problem, descent, sweeps)


def _finished(problem: fitting_problem.Problem, best: Descent, method: Method, steps: int) -> tuple[Descent, str]:
    """The rest of the descent, and the methods that made it."""
    if method == "adam":
        return best, "adam"
    if method == "auto" and problem.curved:
        return _in_turns(problem, best, steps)
    if not best.done:
        best = alternate(problem, best, steps - min(TRIAL, steps), TOLERANCE)
    if method == "als" or best.done or best.error < GOOD:
        return best, "als"
    polished = quasi_newton(problem, best, steps)
    return (polished, "als, l-bfgs") if polished.error < best.error else (best, "als")


def _in_turns(problem: fitting_problem.Problem, best: Descent, steps: int) -> tuple[Descent, str]:
    """Steps of all cores, and least squares where they apply, in turn, until neither helps much."""
    for _ in range(TURNS):
        before = best.error
        best = quasi_newton(problem, best, steps)
        if best.error < GOOD:
            break
        best = alternate(problem, best, min(TRIAL, steps), TOLERANCE)
        if best.error < GOOD or best.error > before * (1 - ENOUGH):
            break
    return best, "als, l-bfgs" if problem.solved_for else "l-bfgs"


def _curved(network: Network) -> tuple[str, ...]:
    """The trained cores that least squares cannot solve for."""
    linear = linear_cores(network)
    return tuple(core.name for core in network.cores if not core.frozen and core.name not in linear)


def _refuse_als(network: Network, method: Method) -> None:
    """Raises BindError for `als` with a spec in which it would leave every core as it is."""
    if method != "als" or linear_cores(network) or not (curved := _curved(network)):
        return
    what = f"`method`, for spec '{network.spec.name}'"
    found = f"'als', and '{curved[0]}' behind a map that is not linear, or twice in a term"
    raise BindError(
        Problem(what, "auto or adam: least squares find cores that the update is linear in", found, "Leave it out.")
    )


def _begun(problem: fitting_problem.Problem, cores: Cores) -> Descent:
    cores = balanced(problem, cores)
    return Descent(cores, [problem.error(cores)])
