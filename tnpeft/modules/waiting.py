"""Where tensors of a layer wait while others act in their place: beside them, in the same table of the same module."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["MANGLED", "ORIGINAL", "own_weight", "waiting_key"]

MANGLED = "_tnpeft_"
ORIGINAL = "original"


def waiting_key(who: str, key: str) -> str:
    """The key of what waits for `key`. No adapter's name has a colon, so that no two tensors wait in one place."""
    return f"{MANGLED}{who}:{key}"


_OWN_WEIGHT = waiting_key(ORIGINAL, "weight")


def own_weight(base: nn.Module) -> Tensor:
    """The base's own weight, whatever an adapter that trains the layer as a whole has put in its place."""
    waiting = base._parameters.get(_OWN_WEIGHT)
    weight = base.weight if waiting is None else waiting
    assert isinstance(weight, Tensor)
    return weight
