"""Generated specs: a file's factor sizes need not be those that a shipped spec chooses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from tnpeft.io.foreign.topologies import Topology, topology_named
from tnpeft.network import Layer, Spec
from tnpeft.spec.pattern import ELLIPSIS, expand

__all__ = ["spec_of_sizes"]

_FROM_LAYER = {"o": "out_channels", "i": "in_channels"}
_KERNEL = ("kd", "kh", "kw")


def spec_of_sizes(
    topology: Topology, layer: Layer, sizes: Mapping[str, int], dora: bool = False
) -> tuple[Spec, dict[str, float]]:
    """A spec of the topology whose params are the sizes of its legs, and the params for these sizes."""
    axes = len(layer.kernel_size)
    opened = {leg for group in topology.axes(axes) for leg in group}
    bonds = [leg for leg in sizes if leg not in opened]
    one_rank = topology.one_rank and len({sizes[leg] for leg in bonds}) == 1
    known = ({*_FROM_LAYER} & opened) | {*_KERNEL, *expand((ELLIPSIS,), axes)} | set(bonds if one_rank else ())
    params: dict[str, float] = {leg: size for leg, size in sizes.items() if leg not in known}
    spec = _spec(topology.name, tuple(params), one_rank, dora)
    return spec, {"r": sizes[bonds[0]], **params} if one_rank else params


@lru_cache(maxsize=64)
def _spec(name: str, free: tuple[str, ...], one_rank: bool, dora: bool) -> Spec:
    """The text is one for every layer of a file, so that the files we write hold it once."""
    topology = topology_named(name)
    opened = [leg for axis in topology.weight for leg in axis]
    zero = topology.start == "zero"
    params = [f"{param}: 1" for param in ("alpha",) * zero + ("r",) * one_rank + free]
    sizes = [f"{leg}: {channels}" for leg, channels in _FROM_LAYER.items() if leg in opened]
    sizes += [f"{' '.join(_KERNEL)}: kernel_size"] * (_KERNEL[0] in opened)
    cores = [" ".join(legs) for legs in topology.cores.values()]
    if zero:
        cores[-1] = f"{{legs: {cores[-1]}, init: zeros}}"
    layers = "any" if ELLIPSIS in opened else "[Conv3d, ConvTranspose3d]" if _KERNEL[0] in opened else "[Linear]"
    axes = [axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in topology.weight]
    rank = "r" if one_rank else topology.rank
    file = f"{name}_dora_sizes" if dora else f"{name}_sizes"
    lines = [
        "tnpeft: 1",
        f"name: {file}",
        f"title: The topology of `{name}`, its sizes those of another library's file",
        f"layers: {layers}",
        f"params: {{{', '.join(params)}}}",
        "bond: r" * one_rank,
        f"sizes: {{{', '.join(sizes)}}}" if sizes else "",
        "cores:",
        *(f"  core_{number}: {legs}" for number, legs in enumerate(cores)),
        f"weight: {' '.join(axes)}",
        (f"scale: alpha / {rank}" if rank else "scale: alpha") * zero,
        f"start: {topology.start}",
        "compose: dora" * dora,
    ]
    return Spec.from_yaml("\n".join(line for line in lines if line) + "\n", file=f"{file}.yaml")
