"""From a spec and a layer to an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tnpeft.adapters.adapter import Adapter
from tnpeft.adapters.base_weight import needs_weight
from tnpeft.adapters.memory_need import memory_problems
from tnpeft.errors import BindError, Problem
from tnpeft.execution.layers import AdaptedLayer
from tnpeft.network import Network, Spec, layer_of, load_spec
from tnpeft.schedule import DEFAULT_MODE

__all__ = ["compile"]


def compile(
    spec: Spec | Network | str,
    layer: nn.Module | None = None,
    /,
    *,
    seed: int | None = None,
    name: str = "",
    mode: str = DEFAULT_MODE,
    autotune: bool = False,
    **params: float,
) -> Adapter:
    """The adapter of `spec` (or of a shipped spec's name, or a path) for `layer`, which is only read.

    A `Network` (a bound spec) needs a layer only if it reads the weight; without one its cores are made on the default
    device. `name` is the layer's name in its model. It and `seed` (if None, the spec's own) decide the initial values.
    A shared core is this layer's alone: only layers that are attached together share. `mode` and `autotune` are those
    of `attach`. Raises SpecError and BindError.
    """
    if isinstance(layer, AdaptedLayer):
        layer = layer.base
    if isinstance(spec, Network):
        network, layer = _bound(spec, layer, params)
    elif layer is None:
        fix = "For example `tnpeft.compile(spec, layer)`, or bind it first: `spec.bind(...)` gives a network."
        raise BindError(Problem("compile", "a layer", "none", fix))
    else:
        network = (spec if isinstance(spec, Spec) else load_spec(spec)).bind(layer, **params)
    if problems := [*memory_problems({name: network}, {name: layer}, mode)]:
        raise BindError(*problems)
    return Adapter(network, layer, seed=seed, name=name, mode=mode, autotune=autotune)


def _bound(network: Network, layer: nn.Module | None, params: Mapping[str, float]) -> tuple[Network, nn.Module]:
    """A network with its layer, or one of its sizes without values. Raises BindError if they do not fit."""
    what = f"network of spec '{network.spec.name}'"
    if params:
        fix = "Give params to `spec.bind`, where sizes are worked out."
        raise BindError(Problem(what, "no params", ", ".join(params), fix))
    if layer is not None:
        if layer_of(layer) != network.layer:
            fix = "Bind the spec to this layer."
            raise BindError(Problem(what, f"the layer it is bound to, {network.layer}", str(layer_of(layer)), fix))
        return network, layer
    drawn = any(core.init.name in ("largest", "smallest") for core in network.cores)
    if network.layer.slices or network.reads_weight or needs_weight(network.spec) or drawn:
        fix = "Pass the layer too."
        raise BindError(Problem(what, "a layer, whose weight it reads", "none", fix))
    outline = nn.Module()
    outline.weight = nn.Parameter(torch.zeros(()).expand(network.layer.stored_shape), requires_grad=False)
    return network, outline
