"""What surgery refuses, before anything is changed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tnpeft.adapters import Adapter
from tnpeft.adapters.base_weight import dequantiser, needs_weight, unreadable
from tnpeft.adapters.distributed import DISTRIBUTED, UNITS, is_distributed
from tnpeft.adapters.parked import LOOKUPS, MANGLED, own, own_weight
from tnpeft.adapters.processes import flat_part
from tnpeft.adapters.units import is_gathered
from tnpeft.errors import Problem, clip, listed, near_miss
from tnpeft.execution import AdaptedLayer
from tnpeft.network import Layer, Spec, layer_of
from tnpeft.network.look_alikes import kind_name, look_alike, opaque
from tnpeft.network.signature import (
    METHODS,
    STATE_METHODS,
    held_class,
    is_opaque_layer,
    is_plain_tensor,
    kind_of,
    torch_kind,
)
from tnpeft.surgery.adapted_model import AdaptedModel, find, kind_problem
from tnpeft.surgery.tree import Slot, places, plain_modules

__all__ = [
    "SUPPORTED",
    "flat_problem",
    "is_layer",
    "is_opaque",
    "layer_problem",
    "model_problems",
    "name_problems",
    "other_roads",
    "parts_problem",
    "spec_problem",
    "trained_problems",
    "weight_problem",
]

SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = tuple(supported.__name__ for supported in SUPPORTED)
# Tables of a module that hold no other road to a layer.
_OF_MODULES = {"_modules", "_parameters", "_buffers"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATS = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
PARTS = "a DTensor, of which each process holds a part (tensor parallelism)"
_TAKE_OFF = "An adapter would bypass it: take it off first, or match other layers."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def layer_problem(name: str, layer: nn.Module, kinds: Sequence[str] = _KINDS) -> Problem | None:
    """Why `layer` cannot carry an adapter, or None if it can; `kinds` are those that the adapter's spec takes.

    A layer of a kind that only other specs take has no problem here: binding reports it.
    """
    if isinstance(layer, LOOKUPS):
        problem = _table_problem(layer)
        return None if problem is None else replace(problem, layers=(name,))
    problem = _split_problem(layer) or _class_problem(layer, kinds) or _lazy_problem(layer) or _forward_problem(layer)
    problem = problem or _tensor_problem(layer)
    return None if problem is None else replace(problem, layers=(name,))


def spec_problem(name: str, layer: nn.Module, spec: Spec) -> Problem | None:
    """Why `layer` cannot carry an adapter of a spec; None if it can, or is of another kind."""
    problem = layer_problem(name, layer, spec.layers)
    if problem is not None or not needs_weight(spec) or kind_of(layer) not in spec.layers:
        return problem
    hidden = is_opaque_layer(layer) and dequantiser(layer) is None
    return replace(unreadable(spec, layer), layers=(name,)) if hidden else None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer, adaptable or not; containers and modules without parameters are not."""
    if torch_kind(type(module)) is not None or is_opaque(module):
        return True
    return next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None


def is_opaque(module: nn.Module) -> bool:
    """Whether a module is a layer that another library has quantised, adapted or sharded, whatever it holds inside."""
    kind: type = type(module)
    return opaque(kind) is not None or (torch_kind(kind) is None and kind_of(module) is not None)


def _table_problem(embedding: Any) -> Problem | None:
    """Why an embedding cannot be adapted through its weight, or None if it can."""
    kind: type = type(embedding)
    if known := look_alike(kind) or opaque(kind):
        return Problem("layer type", "an embedding of torch", *known)
    weight = embedding._parameters.get("weight")
    if weight is None:
        return Problem("weight", "a parameter", "one that is computed", "Match other layers.")
    if problem := parts_problem(embedding, ["weight"]):
        return problem
    if embedding.max_norm is not None:
        found = f"max_norm={embedding.max_norm:g}, which writes to the weight"
        return Problem(
            "embedding", "one that only reads its weight", found, "Set `max_norm` to None, and clip the rows."
        )
    if embedding.sparse:
        return Problem("embedding", "dense gradients", "`sparse=True`", "Set `sparse` to False: cores take dense ones.")
    return weight_problem(weight)


def _class_problem(layer: nn.Module, kinds: Sequence[str]) -> Problem | None:
    kind: type = type(layer)
    known = look_alike(kind)
    if known is None and torch_kind(kind) is None and kind_of(layer) is None:
        known = opaque(kind) or (kind_name(kind), "Match other layers.")
        if isinstance(layer, nn.MultiheadAttention):
            found = "MultiheadAttention, whose q, k and v weights are parameters of its own"
            known = found, "Adapt its `out_proj`, and the others by their names (`parameters`)."
    return None if known is None else Problem("layer type", f"one of {', '.join(kinds)}", *known)


