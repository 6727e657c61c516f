"""Which cores training reaches, starting from the initial values."""

from __future__ import annotations

import torch

from tnpeft.verify.model_under_test import Subject, adapted_layers

__all__ = ["reached"]

STEPS = 3  # a core of zeros hides the others until it has moved; two in a row hide a third


def reached(subject: Subject) -> dict[str, bool]:
    """Whether each trainable core of one layer has had a gradient within a few steps along random directions."""
    model = subject.attached(dtype=torch.float64)
    layer = next(iter(adapted_layers(model)))
    cores = layer.adapter("default").trained  # the first layer holds what it shares with others
    found = dict.fromkeys(cores, False)
    generator = torch.Generator().manual_seed(subject.case.seed)
    for _ in range(STEPS):
        weight = layer.weight
        upstream = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        gradients = torch.autograd.grad((weight * upstream).sum(), list(cores.values()), allow_unused=True)
        for (name, core), gradient in zip(cores.items(), gradients, strict=True):
            size = 0.0 if gradient is None else float(gradient.abs().max())
            if gradient is not None and size > 0:
                found[name] = True
                with torch.no_grad():
                    core.sub_(gradient * (0.1 / size))
    return found
