"""`fit`: the cores of a spec that come nearest to a given full weight update."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tnpeft.errors import BindError, Problem
from tnpeft.fitting import problem as posed
from tnpeft.fitting.descent import Descent, adam, alternate, balanced, quasi_newton
from tnpeft.fitting.setup import FACTOR, pose, pose_with_factor, vector_of_channels
from tnpeft.fitting.start import random_start, tree_start
from tnpeft.modules import AdaptedLayer, Adapter
from tnpeft.modules.dora import magnitudes
from tnpeft.network import Network
from tnpeft.spec import Spec, load_spec
from tnpeft.spec.document import clip

__all__ = ["Fit", "Method", "check_method", "fit", "fit_adapter"]

Method = Literal["auto", "als", "adam"]

SWEEPS, STEPS = 100, 2000  # by default, of alternating least squares and of Adam
STARTS = 3  # random ones beside the adapter's own, where no singular vectors are at hand
MANY, SMALL = 15, 2**12  # more of them for a target of so few elements, while none has led to an exact fit
TRIAL = 15  # sweeps from each start before the best goes on
TOLERANCE = 1e-6
GOOD = 1e-6  # a relative error that needs no polishing
SMALLEST = 1e-100  # of an update's largest entry, and one over it


@dataclass(frozen=True)
class Fit:
    """An adapter fitted to a full update, `delta`.

    `error` is |dW - delta| / |delta| in Frobenius norms, of the cores as the adapter holds them; `method` says what
    found them, `sweeps` how often each core was solved for (with Adam: the steps), and `history` has the relative
    error before the first of them and after each.
    """

    adapter: Adapter
    error: float
    method: str
    sweeps: int
    history: tuple[float, ...]

    @property
    def relative_error(self) -> float:
        """`error` by its full name."""
        return self.error

    @property
    def captured(self) -> float:
        """The share of delta's energy (its squared norm) that the adapter makes."""
        return max(0.0, 1.0 - self.error**2)

    def __str__(self) -> str:
        network = self.adapter.network
        return (
            f"{network.spec.name} on {network.layer}, {network.num_parameters:,} parameters: relative error "
            f"{self.error:.3e} ({self.captured:.2%} of the energy) by {self.method}, sweeps {self.sweeps}"
        )


def fit(
    spec: Spec | str,
    delta: Tensor,
    layer: Any,
    *,
    method: Method = "auto",
    iterations: int | None = None,
    seed: int | None = None,
    name: str = "",
    **params: Any,
) -> Fit:
    """Fit a spec to a full update of a layer's weight, for example of a fine-tuned checkpoint minus its base.

    `delta` has the shape of the layer's weight. `layer` is a `torch.nn` layer, a `Layer`, or a kind by name with its
    numbers among `params`, as in `Spec.bind`. The work is done in float64 on delta's device: `als` alternates least
    squares, one core at a time; `adam` takes gradient steps; `auto` polishes by L-BFGS what alternating least squares
    leave in a flat valley. A network that is a tree starts from singular vectors, so that one of two cores (LoRA)
    gets the best fit there is. `iterations` bounds the sweeps (100) or Adam's steps (2000). Equal arguments give
    equal bits; `seed` and `name` are those of `compile`.

    Raises SpecError and BindError.
    """
    check_method(method, iterations)
    spec = spec if isinstance(spec, Spec) else load_spec(spec)
    layer = layer.base if isinstance(layer, AdaptedLayer) else layer
    network = spec.bind(layer, **params)
    delta = _checked(delta, network.layer.stored_shape)
    if not isinstance(layer, nn.Module) or layer.weight.device.type == "meta":
        layer = _stand_in(network, delta, layer)
    adapter = Adapter(network, layer, seed=seed, name=name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return fit_adapter(adapter, weight, delta, method=method, iterations=iterations)


def _stand_in(network: Network, delta: Tensor, layer: object) -> nn.Module:
    """A layer of the update's type and shape, for a network that needs nothing of the base weight's values."""
    cores = [core for core in network.cores if core.origin is not None or core.init.name.startswith("svd_")]
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
    adapter: Adapter, weight: Tensor, delta: Tensor, *, method: Method = "auto", iterations: int | None = None
) -> Fit:
    """Fit an adapter that has its initial values, in place; `weight` is its layer's base weight. Raises BindError."""
    check_method(method, iterations)
    delta = _checked(delta, adapter.network.layer.stored_shape).detach()
    if not bool(delta.any()):
        return Fit(adapter, 0.0, "start", 0, (0.0,))
    steps = iterations if iterations is not None else STEPS if method == "adam" else SWEEPS
    # Some descents take gradients, wherever they are asked for; a tensor of inference mode has none.
    with torch.inference_mode(False), torch.enable_grad():
        delta = (delta.cpu() if delta.device.type not in ("cpu", "cuda") else delta).to(torch.float64, copy=True)
        before = [(parameter, parameter.detach().clone()) for parameter in adapter.parameters()]
        fitted = _fitted(adapter, weight, delta, method, steps)
        if fitted.error < 1:
            return fitted
        # Rounded to the adapter's own type, a small change of large cores may be worse than none.
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        return Fit(adapter, 1.0, "start", 0, (1.0,))


