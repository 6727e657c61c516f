"""Checks of derived cores: their maps by themselves, and the difference from a frozen copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.network.derived import BoundMap
from tnpeft.program.maps import map_function
from tnpeft.spec.maps import map_kind, registered_map
from tnpeft.verify.exact import Exact
from tnpeft.verify.model_under_test import Mismatch, Skip, Subject, adapted_layers, require_close
from tnpeft.verify.oracle_derived import Definition, definition_of, derive, size_of

__all__ = ["check_difference", "check_maps"]

STEP, DIGITS = 1e-5, 1e-6  # relative: of a core, and of the error that the difference may have then
FLAT = 1e-6  # of T: a difference below it is what little is left of larger ones


def check_maps(subject: Subject) -> None:
    """Each map where the network uses it: value and gradient, and what its flags promise."""
    network = subject.network
    if not any(core.maps for core in network.derived):
        raise Skip("no core is derived by a map")
    model = subject.attached(dtype=torch.float64, moved=True)
    layer = next(iter(adapted_layers(model)))
    with torch.no_grad():
        known = derive(network, {name: core.detach() for name, core in Exact(model).cores(layer).items()})
    for core in network.derived:
        for number, each in enumerate(core.maps):
            at = None if each.at is None else known.cores[each.at]
            _check_map(f"map `{each.name}` of core '{core.name}'", each, at, known.inputs[core.name, number], subject)


class _Run:
    """A map of the library on rows, in the working type."""

    def __init__(self, each: BoundMap, at: Tensor | None, dtype: torch.dtype) -> None:
        self.each, self.dtype = each, dtype
        self.arguments: dict[str, Any] = dict(each.arguments) | ({} if at is None else {"at": at.unsqueeze(0)})

    def __call__(self, x: Tensor) -> Tensor:
        """(rest, *taken) -> (rest, *made)"""
        return self.layers(x.unsqueeze(0)).squeeze(0)

    def layers(self, x: Tensor) -> Tensor:
        """(layers, rest, *taken) -> (layers, rest, *made)"""
        return map_function(self.each.name)(x.to(self.dtype), self.each.shape, **self.arguments)


def _check_map(what: str, each: BoundMap, at: Tensor | None, x: Tensor, subject: Subject) -> None:
    run = _Run(each, at, subject.working)
    generator = torch.Generator().manual_seed(subject.case.seed)
    definition = definition_of(each, tuple(x.shape[1:]), at)
    _check_value_and_slope(what, run, definition, x, generator, subject.tolerance)
    other = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    scale = float(run(x).detach().abs().max()) + float(run(other).detach().abs().max()) + 1e-30
    near = subject.tolerance * scale
    if registered_map(each.name) is not None and x.numel():
        beside = run.layers(torch.stack((x, other)))[0].detach()
        if not _is_near(beside, run(x).detach(), near):
            expected = "expected leading axes to be kept apart: only the legs that it takes are mixed"
            raise Mismatch(f"{what} depends on what other layers and legs hold; {expected}")
    if each.linear:
        _check_linear(what, run, x, other, near)
    kind = map_kind(each.name)
    if kind is not None and kind.zero:
        _check_zero(what, run, x, generator)


def _is_near(found: Tensor, wanted: Tensor, near: float) -> bool:
    return bool(((found - wanted).abs() <= near).all())


def _check_value_and_slope(
    what: str, run: _Run, definition: Definition, x: Tensor, generator: torch.Generator, tolerance: float
) -> None:
    rounded = x.to(run.dtype).double()
    leaf = rounded.clone().requires_grad_()
    found = run(leaf)
    wanted = definition.value(rounded)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    size = rounded.abs().requires_grad_()
    bound = size_of(size, rounded, definition)
    require_close(f"the value of {what}", found.detach(), wanted, bound.detach(), tolerance)
    gradient = None
    if found.requires_grad:
        (gradient,) = torch.autograd.grad((found * upstream.to(found.dtype)).sum(), leaf, allow_unused=True)
    if gradient is None:
        raise Mismatch(f"{what} has no gradient; expected one made by functions that torch differentiates")
    (most,) = torch.autograd.grad((bound * upstream.abs()).sum(), size)
    require_close(f"the gradient of {what}", gradient, definition.slope(rounded, upstream), most, tolerance)


def _check_linear(what: str, run: _Run, x: Tensor, other: Tensor, near: float) -> None:
    """f(a + b) = f(a) + f(b)."""
    with torch.no_grad():
        error = float((run(x + other) - run(x) - run(other)).abs().max()) if x.numel() else 0.0
    if not error <= 3 * near:
        found = f"f(a + b) differs from f(a) + f(b) by {error:.2g}"
        raise Mismatch(f"{what} is not linear, but is said to be (`linear=True`): {found}")


def _check_zero(what: str, run: _Run, x: Tensor, generator: torch.Generator) -> None:
    """f(0) = 0, with a slope."""
    zeros = torch.zeros_like(x).requires_grad_()
    value = run(zeros)
    if bool(value.detach().any()):
        found = f"it is up to {float(value.detach().abs().max()):.2g}"
        raise Mismatch(f"{what} is not zero at zeros, but is said to be (`zero=True`): {found}")
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64)

    def is_flat(at: Tensor) -> bool:
        (slope,) = torch.autograd.grad((run(at) * upstream.to(value.dtype)).sum(), at, allow_unused=True)
        return slope is None or not bool(slope.any())

    # Of some sizes a map is flat everywhere: nothing is antisymmetric in one entry.
    if value.numel() and value.requires_grad and is_flat(zeros) and not is_flat(x.detach().requires_grad_()):
        raise Mismatch(f"{what} has no slope at zeros, but is said to have one (`zero=True`): it would never train")


def check_difference(subject: Subject) -> None:
    """After a small step from the start the update has digits that a difference of two rounded networks loses."""
    network = subject.network
    if network.start != "frozen_copy" or network.compose is not None:
        raise Skip("no frozen copy is subtracted, or a norm stands after it")
    model = subject.attached(dtype=torch.float32)
    generator = torch.Generator().manual_seed(subject.case.seed)
    with torch.no_grad():
        for core in model.parameters():
            if isinstance(core, nn.Parameter) and core.requires_grad:
                size = float(core.square().mean().sqrt()) or 1.0
                core.add_(torch.randn(core.shape, generator=generator) * size * STEP)
        exact, bound = Exact(model), Exact(model, magnitude=True)
        for layer in adapted_layers(model):
            found, wanted = layer.adapter("default").delta_weight().double(), exact.delta(layer)
            whole = abs(network.scale) * float(bound.network_weight(layer).norm())
            least = max(float(wanted.norm()), FLAT * whole, 1e-30)
            error = float((found - wanted).norm()) / least
            if not error <= DIGITS:
                text = f"the update after a step of {STEP:g} is off by {error:.2g} of itself"
                raise Mismatch(f"{text}, expected at most {DIGITS:g}")
