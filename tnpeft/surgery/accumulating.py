"""Gradient accumulation: what is made of the cores alone is made once for all micro-steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tnpeft.surgery.adapted_model import adapted

__all__ = ["accumulating"]


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Inside, delta weights and contracted cores are kept from one forward pass to the next: for gradient accumulation.

        with tnpeft.accumulating(model):
            for x, target in micro_batches:
                loss(model(x), target).backward()
        optimiser.step()

    Each forward pass has gradients of its own, those that it would have without the context, so that `backward` may
    be called after each or once for several, within DistributedDataParallel too. Kept are W + ΔW of dense and hybrid
    layers and the clusters of hybrid and factored ones; all of it is dropped at the end, and when the model is moved,
    loaded, attached to or switched. Contexts nest. Compiled graphs keep nothing, and calls within hooks on saved
    tensors (`checkpoint(..., use_reentrant=False)`, `save_on_cpu`) make their own. It acts on the model for all
    threads: others that call it meanwhile use what is kept, and get what they would get without, until the last
    context of any thread ends.

    The cores must not change inside: a forward pass after an optimiser step raises ExecutionError. Writes by fused
    optimisers and to `.data` cannot be seen. Raises AttachError where nothing is attached.
    """
    _, state = adapted(model)
    with state.results.cache.open():
        yield