def _fitted(adapter: Adapter, weight: Tensor, delta: Tensor, method: Method, steps: int) -> Fit:
    problem = pose(adapter, weight, delta)
    if adapter.magnitude is None:
        found, said = _descend(problem, _starts(problem, _held(adapter, problem)), method, steps)
        _keep(adapter, found.cores)
        error = problem.error(_held(adapter, problem))
    else:
        found, said, error = _with_factor(adapter, weight, delta, problem, method, steps)
    return Fit(adapter, error, said, len(found.errors) - 1, tuple(found.errors))


def _with_factor(
    adapter: Adapter, weight: Tensor, delta: Tensor, plain: posed.Problem, method: Method, steps: int
) -> tuple[Descent, str, float]:
    """`compose: dora`: first the network alone, then with a factor for each channel, which makes the magnitude."""
    network, magnitude = adapter.network, adapter.magnitude
    problem = pose_with_factor(adapter, weight, delta)
    assert magnitude is not None
    ones = problem.target.new_ones(problem.shapes[FACTOR])
    first = _descend(plain, _starts(plain, _held(adapter, plain)), "als", steps)[0] if plain.shapes else Descent({}, [])
    # What scales each channel of the base weight alone nearest to its target, or leaves it as it is.
    base = problem.terms[-1].fixed[0][0]
    along = (base * problem.target).reshape(ones.numel(), -1).sum(1) / base.square().reshape(ones.numel(), -1).sum(1)
    scaled = torch.where(along.isfinite() & (along != 0), along, 1.0).reshape(ones.shape)
    found, said = _descend(problem, [{**first.cores, FACTOR: factor} for factor in (ones, scaled)], method, steps)
    _keep(adapter, {name: core for name, core in found.cores.items() if name != FACTOR})
    held = {**_held(adapter, plain), FACTOR: ones}
    norms = vector_of_channels(network, problem.value(held).reshape(ones.numel(), -1).norm(dim=1))
    factor = vector_of_channels(network, found.cores[FACTOR])
    # A channel of zeros has no direction: its magnitude acts as a factor that starts as one.
    moves = magnitudes(network.layer, weight.detach()).to(norms) > 0
    with torch.no_grad():
        magnitude.copy_(torch.where(moves, factor * norms, factor - 1))
    stored = magnitude.detach().to(norms)
    safe = torch.where(norms > 0, norms, 1.0)
    kept = ones.flatten().clone()
    kept[: len(stored)] = torch.where(moves, stored / safe, stored + 1)
    return found, said, problem.error({**held, FACTOR: kept.reshape(ones.shape)})


