"""The least-squares problem of a network with derived cores: its terms contract factors, made from the free cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnpeft.fitting.problem import CG_STEPS, CG_TOLERANCE, RIDGE, Cores, Problem, direct
from tnpeft.network import Network
from tnpeft.program.derived import build_derivations

__all__ = ["MappedProblem", "factors_of", "linear_cores"]


LARGEST_CORE, LARGEST_MATRIX = 512, 2**22  # elements of a core, and of all that they make, written out


def factors_of(network: Network, stored: Mapping[str, Tensor]) -> Cores:
    """The factors of a network's terms, by label, from all stored cores by name."""
    derivations = build_derivations(network)
    layered = {core.name: stored[core.name].unsqueeze(0) for core in network.cores}
    derived = derivations.values(layered, network.derived)
    layered |= {core.name: tensor for core, tensor in zip(network.derived, derived, strict=True)}
    pairs = zip(network.factors, derivations.factors(layered), strict=True)
    return {factor.label: tensor.squeeze(0) for factor, tensor in pairs}


def linear_cores(network: Network) -> tuple[str, ...]:
    """The trained cores in which T is linear: no term has one twice, or behind a nonlinear map."""
    return tuple(core.name for core in network.cores if not core.frozen and _degree(network, core.name) <= 1)


def _degree(network: Network, name: str) -> float:
    """The highest power of a core in any term; infinite behind a nonlinear map."""
    degrees = {core.name: float(core.name == name) for core in network.cores}
    for derived in network.derived:
        parts = (sum(degrees[each.core] for each in summand.references) for summand in derived.summands)
        degree = max(parts)
        curved = degree > 0 and not all(each.linear for each in derived.maps)
        degrees[derived.name] = math.inf if curved else degree
    labels = {core.name: core.name for core in network.cores}
    labels |= {factor.label: factor.reference.core for factor in network.factors}
    return max(sum(degrees[labels[label]] for label in term.cores) for term in network.terms)


@dataclass(frozen=True)
class MappedProblem(Problem):
    """`terms` name the factors that change, `shapes` the trained cores; `fixed` are all others as they are stored.

    A core that only terms name, directly, is solved for as in any network. For the other `linear` cores T is applied
    and transposed, but never built: what maps make from a core may be as large as the weight.
    """

    network: Network
    fixed: Cores
    linear: tuple[str, ...]

    @property
    def solved_for(self) -> tuple[str, ...]:
        return tuple(name for name in self.shapes if name in self.linear or self._is_extra(name))

    @property
    def multilinear(self) -> bool:
        return False

    def value(self, cores: Cores) -> Tensor:
        return self.inner.value(self.factors(cores))

    def factors(self, cores: Cores) -> Cores:
        """The factors that the terms name."""
        made = factors_of(self.network, {**self.fixed, **cores})
        return {**made, **{name: core for name, core in cores.items() if self._is_extra(name)}}

    @cached_property
    def inner(self) -> Problem:
        """The same problem in its factors, as if each were free."""
        shapes = {factor.label: factor.reference.shape for factor in self.network.factors}
        shapes |= {name: shape for name, shape in self.shapes.items() if self._is_extra(name)}
        used = {label for term in self.terms for label in term.free}
        free = {label: shape for label, shape in shapes.items() if label in used}
        return Problem(self.rows, self.target, self.norm, self.terms, free)

    @cached_property
    def direct(self) -> Mapping[str, str]:
        """The factors that are a trained core itself and its only use, by the core's name."""
        named = [factor.reference.core for factor in self.network.factors]
        inside = {root for derived in self.network.derived for root in self.network.roots_of(derived.name)}
        alone = {name for name in self.shapes if named.count(name) == 1 and name not in inside}
        labels = {factor.reference.core: factor.label for factor in self.network.factors}
        return {name: labels[name] for name in self.shapes if name in alone}

    def stored(self, factors: Cores) -> Cores | None:
        """The cores that these factors are; None if some factor is not a core itself."""
        labels = {**self.direct, **{name: name for name in self.shapes if self._is_extra(name)}}
        if set(labels.values()) != set(self.inner.shapes) or set(labels) != set(self.shapes):
            return None
        return {name: factors[labels[name]].reshape(shape) for name, shape in self.shapes.items()}

    def solved(self, cores: Cores, name: str, ridge: float = RIDGE) -> Tensor:
        label = name if self._is_extra(name) else self.direct.get(name)
        if label is not None:
            return self.inner.solved(self.factors(cores), label, ridge).reshape(self.shapes[name])
        with torch.no_grad():
            return cores[name] + self._step(cores, name, ridge)

    def _is_extra(self, name: str) -> bool:
        """Whether it is a free tensor beside the network's own cores."""
        return all(core.name != name for core in self.network.cores)

    def _step(self, cores: Cores, name: str, ridge: float) -> Tensor:
        """Least squares of |target - T(core)|, T being linear in the core up to a constant."""

        def value(core: Tensor) -> Tensor:
            return self.value({**cores, name: core})

        core = cores[name].detach()
        constant = value(torch.zeros_like(core))
        if core.numel() <= LARGEST_CORE and core.numel() * self.target.numel() <= LARGEST_MATRIX:
            units = torch.eye(core.numel(), dtype=core.dtype, device=core.device).reshape(-1, *core.shape)
            rows = (torch.func.vmap(value)(units) - constant).reshape(core.numel(), -1)
            left = (self.target - constant).reshape(-1, 1) - rows.T @ core.reshape(-1, 1)
            return direct((rows @ rows.T)[None], (rows @ left)[None], ridge).reshape(core.shape)
        return _iterated(value, self.target, core, constant)


def _iterated(value: Callable[[Tensor], Tensor], target: Tensor, core: Tensor, constant: Tensor) -> Tensor:
    """The same by conjugate gradients, which never build T."""
    with torch.enable_grad():
        leaf = core.clone().requires_grad_()
        made = value(leaf)

    def transposed(rows: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(made, leaf, rows, retain_graph=True, allow_unused=True)
        return torch.zeros_like(core) if gradient is None else gradient

    if not made.requires_grad:
        return torch.zeros_like(core)
    left, step = target - made.detach(), torch.zeros_like(core)
    direction = image = transposed(left)
    size = float(image.square().sum())
    enough = CG_TOLERANCE**2 * size
    for _ in range(min(CG_STEPS, 2 * core.numel())):
        moved = value(direction) - constant
        along = float(moved.square().sum())
        if size <= enough or along <= 0:
            break
        step, left = step + size / along * direction, left - size / along * moved
        image, before = transposed(left), size
        size = float(image.square().sum())
        direction = image + size / before * direction
    return step
