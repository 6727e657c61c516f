"""Which layers a spec takes, found by asking it: binding is quick."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tnpeft.errors import TnpeftError
from tnpeft.network import Layer, Spec
from tnpeft.spec.pattern import KINDS
from tnpeft.verify.case import Case
from tnpeft.verify.properties import st
from tnpeft.verify.strategies import signatures

__all__ = ["gauge_cases", "reachable"]

PROBES, PROBE_SECONDS = 60, 2.0
ENOUGH = 0.3  # of the probes taken: drawn freely, most examples are none of the refused
MAX_NUMEL = 150_000
_CHANNELS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48, 64, 96, 128)
_KERNELS = (1, 2, 3, 4, 5)


def reachable(spec: Spec, layer: Layer | None, params: Mapping[str, float], seed: int = 0) -> st.SearchStrategy[Layer]:
    """Signatures of layers to try: any if the spec takes many, else those that it was found to take."""
    if layer is not None:
        return st.just(layer)
    free = signatures(spec.layers)
    choose = random.Random(seed)
    probes = [_random_layer(choose, spec.layers) for _ in range(PROBES)]
    if sum(_takes(spec, probe, params) for probe in probes) >= ENOUGH * PROBES:
        return free
    deadline = time.monotonic() + PROBE_SECONDS
    grid = [*_grid(spec.layers)]
    choose.shuffle(grid)
    found = []
    for probe in grid:
        if _takes(spec, probe, params):
            found.append(probe)
        if time.monotonic() > deadline or len(found) >= 300:
            break
    found.sort(key=lambda one: (one.numel, one.in_channels, one.out_channels, one.kind))
    return st.sampled_from(found) if found else free


def gauge_cases(spec: Spec, layer: Layer | None, params: Mapping[str, float], accepted: Sequence[Case]) -> list[Case]:
    """Cases whose redundancy may be looked at: some wide enough that the rank is not the layer's, with small params."""
    if layer is not None:
        wide = [Case.on(layer)]
    else:
        wide = []
        for kind, channels in itertools.product(spec.layers, (12, 16, 24, 48)):
            kernel = (3,) * KINDS[kind]
            wide += [Case(kind, channels, channels + more, kernel) for more in (0, channels // 2, channels)]
        simple = [replace(case, dtype="float64", params={}) for case in accepted if case.groups == 1]
        wide += sorted(simple, key=lambda case: case.size, reverse=True)[:20]
    ranks = [{}, {name: 2 for name in ("r", "rank") if name in spec.params and name not in params}]
    return [replace(case, params={**rank, **params}, dtype="float64") for rank in ranks for case in wide]


def _takes(spec: Spec, layer: Layer, params: Mapping[str, float]) -> bool:
    try:
        spec.bind(layer, **params)
    except TnpeftError:
        return False
    return True


def _random_layer(choose: random.Random, kinds: Sequence[str]) -> Layer:
    kind = choose.choice(kinds)
    groups = choose.choice((1, 1, 2, 3)) if KINDS[kind] else 1
    inputs, outputs = (groups * choose.choice((1, 2, 3, 4, 5, 7, 8)) for _ in range(2))
    return Layer(kind, inputs, outputs, tuple(choose.randint(1, 3) for _ in range(KINDS[kind])), groups)


def _grid(kinds: Sequence[str]) -> Iterator[Layer]:
    for kind, inputs, outputs in itertools.product(kinds, _CHANNELS, _CHANNELS):
        kernels = [(size,) * KINDS[kind] for size in _KERNELS] if KINDS[kind] else [()]
        for kernel, groups in itertools.product(kernels, (1, 2) if KINDS[kind] else (1,)):
            layer = Layer(kind, inputs, outputs, kernel, groups)
            if inputs % groups == 0 and outputs % groups == 0 and layer.numel <= MAX_NUMEL:
                yield layer
