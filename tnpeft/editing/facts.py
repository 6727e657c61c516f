"""What the page says of a network at once, with its picture: all that follows from its sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tnpeft.editing.trial import Param, Trial, params_of
from tnpeft.network import Network
from tnpeft.network.wording import core_rows

__all__ = ["Facts", "attach_line", "facts_of"]


@dataclass(frozen=True)
class Facts:
    """A network in numbers and words, none of which needs a plan."""

    layer: str
    weight: str
    parameters: int
    formula: str
    share: float
    scale: float
    start: str
    compose: str | None
    einsum: str
    cores: tuple[tuple[str, ...], ...]  # name, legs, shape, init, elements
    params: tuple[Param, ...]


def facts_of(network: Network, trial: Trial) -> Facts:
    layer = network.layer
    return Facts(
        layer=str(layer),
        weight=" x ".join(map(str, layer.weight_shape)),
        parameters=network.num_parameters,
        formula=network.formula,
        share=network.num_parameters / layer.numel,
        scale=network.scale,
        start=network.start,
        compose=network.compose,
        einsum=network.einsum,
        cores=tuple(core_rows(network)),
        params=params_of(network, trial),
    )


def attach_line(what: str, network: Network, trial: Trial) -> str:
    """The line of Python that puts the spec on a model, with the params that the trial sets."""
    settings = "".join(f", {name}={value!r}" for name, value in trial.params.items() if name in network.params)
    return f'handle = tnpeft.attach(model, {json.dumps(what, ensure_ascii=False)}, match="all"{settings})'