def _lazy_problem(layer: nn.Module) -> Problem | None:
    if any(map(is_lazy, layer.parameters())):
        found = f"a {type(layer).__name__} without sizes yet"
        return Problem("layer", "known sizes", found, "Run the model once, then attach.")
    return None


def _split_problem(layer: nn.Module) -> Problem | None:
    if DISTRIBUTED not in sys.modules or torch_kind(type(layer)) is None:
        return None
    return parts_problem(layer, layer._parameters)


def parts_problem(owner: nn.Module, keys: Iterable[str]) -> Problem | None:
    """Why parameters cannot be adapted of which each process holds a part even while their owner runs."""
    for key in keys:
        tensor = own(owner, "_parameters", key) if owner._parameters.get(key) is not None else None
        if is_distributed(tensor) and not is_gathered(owner, tensor):
            fix = "Use `fully_shard` in place of it, or split the model after `tnpeft.detach(model, merge=True)`."
            return Problem(f"`{key}`", "a tensor that is whole while its module runs", PARTS, fix)
    return None


def _forward_problem(layer: nn.Module) -> Problem | None:
    """Why a layer cannot be adapted whose `forward` is a method of another module, as some adapters put there."""
    for method in (method for method in (*METHODS, *STATE_METHODS) if method in layer.__dict__):
        owner: type = type(getattr(layer.__dict__[method], "__self__", layer))
        if owner is not type(layer):
            known = look_alike(owner) or (f", with the `{method}` of {owner.__name__}", _TAKE_OFF)
            what = "state dict" if method in STATE_METHODS else "forward"
            expected = f"the {what} of {torch_kind(type(layer)) or kind_name(type(layer))}"
            return Problem("layer", expected, f"{kind_name(type(layer))},{known[0].partition(',')[2]}", known[1])
    return None


def _tensor_problem(layer: nn.Module) -> Problem | None:
    """What is wrong with a layer's tensors; those of an opaque layer may be of any type."""
    weight = layer._parameters.get("weight")
    signature = layer_of(layer)
    if not signature.opaque:
        assert weight is not None
        return weight_problem(weight) or _shape_problem(weight, signature)
    kind = held_class(weight)
    if weight is not None and (look_alike(kind) or (is_plain_tensor(kind) and _is_odd(weight))):
        return weight_problem(weight)
    return None


def _is_odd(weight: Tensor) -> bool:
    return weight.is_complex() or weight.layout != torch.strided


def weight_problem(weight: Tensor) -> Problem | None:
    """Why no update can be added to a base weight, or None if one can: it must be a plain dense tensor of floats."""
    kind: type = type(weight)
    if not is_plain_tensor(kind) and not is_plain_tensor(kind := held_class(weight)):
        found, fix = look_alike(kind) or (f"{kind.__name__}, with operations of its own", "Match other layers.")
        return Problem("weight", "a plain tensor", found, fix)
    if weight.dtype not in _DTYPES:
        fix = "Match other layers." if weight.is_complex() else "Attach to the unquantised model."
        return Problem("weight dtype", f"one of {_FLOATS}", str(weight.dtype).removeprefix("torch."), fix)
    if weight.layout != torch.strided:
        fix = "Give the layer `nn.Parameter(weight.detach().to_dense())`."
        return Problem("weight", "a dense tensor", f"one of {weight.layout}", fix)
    if not _is_dense(weight):
        found = f"strides {tuple(weight.stride())} for the shape {tuple(weight.shape)}"
        fix = "Give the layer `nn.Parameter(weight.detach().contiguous())`."
        return Problem("weight", "memory without gaps or overlaps", found, fix)
    return None


def _shape_problem(weight: Tensor, expected: Layer) -> Problem | None:
    """Why a weight has not its layer's shape: it may have been cut into parts for several devices."""
    shape = tuple(weight.shape)
    if shape == expected.stored_shape:
        return None
    fix = "Attach before the weights are taken apart (by FSDP or ZeRO), or give the layer its whole weight."
    return Problem("weight", f"the shape {expected.stored_shape} of {expected}", str(shape), fix)


def _is_dense(weight: Tensor) -> bool:
    """Whether torch can make a tensor of the same strides, which the exact start needs."""
    step = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def model_problems(model: nn.Module) -> Iterator[Problem]:
    """Why nothing can be attached to `model` itself as it stands."""
    if problem := kind_problem(model):
        yield problem
        return
    if hasattr(model, "_orig_mod") or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        fix = "Attach to the plain model first, then wrap it."
        yield Problem("model", "a plain module", f"a {type(model).__name__}", fix)
        return
    if isinstance(model, (*SUPPORTED, *LOOKUPS, AdaptedLayer)):
        fix = "Put it into a container, for example `torch.nn.Sequential(layer)`, and attach to that."
        yield Problem("model", "a module that holds the layers", f"the layer {type(model).__name__} itself", fix)
        return
    adapted = find(model)
    if adapted is not None and adapted[0] is not model:
        name = next(name for name, module in model.named_modules() if module is adapted[0])
        yield Problem(
            "model", "the model that the other adapters were attached to", f"one that holds it at '{name}'",
            f"Attach to the part '{name}', or detach the other adapters first.",
        )  # fmt: skip
    elif adapted is None and _is_part(model):
        fix = "Attach to that model instead."
        yield Problem("model", "the model that the other adapters were attached to", "a part of it", fix)


