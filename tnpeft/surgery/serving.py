"""Inference with summed weights that are kept from one call to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tnpeft.schedule.costs import bytes_text
from tnpeft.surgery.adapted_model import AdaptedModel, adapted
from tnpeft.surgery.tree import adapted_layers

__all__ = ["Served", "serving"]


class Served:
    """What `tnpeft.serving` keeps now; prints as a sentence."""

    def __init__(self, root: nn.Module, state: AdaptedModel) -> None:
        self._root, self._weights = root, state.results.weights

    @property
    def bytes(self) -> int:
        """Bytes of the kept weights, beside those of the base."""
        return self._weights.bytes

    @property
    def layers(self) -> list[str]:
        """The layers whose weight is kept: those that were called since something last changed."""
        return [layer.layer_name for layer in adapted_layers(self._root) if layer.base in self._weights.known]

    @property
    def others(self) -> list[str]:
        """The layers on which something acts and whose weight is not kept."""
        layers = adapted_layers(self._root)
        return [layer.layer_name for layer in layers if layer.site.acting and layer.base not in self._weights.known]

    def __repr__(self) -> str:
        layers = len(self.layers)
        return f"{layers} of {layers + len(self.others)} layers, {bytes_text(self.bytes)} kept"


@contextmanager
def serving(model: nn.Module) -> Iterator[Served]:
    """Inside, each adapted layer keeps its summed weight from one call to the next: for inference as quick as merged.

        with tnpeft.serving(model) as kept, torch.no_grad():
            y = model(x)
            print(kept)  # 12 of 12 layers, 41.20 MiB kept

    W + Σ s ΔW is made at a layer's first call. From then on the layer's own function is called with it, whatever the
    mode: outputs are those of the merged model, bit for bit. A kept weight is dropped, and made again at the next call,
    when adapters are activated, scaled, loaded, attached, detached, merged or moved, and when a core or a base weight
    is written to. `tnpeft.disabled` leaves it for afterwards. Writes to `.data` and by fused optimisers cannot be seen.
    Contexts nest; all threads that call the model use one set of weights, until the last context of any thread ends.

    The result says the memory: `bytes`, and the names of `layers`. The layers in its `others` compute as they do
    outside: opaque layers (quantised, computed), which have no weight to sum; layers whose weight accelerate offloads
    or FSDP shards. So do graphs of `torch.compile` and other tracers, `torch.func`, and calls within `tnpeft.rows`.

    Raises AttachError if nothing is attached and, inside, ExecutionError for a call that autograd records, or in which
    an adapter has dropout.
    """
    root, state = adapted(model)
    _count(root, state, 1)
    try:
        yield Served(root, state)
    finally:
        _count(root, state, -1)


def _count(root: nn.Module, state: AdaptedModel, step: int) -> None:
    """Open or close a context; layers keep their weights while any is open."""
    results = state.results
    with results.lock:
        results.weights.opened += step
        if results.weights.opened == max(step, 0):  # the first is opened, or the last closed
            for layer in adapted_layers(root):
                layer.act(layer.scales, results)
            results.weights.forget()