def _keep(adapter: Adapter, cores: posed.Cores) -> None:
    with torch.no_grad():
        for name, value in cores.items():
            adapter.cores[name].copy_(value)


def _held(adapter: Adapter, problem: posed.Problem) -> posed.Cores:
    """The adapter's cores as they are."""
    device = problem.target.device
    return {name: adapter.cores[name].detach().to(device, torch.float64) for name in problem.shapes if name != FACTOR}


def _starts(problem: posed.Problem, own: posed.Cores) -> Iterator[posed.Cores]:
    """Singular vectors, or the adapter's own start and random ones; one will do for a core that is alone."""
    tree = tree_start(problem)
    yield own if tree is None else tree
    if tree is None and len(problem.shapes) > 1:
        many = MANY if problem.target.numel() <= SMALL else STARTS
        yield from (random_start(problem, seed) for seed in range(many))


def _descend(problem: posed.Problem, starts: Iterable[posed.Cores], method: Method, steps: int) -> tuple[Descent, str]:
    """The best cores found, and what found them."""
    descents = (_begun(problem, start) for start in starts)
    if method == "adam":
        # From a start with zeros, half the gradients would be zero: the random ones come last.
        few = list(itertools.islice(descents, STARTS + 1))[-STARTS:]
        return adam(problem, min(few, key=lambda descent: descent.error), steps), "adam"
    trial = min(TRIAL, steps)
    best = alternate(problem, next(descents), trial, TOLERANCE)
    for descent in descents:
        if best.error < GOOD:
            break
        best = min(best, alternate(problem, descent, trial, TOLERANCE), key=lambda descent: descent.error)
    if not best.done:
        best = alternate(problem, best, steps - trial, TOLERANCE)
    if method == "als" or best.done or best.error < GOOD:
        return best, "als"
    polished = quasi_newton(problem, best, steps)
    return (polished, "als, l-bfgs") if polished.error < best.error else (best, "als")


def _begun(problem: posed.Problem, cores: posed.Cores) -> Descent:
    cores = balanced(problem, cores)
    return Descent(cores, [problem.error(cores)])


def _checked(delta: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(delta, Tensor):
        fix = "Pass the tuned weight minus the base weight."
        raise BindError(Problem("delta", "a tensor", clip(delta), fix))
    if tuple(delta.shape) != shape:
        fix = "Pass the tuned weight minus the base weight, as the layer stores them."
        raise BindError(Problem("delta", f"the shape of the layer's weight, {shape}", f"{tuple(delta.shape)}", fix))
    if not delta.is_floating_point():
        dtype = str(delta.dtype).removeprefix("torch.")
        raise BindError(Problem("delta", "floating-point numbers", dtype, "Convert it, for example by `.float()`."))
    if delta.layout is not torch.strided:
        layout = str(delta.layout).removeprefix("torch.")
        raise BindError(Problem("delta", "a dense tensor", layout, "Convert it by `.to_dense()`."))
    if delta.device.type == "meta" or not bool(torch.isfinite(delta).all()):
        found = "none (it is on the meta device)" if delta.device.type == "meta" else "nan or inf"
        raise BindError(Problem("delta", "finite numbers", found, "Check both weights: training may have diverged."))
    largest = float(delta.detach().abs().max())
    if largest and not SMALLEST < largest < 1 / SMALLEST:
        fix = "Scale both weights."
        raise BindError(Problem("delta", "numbers whose squares float64 can add up", f"{largest:.1e} at most", fix))
    return delta


def check_method(method: object, iterations: object) -> None:
    if method not in ("auto", "als", "adam"):
        fix = "Leave it out, or choose one of them."
        raise BindError(Problem("`method`", "one of auto, als, adam", clip(method), fix))
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1):
        fix = "For example `iterations=100`."
        raise BindError(Problem("`iterations`", "a positive whole number", clip(iterations), fix))