def flat_problem(model: nn.Module) -> Problem | None:
    """Why nothing new can be attached to a model that FSDP1 has flattened: it accepts no parameters afterwards."""
    if UNITS not in sys.modules or flat_part(model) is None:
        return None
    found = "one that FullyShardedDataParallel has flattened"
    fix = "Attach to the plain model first, then wrap it; or shard it with `fully_shard`, and attach then."
    return Problem("model", "a plain or `fully_shard`ed module", found, fix)


def _is_part(model: nn.Module) -> bool:
    """Whether something in `model` belongs to adapters of a larger one: a layer, or what trains beside the cores."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            return True
        for key in (*module._parameters, *module._buffers):
            if key.startswith(MANGLED):
                return True
    return False


def name_problems(name: object, state: AdaptedModel) -> Iterator[Problem]:
    """Why an adapter cannot be called `name`, or why none can be attached now."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        expected = "ASCII letters, digits, `_` and `-`, the first a letter or a digit"
        yield Problem("adapter name", expected, clip(name), "Choose another name.")
    elif name in state.adapters:
        fix = "Choose another name, or detach that adapter first."
        yield Problem("adapter name", "a new name", f"'{name}', which is attached already", fix)
    if state.merged:
        yield Problem("model", "an unmerged model", "a merged one", "Call `tnpeft.unmerge(model)` first.")
    if state.disabled:
        fix = "Leave the `disabled` context first."
        yield Problem("model", "enabled adapters", "adapters disabled by `tnpeft.disabled`", fix)


def trained_problems(
    root: nn.Module, parameters: Mapping[str, Slot], targets: Iterable[str], trained: Iterable[str]
) -> Iterator[Problem]:
    """Why some of the parameters cannot train beside the cores."""
    modules = plain_modules(root)
    adapted = {
        id(own_weight(place.module.base)): place.name
        for place in places(root)
        if isinstance(place.module, AdaptedLayer) and _is_held(*place.module.place)
    }
    adapted |= {
        id(own_weight(modules[name])): name
        for name in targets
        if name in modules and modules[name]._parameters.get("weight") is not None
    }
    for name in targets:
        if name in parameters:
            adapted[id(parameters[name].tensor)] = name
    for name in trained:
        where = f"parameter '{name}'"
        if name not in parameters:
            fix = near_miss(name, parameters) or "Use a name from `model.named_parameters()`."
            yield Problem("training", "a parameter of the model", "no such parameter", fix, where=where)
        elif id(parameters[name].tensor) in adapted:
            layer = adapted[id(parameters[name].tensor)]
            fix = "Train the layer as a whole or adapt it, not both."
            yield Problem("training", "a parameter that is not adapted", f"the weight of '{layer}'", fix, where=where)
        elif is_lazy(parameters[name].tensor):
            fix = "Run the model once, then attach."
            yield Problem("training", "a parameter of known size", "one without a size yet", fix, where=where)
        elif problem := parts_problem(parameters[name].owner, [parameters[name].key]):
            yield replace(problem, what="training", where=where)
        elif not parameters[name].tensor.is_floating_point():
            dtype = str(parameters[name].tensor.dtype).removeprefix("torch.")
            fix = "Leave it out."
            yield Problem("training", "a floating-point parameter", dtype, fix, where=where)


def _is_held(owner: nn.Module, table: str, key: str) -> bool:
    return owner.__dict__[table].get(key) is not None


def other_roads(root: nn.Module, layers: Mapping[str, object]) -> Problem | None:
    """A warning where a module holds a layer outside its submodules: calls through it bypass the adapter."""
    names = {id(layer): name for name, layer in layers.items()}
    for place, module in root.named_modules():
        if isinstance(module, (AdaptedLayer, Adapter)):  # what they hold is theirs to call
            continue
        for attribute, value in vars(module).items():
            if attribute in _OF_MODULES or attribute.startswith("_tnpeft"):
                continue
            several = value.values() if isinstance(value, dict) else value
            held = [*several] if isinstance(value, (dict, list, tuple, set)) else [value]
            if not names.keys().isdisjoint(map(id, held)):
                there = [names[id(item)] for item in held if id(item) in names]
                where = f"`{place}.{attribute}`" if place else f"`{attribute}`"
                fix = "Call the layers as submodules there, for example through an `nn.ModuleList` or by their names."
                held_there = f"{listed(there)} in {where} too, where calls meet no adapter"
                return Problem("adapted layers", "ones that are submodules alone", held_there, fix)
    return None
