"""Networks by hand, without a spec file, and the dense oracle in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import networkx
import torch
from hypothesis import strategies as st
from torch import Tensor

from tnpeft.network import BoundCore, BoundInit, BoundTerm, Layer, Network

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")

# Of forty cores.
GRAPHS = {
    "chain": networkx.path_graph(40),
    "ring": networkx.cycle_graph(40),
    "grid": networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(5, 8)),
    "cubic": networkx.random_regular_graph(3, 40, seed=1),
    "quartic": networkx.random_regular_graph(4, 40, seed=1),
    "star": networkx.star_graph(39),
    "tree": networkx.random_labeled_tree(40, seed=1),
    "disconnected": networkx.disjoint_union_all([networkx.cycle_graph(5)] * 8),
    "unconnected": networkx.empty_graph(40),
    "complete": networkx.complete_graph(40),
}


def make_network(
    cores: Mapping[str, str],
    weight: str | Sequence[str],
    sizes: Mapping[str, int],
    layer: Layer | None = None,
    start: str = "frozen_copy",
    scale: float = 1.0,
    frozen: Sequence[str] = (),
) -> Network:
    """A network from legs in words: `make_network({"up": "o r", "down": "r i"}, ["o", "i"], {"o": 4, "i": 6, "r": 2})`.

    `weight` has one entry of legs for each axis of the canonical weight. The layer is made to fit if none is given.
    """
    axes = tuple(tuple(axis.split()) for axis in (weight.split() if isinstance(weight, str) else weight))
    if layer is None:
        outputs, inputs, *kernel = (math.prod(sizes[leg] for leg in axis) for axis in axes)
        layer = Layer(KINDS[len(kernel)], inputs, outputs, tuple(kernel))
    bound = []
    for name, text in cores.items():
        legs = tuple(text.split())
        shape = tuple(sizes[leg] for leg in legs)
        bound.append(BoundCore(name, legs, shape, BoundInit("normal", {"std": 1.0}), name in frozen))
    spec = cast(Any, SimpleNamespace(name="by hand", title="", start=start, compose=None))
    return Network(spec, layer, {}, dict(sizes), tuple(bound), (BoundTerm(tuple(cores), axes),), scale, "")


def network_of_graph(graph: networkx.Graph, bond: int = 4, open_legs: int = 7) -> Network:
    """A core for each node, a bond for each edge, and an open leg on each of the first nodes."""
    legs: dict[int, list[str]] = {node: [] for node in graph}
    for number, edge in enumerate(graph.edges):
        for node in edge:
            legs[node].append(f"b{number}")
    opened = list(graph)[:open_legs]
    for node in opened:
        legs[node].append(f"o{node}")
    sizes = {leg: bond if leg.startswith("b") else 3 for own in legs.values() for leg in own}
    weight = [" ".join(f"o{node}" for node in opened[:3]), " ".join(f"o{node}" for node in opened[3:])]
    return make_network({f"core{node}": " ".join(own) for node, own in legs.items()}, weight, sizes)


def hyperedge(cores: int) -> Network:
    """Cores joined by one index alone, seven of them with an open leg of more than one."""
    legs = {f"core{number}": f"o{number} r" for number in range(cores)}
    sizes = {f"o{number}": 2 if number < 7 else 1 for number in range(cores)}
    half = cores // 2
    weight = [" ".join(f"o{number}" for number in part) for part in (range(half), range(half, cores))]
    return make_network(legs, weight, {**sizes, "r": 4})


def random_cores(network: Network, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Cores whose network has entries of order one, as the initialisations of the shipped specs have."""
    generator = torch.Generator().manual_seed(seed)
    cores = []
    for core in network.cores:
        summed = [size for leg, size in zip(core.legs, core.shape, strict=True) if leg not in network.open_legs]
        tensor = torch.randn(core.shape, generator=generator, dtype=torch.float64)
        cores.append((tensor / math.sqrt(math.sqrt(math.prod(summed)))).to(dtype))
    return cores


