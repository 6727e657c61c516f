"""What other libraries' files say of one layer: the form between their keys and tnpeft's specs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter, memory_problems
from tnpeft.adapters.base_weight import base_weight
from tnpeft.adapters.distributed import whole
from tnpeft.adapters.dora import magnitudes
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.errors import BindError, Problem, SpecError
from tnpeft.io.foreign.formats import MADE_FOR
from tnpeft.io.foreign.generated_specs import spec_of_sizes
from tnpeft.io.foreign.topologies import Topology, found_in, topology_named
from tnpeft.io.foreign.tuner_update import TunerUpdate
from tnpeft.network import Layer, Network, layer_of, load_spec
from tnpeft.network.dropout import Dropout
from tnpeft.schedule import DEFAULT_MODE
from tnpeft.spec import list_specs

__all__ = ["Foreign", "LayerUpdate", "adapter_of", "silenced"]


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer: `scale` times a topology's network.

    `tensors` and `start` (the frozen copies) hold the topology's cores with their legs in its order, `keys` the cores'
    keys in the file. With a `magnitude` for each output channel it is the DoRA of that update. `dropout` is that of its
    training.
    """

    topology: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    start: Mapping[str, Tensor] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    magnitude: Tensor | None = None
    orientation: str | None = None  # of a parameter; the cores of a stack have its slices as their first axis
    dropout: Dropout | None = None

    @property
    def shape(self) -> Topology:
        return topology_named(self.topology)


@dataclass(frozen=True)
class Foreign:
    """A whole file: the updates by layer or parameter, and other trained parameters and running statistics."""

    parts: Mapping[str, LayerUpdate | TunerUpdate]
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    copied: frozenset[str] = frozenset()  # trained parameters that are the file's own copies, tied to nothing
    notes: tuple[Problem, ...] = ()  # of what has no counterpart here, and changes no output


def adapter_of(part: LayerUpdate, module: nn.Module | ParameterLayer, name: str) -> Adapter:
    """The adapter of one layer with the part's values, of a shipped spec where one has its sizes.

    Raises BindError for tensors that do not fit together, or not the layer.
    """
    layer = module.signature if isinstance(module, ParameterLayer) else layer_of(module)
    part = part if part.scale else silenced(part)
    sizes = _sizes(_slice_of(part), replace(layer, slices=0)) if layer.slices else _sizes(part, layer)
    for network in _networks(part, layer, sizes):
        values = _values(part, network)
        if values is None:
            continue
        if part.magnitude is not None:
            weight = whole(base_weight(module, network).detach())
            start = magnitudes(layer, weight.to(torch.promote_types(weight.dtype, torch.float32)))
            values |= {"dora_magnitude": part.magnitude, "start_magnitude": start}
        if problems := [*memory_problems({name: network}, {name: module}, DEFAULT_MODE)]:
            raise BindError(*problems)
        adapter = Adapter(network, module, name=name, initialise=False, dropout=part.dropout)
        if any(value.dtype.itemsize > 4 for value in values.values()):
            adapter.double()
        adapter.load_state_dict(values)
        return adapter
    fix = "Report this file: its topology is known, and yet no spec holds it."
    raise BindError(Problem("cores", f"those of {part.topology}", f"sizes {sizes} and scale {part.scale:g}", fix))


def _values(part: LayerUpdate, network: Network) -> dict[str, Tensor] | None:
    """The part's tensors as an adapter of `network` keeps them, or None where its sizes or scale are others."""
    stack = len(network.layer.stack)  # 1 where the first axis of every core is the slices
    found = found_in(network.slice_network or network, part.shape)
    same_scale = math.isclose(network.scale * network.terms[0].scale, part.scale, rel_tol=1e-12, abs_tol=0.0)
    if found is None or not same_scale or (network.compose == "dora") != (part.magnitude is not None):
        return None
    shapes = {core.name: core.shape for core in network.cores}
    values = {}
    for core, (ours, order) in found.items():
        inverse = [*range(stack), *(stack + place for place in sorted(range(len(order)), key=order.__getitem__))]
        for prefix, tensors in (("core", part.tensors), ("start", part.start)):
            if tensors:
                values[f"{prefix}_{ours}"] = tensors[core].permute(inverse)
                if tuple(tensors[core].permute(inverse).shape) != shapes[ours]:
                    return None
    return values


