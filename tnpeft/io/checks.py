"""What is wrong with tensors to save, or with those read from a file: shapes, kinds of tensors, NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.processes import is_flat_sharded
from tnpeft.errors import Problem, listed
from tnpeft.io.manifest import dtype_name
from tnpeft.surgery import base_tensors, statistics_of, trained_of

__all__ = ["MOST_SHOWN", "core_shapes", "number_problem", "stored", "tensor_problems"]

MOST_SHOWN = 10  # names in one message
_SUMMON = "On every rank enter `with FullyShardedDataParallel.summon_full_params(model):`, and save there."
_UNSHARD = "Save while the weights are whole: call `unshard()` of every FSDPModule, save, and call `reshard()`."
_OFFLOADED = "Bring the model's values back first: load them, or remove the hooks that offload them."
_RESHAPED = "Give it back its shape, or attach the adapter anew."


def stored(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter that files keep, by key. `state_dict` is not used, because its hooks may shard them."""
    buffers = (
        (key, tensor)
        for key, tensor in adapter.named_buffers(recurse=False)
        if key not in adapter._non_persistent_buffers_set
    )
    return dict([*adapter.named_parameters(recurse=False), *buffers])


def core_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shapes that an adapter's tensors must have by its network, by key."""
    network = adapter.network
    copies = network.start == "frozen_copy"
    shapes: dict[str, tuple[int, ...]] = {}
    for core in network.cores:
        if core.origin != "weight" and core.name not in adapter.shared:
            shapes[f"core_{core.name}"] = core.shape
            shapes |= {f"start_{core.name}": core.shape} if copies and not core.frozen else {}
    if network.compose == "dora":
        shapes |= dict.fromkeys(("dora_magnitude", "start_magnitude"), network.magnitude_shape)
    return shapes


def tensor_problems(model: nn.Module, root: nn.Module, name: str, adapters: Mapping[str, Adapter]) -> Iterator[Problem]:
    """Where an adapter's tensors, or the base's, are not what its network and layers say.

    `model` holds the adapted `root`, perhaps in a wrapper.
    """
    values = base_tensors(root)
    for layer, adapter in adapters.items():
        tensors, where = stored(adapter), f"layer '{layer}'"
        whole = {f"core_{core.name}" for core in adapter.network.cores if core.is_index}
        for key, shape in core_shapes(adapter).items():
            yield from _problems(f"tensor '{key}'", where, tensors.get(key), shape, key not in whole)
        weight = None if adapter.network.layer.opaque else values.get(f"{layer}.weight", values.get(layer))
        yield from _shape_problems("base weight", where, weight, adapter.network.layer.stored_shape)
    for copies in (trained_of(root, name), statistics_of(root, name)):
        for key, tensor in copies.items():
            like = values.get(key, tensor)
            yield from _problems("trained tensor", f"'{key}'", tensor, tuple(like.shape), like.is_floating_point())
    if any(map(is_flat_sharded, model.modules())):
        yield Problem("model", "whole parameters", "the pieces of one rank (FullyShardedDataParallel)", _SUMMON)


def _problems(
    what: str, where: str, tensor: Tensor | None, shape: tuple[int, ...], floating: bool
) -> Iterator[Problem]:
    expected = f"{'floating-point' if floating else 'whole'} numbers of shape {shape}"
    if tensor is None:
        yield Problem(what, expected, "no such tensor", _RESHAPED, where)
    elif tensor.device.type == "meta":
        yield Problem(what, expected, "none (it is on the meta device)", _OFFLOADED, where)
    elif type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided:
        kind = type(tensor).__name__
        layout = str(tensor.layout).removeprefix("torch.")
        found = f"one of class {kind}" if layout == "strided" else f"one of layout {layout}"
        yield Problem(what, expected, found, _UNSHARD if kind == "DTensor" else _RESHAPED, where)
    elif tensor.is_floating_point() != floating:
        yield Problem(what, expected, f"{dtype_name(tensor.dtype)}{tuple(tensor.shape)}", _RESHAPED, where)
    else:
        yield from _shape_problems(what, where, tensor, shape)


def _shape_problems(what: str, where: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Iterator[Problem]:
    if tensor is None or tuple(tensor.shape) == shape:
        return
    flat = getattr(tensor, "_fsdp_flattened", False) or tensor.ndim == 1
    found = f"{tuple(tensor.shape)}" + ", a piece as FullyShardedDataParallel holds it" * flat
    yield Problem(what, f"the shape {shape}", found, _SUMMON if flat else _RESHAPED, where)


def number_problem(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> Problem | None:
    """The warning for tensors of a file, by key, that hold NaN or infinity; None if all are finite."""
    bad = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if not bad:
        return None
    owners = sorted(layers, key=len, reverse=True)
    names = dict.fromkeys(_owner(key, owners) for key in bad)
    fix = "Training may have diverged: go back to an earlier file, or train with a smaller learning rate."
    return Problem("values of the adapter", "finite numbers", f"NaN or infinity in {listed([*names], MOST_SHOWN)}", fix)


def _owner(key: str, layers: Iterable[str]) -> str:
    """The layer or parameter that a file's key belongs to."""
    kind, _, rest = key.partition(".")
    return next((layer for layer in layers if kind == "layers" and rest.startswith(f"{layer}.")), rest)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # A sum is quick, and finite only if all are; where it overflows, each is looked at.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
