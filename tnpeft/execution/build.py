"""From a spec and a layer to an adapter."""

from __future__ import annotations

from torch import nn

from tnpeft.adapters.adapter import Adapter
from tnpeft.adapters.memory_need import memory_problems
from tnpeft.errors import BindError
from tnpeft.execution.layers import AdaptedLayer
from tnpeft.network import Spec, load_spec
from tnpeft.schedule import DEFAULT_MODE

__all__ = ["compile"]


def compile(
    spec: Spec | str,
    layer: nn.Module,
    /,
    *,
    seed: int | None = None,
    name: str = "",
    mode: str = DEFAULT_MODE,
    autotune: bool = False,
    **params: float,
) -> Adapter:
    """The adapter of `spec` (or of a shipped spec's name, or a path) for `layer`, which is only read.

    `name` is the layer's name in its model: with `seed` (the spec's own where None) it decides the
    initial values. A shared core is this layer's alone: layers share what is attached to them together.
    `mode` says how calls of the layer run, and `autotune` that `mode="auto"` times them, as for `attach`.
    Raises SpecError and BindError.
    """
    if not isinstance(spec, Spec):
        spec = load_spec(spec)
    if isinstance(layer, AdaptedLayer):
        layer = layer.base
    network = spec.bind(layer, **params)
    if problems := [*memory_problems({name: network}, {name: layer}, mode)]:
        raise BindError(*problems)
    return Adapter(network, layer, seed=seed, name=name, mode=mode, autotune=autotune)