def silenced(part: LayerUpdate) -> LayerUpdate:
    """A part without effect, written without a scale of 0, which neither a spec nor LyCORIS can have."""
    first = next(iter(part.tensors))
    return replace(part, tensors={**part.tensors, first: torch.zeros_like(part.tensors[first])}, scale=1.0)


def _slice_of(part: LayerUpdate) -> LayerUpdate:
    """The first of a stack's slices, which all have its sizes."""
    return replace(part, tensors={core: tensor[0] for core, tensor in part.tensors.items()})


def _sizes(part: LayerUpdate, layer: Layer) -> dict[str, int]:
    """Every leg's size, as the tensors have it. Raises BindError where they or the layer disagree."""
    axes = len(layer.kernel_size)
    sizes: dict[str, int] = {}
    for core in part.tensors:
        legs, key = part.shape.legs(core, axes), part.keys.get(core, core)
        for values in (part.tensors, part.start or part.tensors):
            shape = tuple(values[core].shape)
            wanted = tuple(sizes.get(leg, size) for leg, size in zip(legs, shape, strict=False))
            if len(shape) != len(legs) or shape != wanted or 0 in shape:
                expected = f"{len(legs)} axes of at least 1" if len(shape) != len(legs) or 0 in shape else f"{wanted}"
                raise BindError(_misfit(f"tensor `{key}`", expected, f"{shape}"))
            sizes.update(zip(legs, shape, strict=True))
    for axis, (legs, size) in enumerate(zip(part.shape.axes(axes), layer.weight_shape, strict=False)):
        product = math.prod(sizes[leg] for leg in legs)
        if product != size:
            keys = ", ".join(f"`{key}`" for key in dict.fromkeys(part.keys.values())) or "the tensors"
            what = f"axis {axis} of the update that {keys} make"
            raise BindError(_misfit(what, f"{size}, as {layer} has it", f"{product}"))
    if part.magnitude is not None and tuple(part.magnitude.shape) != (layer.out_channels,):
        found = f"{tuple(part.magnitude.shape)}"
        raise BindError(_misfit("magnitudes", f"one for each of {layer.out_channels} output channels", found))
    return sizes


def _misfit(what: str, expected: str, found: str) -> Problem:
    return Problem(what, expected, found, MADE_FOR)


def _networks(part: LayerUpdate, layer: Layer, sizes: Mapping[str, int]) -> Iterator[Network]:
    """Networks to try: the shipped spec's, then that of a spec written for the purpose."""
    rank = sizes[part.shape.rank] if part.shape.rank else 1
    alpha = float(f"{part.scale * rank:.15g}")  # what the file said, where the product lost a bit
    dora = part.magnitude is not None
    shipped = {"lora": "dora"}.get(part.topology, "") if dora else part.topology
    if shipped in list_specs():
        spec = load_spec(shipped)
        if layer.kind in spec.layers:
            factors = [0, *sorted({sizes[leg] for leg in ("oa", "ia", "ob", "ib") if leg in sizes})]
            for factor in factors if "factor" in spec.params else factors[:1]:
                given = {"r": rank, "alpha": alpha, "factor": factor}
                try:
                    yield spec.bind(layer, **{key: value for key, value in given.items() if key in spec.params})
                except (BindError, SpecError):
                    continue
    spec, params = spec_of_sizes(part.shape, layer, sizes, dora)
    yield spec.bind(layer, **(params if part.shape.start != "zero" else {"alpha": alpha, **params}))
