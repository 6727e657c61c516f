"""How a fit descends: alternating least squares, and gradients of the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tnpeft.fitting.problem import RIDGE, Cores, Problem

__all__ = ["Descent", "adam", "alternate", "balanced", "quasi_newton"]

EXACT = 1e-12  # a relative error that counts as none
PATIENCE = 3  # sweeps in a row without progress
STIFFER, STIFFEST = 1e3, 1e-4  # the ridge grows so, and so far, where rounding spoils a sweep


@dataclass
class Descent:
    """The current cores, the relative error after each sweep or step, and whether more of them would help."""

    cores: Cores
    errors: list[float]
    done: bool = False

    @property
    def error(self) -> float:
        return self.errors[-1]


def alternate(problem: Problem, descent: Descent, sweeps: int, tolerance: float) -> Descent:
    """Alternating least squares: every sweep solves for each core once; then a step is tried in the same direction.

    It ends when a sweep no longer lowers the error by a share of `tolerance`. The error never rises: if surplus
    parameters leave a core to rounding, the sweep is undone and the ridge is raised. Cores behind nonlinear maps stay
    as they are.
    """
    if not problem.solved_for:
        return descent
    cores, errors, idle, ridge = dict(descent.cores), list(descent.errors), 0, RIDGE
    for _ in range(sweeps):
        before, last = dict(cores), errors[-1]
        if last < EXACT:
            return Descent(cores, errors, done=True)
        # A core of zeros first: while it is there, no other can be solved for.
        for name in sorted(problem.solved_for, key=lambda name: bool(cores[name].any())):
            cores[name] = problem.solved(cores, name, ridge)
        error = problem.error(cores)
        if error > last:
            ridge *= STIFFER
            cores, errors = before, [*errors, last]
            if ridge > STIFFEST:
                return Descent(cores, errors, done=True)
            continue
        if len(errors) > 2 and error > EXACT:
            cores, error = _further(problem, before, cores, error, len(errors))
        cores = balanced(problem, cores)
        errors.append(error)
        idle = idle + 1 if error > last * (1 - tolerance) else 0
        if error < EXACT or idle >= PATIENCE:
            return Descent(cores, errors, done=True)
    return Descent(cores, errors)


def _further(problem: Problem, before: Cores, cores: Cores, error: float, sweep: int) -> tuple[Cores, float]:
    """The cores extrapolated along their last step, if that is better (Bro 1998: by the cube root of the sweep)."""
    factor = sweep ** (1 / 3)
    guess = {name: before[name] + factor * (core - before[name]) for name, core in cores.items()}
    guessed = problem.error(guess)
    return (guess, guessed) if guessed < error else (cores, error)


def balanced(problem: Problem, cores: Cores) -> Cores:
    """Cores scaled to about equal size, so that every term keeps its value."""
    if not problem.multilinear:
        return cores
    names = list(cores)
    sizes = torch.tensor([float(core.square().mean()) for core in cores.values()], dtype=torch.float64).sqrt()
    if not bool((sizes > 0).all() & sizes.isfinite().all()):
        return cores
    uses = torch.tensor([[float(name in term.free) for name in names] for term in problem.terms], dtype=torch.float64)
    logs = sizes.log()
    # The nearest to -logs of all shifts that sum to zero in each term.
    shift = torch.linalg.pinv(uses) @ (uses @ logs) - logs
    return {name: core * float(factor) for (name, core), factor in zip(cores.items(), shift.exp(), strict=True)}


def adam(problem: Problem, descent: Descent, steps: int, rate: float = 0.02) -> Descent:
    """Adam on cores that are scaled to size one, with a cosine rate down to zero; returns the best cores seen."""
    scaled, parameters = _scaled(descent.cores)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, errors = Descent(descent.cores, []), list(descent.errors)
    lowest = descent.error
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(problem, scaled())
        loss.backward()  # type: ignore[no-untyped-call]
        error = math.sqrt(float(loss.detach()))
        if error < lowest:
            lowest, best = error, Descent(_detached(scaled()), [])
        errors.append(error)
        optimizer.step()
        schedule.step()
    last = _detached(scaled())
    error = problem.error(last)
    cores, lowest = (last, error) if error < lowest else (best.cores, lowest)
    return Descent(cores, [*errors[:-1], lowest], done=True)


def quasi_newton(problem: Problem, descent: Descent, steps: int) -> Descent:
    """L-BFGS on cores that are scaled to size one, for long flat valleys that stop alternating least squares."""
    scaled, parameters = _scaled(descent.cores)
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(problem, scaled())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    cores = _detached(scaled())
    error = problem.error(cores)
    if not error < descent.error:
        return Descent(descent.cores, descent.errors, done=True)
    return Descent(balanced(problem, cores), [*descent.errors, error])


def _loss(problem: Problem, cores: Cores) -> Tensor:
    """The square of the relative error."""
    return (problem.target - problem.value(cores)).square().sum() / problem.norm**2


def _scaled(cores: Cores) -> tuple[Callable[[], Cores], list[Tensor]]:
    """Parameters of size one for each core, and the way back to the cores."""
    sizes = {name: float(core.square().mean().sqrt()) or 1.0 for name, core in cores.items()}
    own = {name: (core / sizes[name]).detach().clone().requires_grad_(True) for name, core in cores.items()}
    return lambda: {name: tensor * sizes[name] for name, tensor in own.items()}, list(own.values())


def _detached(cores: Cores) -> Cores:
    return {name: core.detach() for name, core in cores.items()}
