"""What surgery refuses, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tnpeft.errors import Problem, near_miss
from tnpeft.modules import AdaptedLayer, Adapter
from tnpeft.modules.distributed import is_distributed
from tnpeft.modules.offload import is_own_forward
from tnpeft.modules.parked import MANGLED, own_weight
from tnpeft.network import layer_of
from tnpeft.spec.document import clip
from tnpeft.surgery.state import ModelState, find, kind_problem
from tnpeft.surgery.tree import Slot, places, plain_modules

__all__ = ["SUPPORTED", "layer_problem", "model_problems", "name_problems", "target_problems", "trained_problems"]

SUPPORTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_METHODS = ("forward", "_conv_forward", "_output_padding")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def layer_problem(name: str, layer: nn.Module) -> Problem | None:
    """Why `layer` cannot carry an adapter, or None if it can."""
    kind, where = type(layer).__name__, f"layer '{name}'"
    plain = next((supported for supported in SUPPORTED if isinstance(layer, supported)), None)
    if plain is None:
        kinds = ", ".join(supported.__name__ for supported in SUPPORTED)
        return Problem("layer type", f"one of {kinds}", kind, "Match other layers.", where=where)
    if parametrize.is_parametrized(layer) or not {"weight", "bias"} <= layer._parameters.keys():
        fix = "Remove the parametrization (weight norm, spectral norm, pruning) before attaching."
        return Problem("layer", "`weight` and `bias` as plain parameters", "ones that are computed", fix, where=where)
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        return Problem(
            "layer", "known sizes", f"a {kind} without sizes yet", "Run the model once, then attach.", where=where
        )
    for method in _METHODS:
        bypassed = method in layer.__dict__ and not is_own_forward(layer, method)
        if bypassed or getattr(type(layer), method, None) is not getattr(plain, method, None):
            found = f"{kind} with a `{method}` of its own"
            fix = "An adapter would bypass it: match other layers, or use the plain class."
            return Problem("layer", f"the forward of {plain.__name__}", found, fix, where=where)
    if any(map(is_distributed, layer.parameters())):
        found = f"a {plain.__name__} of DTensors, of which each process holds a part (FSDP2, tensor parallelism)"
        fix = "Attach to the whole model, and train it in DistributedDataParallel."
        return Problem("layer", "`weight` and `bias` as plain parameters", found, fix, where=where)
    dtype = layer.weight.dtype
    if dtype not in _DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        found = str(dtype).removeprefix("torch.")
        return Problem("weight dtype", f"one of {known}", found, "Attach to the unquantised model.", where=where)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not _is_dense(weight):
        found = f"strides {tuple(weight.stride())} for the shape {tuple(weight.shape)}"
        fix = "Give the layer `nn.Parameter(weight.detach().contiguous())`."
        return Problem("weight", "memory without gaps or overlaps", found, fix, where=where)
    return None


def _is_dense(weight: Tensor) -> bool:
    """Whether torch can make a tensor of the same strides, which the exact start takes."""
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
    if isinstance(model, (*SUPPORTED, AdaptedLayer)):
        fix = "Put it into a container, for example `torch.nn.Sequential(layer)`, and attach to that."
        yield Problem("model", "a module that holds the layers", f"the layer {type(model).__name__} itself", fix)
        return
    found = find(model)
    if found is not None and found[0] is not model:
        name = next(name for name, module in model.named_modules() if module is found[0])
        yield Problem(
            "model", "the model that the other adapters were attached to", f"one that holds it at '{name}'",
            f"Attach to the part '{name}', or detach the other adapters first.",
        )  # fmt: skip
    elif found is None and _is_part(model):
        fix = "Attach to that model instead."
        yield Problem("model", "the model that the other adapters were attached to", "a part of it", fix)


def _is_part(model: nn.Module) -> bool:
    """Whether something in `model` belongs to adapters of a larger one: a layer, or what trains beside the cores."""
    if any(isinstance(place.module, AdaptedLayer) for place in places(model)):
        return True
    keys = (key for module in model.modules() for key in (*module._parameters, *module._buffers))
    return any(key.startswith(MANGLED) for key in keys)


def name_problems(name: object, state: ModelState) -> Iterator[Problem]:
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


def target_problems(root: nn.Module, targets: Mapping[str, Adapter]) -> Iterator[Problem]:
    """Why some of the targets cannot be adapted."""
    modules = plain_modules(root)
    adapted = [place.name for place in places(root) if isinstance(place.module, AdaptedLayer)]
    claimed: dict[int, str] = {}
    for name, adapter in targets.items():
        where = f"layer '{name}'"
        layer = modules.get(name)
        if layer is None:
            outer = next((outer for outer in adapted if name.startswith(outer + ".")), None)
            found = "no such layer" if outer is None else f"a part of the adapted layer '{outer}'"
            fix = near_miss(name, modules) or "Use a name from `model.named_modules()`."
            fix = fix if outer is None else f"Name '{outer}' itself."
            yield Problem("target", "a layer of the model", found, fix, where=where)
            continue
        problem = layer_problem(name, layer)
        if problem is not None:
            yield problem
        elif id(layer) in claimed:
            found = f"the layer that is also called '{claimed[id(layer)]}'"
            yield Problem("target", "a layer of its own", found, "Name it once: it is adapted at both.", where=where)
        elif adapter.network.layer != layer_of(layer):
            fix = "Compile the adapter for this layer."
            yield Problem("adapter", f"one for {layer_of(layer)}", f"one for {adapter.network.layer}", fix, where=where)
        claimed[id(layer)] = name


def trained_problems(
    root: nn.Module, found: Mapping[str, Slot], targets: Iterable[str], trained: Iterable[str]
) -> Iterator[Problem]:
    """Why some of the parameters cannot train beside the cores."""
    modules = plain_modules(root)
    adapted = {
        id(own_weight(place.module.base)): place.name
        for place in places(root)
        if isinstance(place.module, AdaptedLayer)
    }
    adapted |= {
        id(own_weight(modules[name])): name
        for name in targets
        if name in modules and modules[name]._parameters.get("weight") is not None
    }
    for name in trained:
        where = f"parameter '{name}'"
        if name not in found:
            fix = near_miss(name, found) or "Use a name from `model.named_parameters()`."
            yield Problem("training", "a parameter of the model", "no such parameter", fix, where=where)
        elif id(found[name].tensor) in adapted:
            layer = adapted[id(found[name].tensor)]
            fix = "Train the layer as a whole or adapt it, not both."
            yield Problem("training", "a parameter that is not adapted", f"the weight of '{layer}'", fix, where=where)
        elif is_lazy(found[name].tensor):
            fix = "Run the model once, then attach."
            yield Problem("training", "a parameter of known size", "one without a size yet", fix, where=where)
        elif not found[name].tensor.is_floating_point():
            dtype = str(found[name].tensor.dtype).removeprefix("torch.")
            fix = "Leave it out."
            yield Problem("training", "a floating-point parameter", dtype, fix, where=where)
