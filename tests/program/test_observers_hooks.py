"""Hooks on saved tensors see all that a layer keeps for its backward pass: checkpointing, tensors parked on the CPU."""

from __future__ import annotations

import pytest
import torch
from observers import eager_gradients, error, trained
from smallest import KINDS
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tnpeft

MODES = ("auto", "dense", "factored", "hybrid")
PAIRS = [("Linear", "lora"), ("Linear", "quanta"), ("Conv2d", "loha"), ("Conv3d", "tenvoo_l"), ("Conv2d", "dora")]


def twins(kind: str, spec: str, mode: str) -> tuple[nn.Sequential, Tensor]:
    """Layers that contract their cores together, far from their start."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layers = [make(4, 6) for _ in range(2)]
    back = [nn.Linear(6, 4) if kind == "Linear" else type(layers[0])(6, 4, 3, padding=1) for _ in range(2)]
    model = nn.Sequential(layers[0], back[0], layers[1], back[1])
    tnpeft.attach(model, spec, match="0|2", mode=mode)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, torch.randn(3, *shape(4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "spec"), PAIRS)
def test_nothing_is_kept_for_the_backward_pass_beside_the_hooks(kind, spec, mode):
    model, x = twins(kind, spec, mode)
    expected = eager_gradients(model, x)
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        loss = model(x).square().sum()
    wanted = trained(model)
    seen = torch.autograd.grad(loss, list(wanted.values()))
    assert max(error(one, expected[name]) for name, one in zip(wanted, seen, strict=True)) < 1e-5

    # All that was packed becomes zero: a gradient that is still right would be made of something that no hook saw.
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.detach().clone())
        return packed[-1]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    for tensor in packed:
        tensor.zero_()
    seen = torch.autograd.grad(loss, list(wanted.values()))
    assert not any(torch.allclose(one, expected[name]) for name, one in zip(wanted, seen, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "spec"), PAIRS)
def test_tensors_parked_on_the_cpu_give_the_same_gradients(kind, spec, mode):
    model, x = twins(kind, spec, mode)
    expected = eager_gradients(model, x)
    with save_on_cpu():
        seen = eager_gradients(model, x)
    assert max(error(seen[name], expected[name]) for name in expected) < 1e-5


def _policy(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default)
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("way", ["whole", "selective", "reentrant"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "spec"), PAIRS)
def test_checkpointed_parts_give_the_same_gradients(kind, spec, mode, way):
    model, x = twins(kind, spec, mode)
    expected = eager_gradients(model, x)
    options = {"use_reentrant": way == "reentrant"}
    if way == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_policy)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(lambda x: self.inner[1](self.inner[0](x)), x, **options)
            return checkpoint(lambda x: self.inner[3](self.inner[2](x)), y, **options)

    # What is not checkpointed has no inputs that take gradients; a reentrant checkpoint needs them.
    loss = Checkpointed()(x.requires_grad_()).square().sum()
    loss.backward()
    assert max(error(value.grad, expected[name]) for name, value in trained(model).items()) < 1e-5


def test_a_reentrant_checkpoint_of_an_input_without_gradients_trains_nothing():
    """As torch itself warns; docs/own_loop.md says which one to take."""
    model, x = twins("Linear", "lora", "auto")
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        output = checkpoint(model, x, use_reentrant=True)
    assert not output.requires_grad
