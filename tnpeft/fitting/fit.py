"""`fit`: the cores of a spec that come nearest to a given full weight update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tnpeft.errors import BindError, Problem
from tnpeft.fitting import problem as posed
from tnpeft.fitting.descent import Descent, adam, alternate, balanced, quasi_newton
from tnpeft.fitting.setup import pose
from tnpeft.fitting.start import random_start, tree_start
from tnpeft.modules import AdaptedLayer, Adapter
from tnpeft.spec import Spec, load_spec
from tnpeft.spec.document import clip

__all__ = ["Fit", "Method", "check_method", "fit", "fit_adapter"]

Method = Literal["auto", "als", "adam"]

SWEEPS, STEPS = 100, 2000  # by default, of alternating least squares and of Adam
STARTS = 3  # random ones beside the adapter's own, where no singular vectors are at hand
TRIAL = 15  # sweeps from each start before the best goes on
TOLERANCE = 1e-6
GOOD = 1e-6  # a relative error that needs no polishing


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
    /,
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
    weight = layer.weight if isinstance(layer, nn.Module) else torch.empty_like(delta)
    if weight.device.type == "meta":
        weight = torch.empty_like(delta, dtype=weight.dtype)
    adapter = Adapter(network, weight, seed=seed, name=name)
    return fit_adapter(adapter, delta, method=method, iterations=iterations)


def fit_adapter(adapter: Adapter, delta: Tensor, *, method: Method = "auto", iterations: int | None = None) -> Fit:
    """Fit an adapter that has its initial values, in place. Raises BindError."""
    check_method(method, iterations)
    delta = _checked(delta, adapter.network.layer.stored_shape).detach()
    delta = (delta.cpu() if delta.device.type not in ("cpu", "cuda") else delta).to(torch.float64)
    if not bool(delta.any()):
        return Fit(adapter, 0.0, "start", 0, (0.0,))
    problem = pose(adapter, delta)
    steps = iterations if iterations is not None else STEPS if method == "adam" else SWEEPS
    found, said = _descend(problem, _own_start(adapter, problem), method, steps)
    for core, value in found.cores.items():
        with torch.no_grad():
            adapter.cores[core].copy_(value)
    stored = {core: adapter.cores[core].detach().to(delta.device, torch.float64) for core in found.cores}
    return Fit(adapter, problem.error(stored), said, len(found.errors) - 1, tuple(found.errors))


def _own_start(adapter: Adapter, problem: posed.Problem) -> posed.Cores:
    """The adapter's initial cores."""
    return {name: adapter.cores[name].detach().to(problem.target.device, torch.float64) for name in problem.shapes}


def _descend(problem: posed.Problem, own: posed.Cores, method: Method, steps: int) -> tuple[Descent, str]:
    """The best cores found, and what found them."""
    tree = tree_start(problem)
    starts = [tree] if tree is not None else [own, *(random_start(problem, seed) for seed in range(STARTS))]
    descents = [_begun(problem, start) for start in starts]
    if method == "adam":
        # From its own start with zeros, half the gradients would be zero.
        return adam(problem, min(descents[-STARTS:], key=lambda descent: descent.error), steps), "adam"
    trial = min(TRIAL, steps)
    tried = [alternate(problem, descent, trial, TOLERANCE) for descent in descents]
    best = min(tried, key=lambda descent: descent.error)
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
    if delta.device.type == "meta" or not bool(torch.isfinite(delta).all()):
        found = "none (it is on the meta device)" if delta.device.type == "meta" else "nan or inf"
        raise BindError(Problem("delta", "finite numbers", found, "Check both weights: training may have diverged."))
    return delta


def check_method(method: object, iterations: object) -> None:
    if method not in ("auto", "als", "adam"):
        fix = "Leave it out, or choose one of them."
        raise BindError(Problem("`method`", "one of auto, als, adam", clip(method), fix))
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1):
        fix = "For example `iterations=100`."
        raise BindError(Problem("`iterations`", "a positive whole number", clip(iterations), fix))
