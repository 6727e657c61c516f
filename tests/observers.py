"""A small adapted layer, and what its observers make of it, beside what the eager model makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import tnpeft
from tnpeft.verify.subject import fill

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 4)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 3, 4, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1), (2, 4, 3, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 2, 3)),
}


def subject(kind: str, spec: str, mode: str, started: bool = True) -> tuple[nn.Sequential, Tensor]:
    """A model of one adapted layer of this kind, far from its start if `started`, and an input for it."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = nn.Sequential(make()).eval()
    tnpeft.attach(model, spec, match="0", mode=mode)
    if started:
        adapter = model[0].adapter("default")
        before = {name: core.detach().clone() for name, core in adapter.trained.items()}
        fill(adapter, 0)
        with torch.no_grad():  # near the start: values of all sizes would be a test of rounding
            for name, core in adapter.trained.items():
                core.copy_(before[name] + 0.1 * (core - before[name]))
    return model, torch.randn(shape)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def eager_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of the sum of all squared outputs."""
    loss = model(x).square().sum()
    wanted = trained(model)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def error(seen: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected (to 1, if that is smaller)."""
    if seen.shape != expected.shape:
        return float("inf")
    seen, expected = seen.detach(), expected.detach()
    return float((seen - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def traced(model: nn.Module, x: Tensor) -> float:
    """The error of a trace and of its gradients: on the input that it was made with, and on a larger batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(model, x, check_trace=False)
    more = torch.cat((x, x + 1))
    leaf, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    (of_trace,) = torch.autograd.grad(trace(leaf).square().sum(), leaf)
    (of_model,) = torch.autograd.grad(model(same).square().sum(), same)
    return max(error(trace(x), model(x)), error(trace(more), model(more)), error(of_trace, of_model))


def per_sample(model: nn.Module, x: Tensor) -> float:
    """The error of the sum of all samples' gradients, by `vmap(grad(functional_call))`."""

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, values, (sample[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))({name: value.detach() for name, value in trained(model).items()}, x)
    expected = eager_gradients(model, x)
    return max(error(each[name].sum(0), expected[name]) for name in expected)


def pushed_forward(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """The errors of `jvp` and of `jacrev`: the gradient of the loss along a direction, and from the Jacobian."""
    values = {name: value.detach() for name, value in trained(model).items()}
    direction = {name: torch.randn_like(value) for name, value in values.items()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,))

    output, along = jvp(outputs, (values,), (direction,))
    expected = eager_gradients(model, x)
    slope = sum((expected[name] * direction[name]).sum() for name in expected)
    forward = max(error(output, model(x)), error(2 * (output * along).sum(), slope))
    jacobian = jacrev(outputs)(values)
    backward = max(
        error(torch.tensordot(2 * output, jacobian[name], dims=output.dim()), expected[name]) for name in expected
    )
    return forward, backward
