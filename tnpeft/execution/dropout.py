"""Calls with dropout: in training, a part of the update is left out at random.

    y = base(x) + update(cores with masks, dropout(x))

Masks are drawn from the device's generator before anything else is decided. So every mode drops the same, and
activation checkpointing, which resets the generator, draws the same again. Frozen copies get the masks of their cores,
so that an update that is zero stays zero to the bit. What is computed from masked cores is for this call only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from tnpeft.adapters import Adapter
from tnpeft.adapters.factors import Light
from tnpeft.execution.base_call import BaseCall, plain_call
from tnpeft.execution.calls import Acting
from tnpeft.execution.dispatch import execute, execute_drawn, is_looked_on
from tnpeft.execution.forward_pass import ModelResults
from tnpeft.execution.site import Site
from tnpeft.execution.torch_call import as_autocast_has_it
from tnpeft.execution.updates import with_updates
from tnpeft.network import Layer
from tnpeft.program import Program

__all__ = ["drawn", "drops", "execute_dropping", "on_its_own", "updates_dropping"]

# Where nothing is ever kept, and no pass is open.
_NOWHERE = ModelResults()


def execute_dropping(site: Site, x: Tensor, *rest: Any) -> Tensor:
    """As `execute`, with adapters of which some have dropout in training.

    An update that reads the layer's own input is added to the weight, as usual; one with another input is a separate
    product.
    """
    if isinstance(x, torch.fx.Proxy) or not drops(site):
        return execute(site, x, *rest)
    plain = is_looked_on(site, x)
    pairs = [drawn(acting, x) for acting in site.acting]
    within = tuple([acting for acting, read in pairs if read is x])
    if within:
        output = execute_drawn(site, on_its_own(site, *within), plain, x, *rest)
    else:
        output = site.call_base(site.base, as_autocast_has_it(x), site.base.weight.detach(), *rest)
    for acting, read in pairs:
        if read is not x:
            layer = acting.adapter.network.layer
            output = with_updates(on_its_own(site, acting), layer, plain_call(site.base, layer, output, read), output)
    return output


def updates_dropping(site: Site, layer: Layer, called: BaseCall, output: Tensor) -> Tensor:
    """`with_updates` for an opaque layer, with adapters some of which drop something while they train."""
    if not drops(site):
        return with_updates(site, layer, called, output)
    for acting, read in [drawn(acting, called.x) for acting in site.acting]:
        output = with_updates(on_its_own(site, acting), layer, called._replace(x=read), output)
    return output


def drops(site: Site) -> bool:
    """Whether this call leaves out something."""
    return any(acting.adapter.dropout is not None and acting.adapter.training for acting in site.acting)


def drawn(acting: Acting, x: Tensor) -> tuple[Acting, Tensor]:
    """An adapter for this call, with masks on its cores, and the input that its update reads.

    Both are unchanged if nothing is dropped.
    """
    adapter = acting.adapter
    dropout = adapter.dropout
    if dropout is None or not adapter.training:
        return acting, x
    if adapter.masks:
        acting = acting._replace(adapter=cast(Adapter, _Masked(adapter, x.device)))
    return acting, functional.dropout(x, dropout.input) if dropout.input else x


def on_its_own(site: Site, *acting: Acting) -> Site:
    """The site on which these adapters act; no results of masked cores are kept."""
    masked = any(isinstance(each.adapter, _Masked) for each in acting)
    alone = acting[0] if len(acting) == 1 and acting[0].scale == 1.0 else None
    return site._replace(acting=acting, alone=alone, results=_NOWHERE if masked else site.results)


class _Masked:
    """What a call asks an adapter for, with masks on its cores and on their frozen copies."""

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        self.adapter = adapter
        self.network, self.plan = adapter.network, adapter.plan
        self.mode, self.layer_name = adapter.mode, adapter.layer_name
        self.factors, self.side = adapter.factors, adapter.side
        self._factors: list[tuple[int, Tensor]] = []
        self._whole: list[Tensor] = []  # of the update, where no core can carry it
        sizes = [mask.size for mask in adapter.masks]
        like = adapter.stored[0]
        pieces = torch.rand(sum(sizes), device=device).split_with_sizes(sizes)
        for mask, numbers in zip(adapter.masks, pieces, strict=True):
            factor = (numbers >= mask.probability).to(like.dtype) * mask.scale
            self._factors += [(core, factor.view(shape)) for core, shape in mask.places]
            self._whole += [] if mask.places else [factor]

    def core_tensors(self, weight: Tensor | None = None, light: Light = None) -> list[Tensor]:
        return self._masked(self.adapter.core_tensors(weight, light))

    def start_tensors(self, weight: Tensor | None = None) -> list[Tensor]:
        copies = self.adapter.start_tensors(weight)
        return self._masked(copies) if copies else copies

    def delta_inputs(self, weight: Tensor | None = None, light: Light = None) -> list[Tensor]:
        return self._masked(self.adapter.delta_inputs(weight, light))

    def with_magnitude(self, delta: Tensor, weight: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        delta = self.adapter.with_magnitude(delta, weight, inputs)
        for factor in self._whole:
            delta = delta * factor
        return delta

    def program_for(self, weight: Tensor) -> Program:
        return self.adapter.program_for(weight)

    def _masked(self, tensors: list[Tensor]) -> list[Tensor]:
        """The network's cores, or what begins with them, in its order."""
        masked = list(tensors)
        for core, factor in self._factors:
            masked[core] = masked[core] * factor
        return masked
