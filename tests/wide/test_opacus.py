"""Opacus: per-sample gradients of adapted models against a loop over samples, and the private step made of them."""

from __future__ import annotations

import pytest
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore")  # of Opacus: secure random numbers, hooks

CONVOLUTIONS, LINEAR = r"^[03]$", r"^[68]$"
EVERY = r"^[0368]$"
SPECS = {"lora": EVERY, "loha": EVERY, "tenvoo_l": CONVOLUTIONS, "quanta": LINEAR, "vera": LINEAR, "ia3": LINEAR}
X = torch.randn(5, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(5) % 3


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv3d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3),
    )  # fmt: skip


def trained_of(spec: str, mode: str = "auto") -> tuple[nn.Module, tnpeft.Handle, dict[str, nn.Parameter]]:
    model = model_of()
    handle = tnpeft.attach(model, spec, match=SPECS[spec], train={"norm": True, "bias": "adapted"}, mode=mode)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == len([*handle.parameters()])
    return model, handle, trained


def per_sample(model: nn.Module, trained: dict[str, nn.Parameter], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    def loss(values: dict[str, Tensor], volume: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (volume[None],)), label[None])

    values = {name: value.detach() for name, value in trained.items()}
    return vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(values, x, y)


def one_by_one(model: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in trained}
    for number in range(len(X)):
        model.zero_grad()
        F.cross_entropy(model(X[number : number + 1]), Y[number : number + 1]).backward()
        for name, value in trained.items():
            rows[name].append(value.grad.clone())
    return {name: torch.stack(row) for name, row in rows.items()}


def private(model: nn.Module, handle: tnpeft.Handle, mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 5)
    module, optimiser, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(handle.parameters(), 0.5), data_loader=loader, noise_multiplier=0.0,
        max_grad_norm=1.0, grad_sample_mode=mode, poisson_sampling=False,
    )  # fmt: skip
    return module, optimiser


@pytest.mark.parametrize("mode", ["auto", "dense", "factored", "hybrid"])
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_a_loop(spec: str, mode: str):
    model, _, trained = trained_of(spec, mode)
    found, right = per_sample(model, trained, X, Y), one_by_one(model, trained)
    for name in trained:
        torch.testing.assert_close(found[name], right[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_private_step_is_the_clipped_mean():
    """Without noise, a step of SGD takes the mean of the samples' gradients, each of norm 1 at most, together."""
    model, handle, trained = trained_of("tenvoo_l")
    right, before = one_by_one(model, trained), {name: value.detach().clone() for name, value in trained.items()}
    _, optimiser = private(model, handle, "no_op")
    for name, samples in per_sample(model, trained, X, Y).items():
        trained[name].grad_sample = samples
    optimiser.step()
    norms = torch.cat([samples.flatten(1) for samples in right.values()], 1).norm(dim=1)
    factors = (1 / (norms + 1e-6)).clamp(max=1)
    for name, samples in right.items():
        step = torch.einsum("n,n...->...", factors, samples) / 5
        torch.testing.assert_close(trained[name].detach(), before[name] - 0.5 * step, rtol=1e-4, atol=1e-6)
    # Of an empty batch nothing is left but the noise.
    after = {name: value.detach().clone() for name, value in trained.items()}
    optimiser.zero_grad()
    for value in trained.values():
        value.grad_sample = value.new_zeros(0, *value.shape)
    optimiser.step()
    assert all(torch.equal(value, after[name]) for name, value in trained.items())


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_opacuss_own_hooks_are_right_or_refuse(mode: str):
    """They look at modules that have trained parameters of their own: adapted layers do where their bias trains."""
    model, handle, trained = trained_of("lora")
    right = one_by_one(model, trained)
    model.zero_grad()
    module, _ = private(model, handle, mode)
    F.cross_entropy(module(X), Y).backward()
    for name, value in trained.items():
        torch.testing.assert_close(value.grad_sample, right[name], rtol=1e-4, atol=1e-6)

    model = model_of()
    module, optimiser = private(model, tnpeft.attach(model, "lora", match=EVERY), mode)
    F.cross_entropy(module(X), Y).backward()
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        optimiser.step()
    model, handle, _ = trained_of("tenvoo_l")
    with pytest.raises(NotImplementedError, match="a trainable layer with buffers"):
        private(model, handle, mode)