def dense_weight(network: Network, cores: Sequence[Tensor]) -> Tensor:
    """The definition: one einsum over all cores in float64, cropped, in the stored layout; without the scale."""
    numbers = {leg: number for number, leg in enumerate(network.sizes)}
    operands: list[Any] = []
    for bound, core in zip(network.cores, cores, strict=True):
        operands += [core.double(), [numbers[leg] for leg in bound.legs]]
    canonical = torch.einsum(*operands, [numbers[leg] for leg in network.open_legs]).reshape(network.padded_shape)
    layer = network.layer
    canonical = canonical[tuple(slice(size) for size in layer.weight_shape)]
    if not layer.transposed:
        return canonical
    # stored[g*a + i, o] = canonical[g*b + o, i], a = in // groups, b = out // groups
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    blocks = [canonical[group * outputs : (group + 1) * outputs].transpose(0, 1) for group in range(layer.groups)]
    assert blocks[0].shape[0] == inputs
    return torch.cat(blocks)


def dense_delta(network: Network, cores: Sequence[Tensor], start: Sequence[Tensor] | None) -> Tensor:
    """scale * (T(cores) - T(start)) in float64, where the difference of stored cores loses nothing."""
    delta = dense_weight(network, cores)
    if start is not None:
        delta = delta - dense_weight(network, start)
    return network.scale * delta


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    norm = expected.double().norm()
    return float((found.double() - expected).norm() / (norm if norm > 0 else 1.0))


def memory_orders(network: Network) -> list[tuple[int, ...]]:
    """Contiguous, and channels_last where a weight has it."""
    axes = tuple(range(len(network.weight)))
    return [axes] if len(axes) < 4 else [axes, (0, *axes[2:], 1)]


def strides_of(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose axes vary in `order`, slowest first."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


@st.composite
def networks(draw: st.DrawFn, max_cores: int = 6, groups: bool = True) -> Network:
    """Random networks on all seven kinds of layer: trees and cycles, hyperedges, outer products, groups, padding."""
    kind = draw(st.sampled_from(KINDS))
    kernel_axes = 0 if kind == "Linear" else int(kind[-2])
    count = draw(st.integers(1, max_cores))
    legs: list[list[str]] = [[] for _ in range(count)]
    sizes: dict[str, int] = {}

    def place(index: str, size: int, fewest: int) -> None:
        sizes[index] = size
        places = draw(st.lists(st.integers(0, count - 1), min_size=fewest, max_size=min(count, 3), unique=True))
        for core in places:
            legs[core].insert(draw(st.integers(0, len(legs[core]))), index)

    axes: list[list[str]] = []
    for axis in range(2 + kernel_axes):
        names = [f"w{axis}{part}" for part in range(draw(st.integers(1, 2)))]
        for name in names:
            place(name, draw(st.integers(1, 3)), 1)
        axes.append(names)
    if count > 1:
        for number in range(draw(st.integers(0, 5))):
            place(f"b{number}", draw(st.integers(1, 3)), 2)
    padded = [math.prod(sizes[name] for name in names) for names in axes]
    cropped = [draw(st.integers(size - 1, size)) if size > 1 and draw(st.booleans()) else size for size in padded]
    numbers = [group for group in (1, 2, 3) if cropped[0] % group == 0] if kernel_axes and groups else [1]
    number = draw(st.sampled_from(numbers))
    layer = Layer(kind, cropped[1] * number, cropped[0], tuple(cropped[2:]), number)
    frozen = draw(st.lists(st.integers(0, count - 1), max_size=count - 1, unique=True))
    return make_network(
        {f"core{number}": " ".join(core) for number, core in enumerate(legs)},
        [" ".join(names) for names in axes],
        sizes,
        layer,
        start=draw(st.sampled_from(("zero", "frozen_copy"))),
        scale=draw(st.sampled_from((1.0, 0.5, -3.0))),
        frozen=[f"core{number}" for number in frozen],
    )
