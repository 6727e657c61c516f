"""The base layer's weight, as adapters need it: its own, dequantised, or only its device, shape and dtype.

Cores are on the base weight's device. Some networks also need its values. Those of an opaque layer are known only if
the library that made it gives them back.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from tnpeft.adapters.inits import OF_WEIGHT, canonical_weight
from tnpeft.adapters.missing_values import without_values
from tnpeft.adapters.parked import ParameterLayer, own_weight
from tnpeft.errors import BindError, Problem
from tnpeft.network import Layer, Network, layer_of
from tnpeft.network.look_alikes import full_names, kind_name, quantised
from tnpeft.network.signature import is_plain_tensor, torch_kind

__all__ = [
    "base_weight",
    "beside",
    "dequantised",
    "dequantiser",
    "described",
    "is_packed_for_inference",
    "needs_weight",
    "never_called",
    "stand_in",
    "unreadable",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOUR_BITS = "bitsandbytes.nn.modules.Params4bit"


def base_weight(layer: Any, network: Network) -> Tensor:
    """The base weight for a network of `layer`; for an opaque layer, with values only if the network needs them.

    Otherwise it is a tensor without values, of the weight's shape, device and width. Raises BindError if values are
    needed that cannot be read.
    """
    if not network.layer.opaque:
        return own_weight(layer)
    if not needs_weight(network.spec):
        return stand_in(layer, network.layer)
    weight = dequantised(layer, network.layer)
    if weight is None:
        raise BindError(unreadable(network.spec, layer))
    return weight


def needs_weight(spec: Any) -> bool:
    """Whether adapters of a spec need the base weight's values, at the start or in every call."""
    cores = (core.origin is not None or core.init.name in OF_WEIGHT for core in spec.cores)
    return spec.compose is not None or spec.start_std is not None or any(cores)


def unreadable(spec: Any, layer: nn.Module) -> Problem:
    """The problem of an opaque layer whose weight a spec needs and cannot get."""
    fix = "Use a spec that does not read the weight, such as `lora`, or match other layers."
    return Problem(f"spec '{spec.name}'", "a base weight that can be read", described(layer), fix)


def never_called(layer: nn.Module | ParameterLayer) -> str | None:
    """In words, what a layer is that is never called itself; None for all others.

    `nn.MultiheadAttention` reads the weight of its output projection, and the owner of an adapted parameter reads it.
    """
    if isinstance(layer, ParameterLayer):
        return "an embedding" if layer.is_whole else "a parameter that its owner reads"
    return "the output projection of an attention" if isinstance(layer, NonDynamicallyQuantizableLinear) else None


def described(layer: nn.Module) -> str:
    """What an opaque layer is, for a message."""
    kind, weight = type(layer), layer._parameters.get("weight")
    if known := quantised(kind):
        return known
    if weight is not None and not is_plain_tensor(type(weight)):
        tensor = type(weight)
        return quantised(tensor) or f"{kind_name(kind)}, whose weight is a {tensor.__name__}"
    if is_computed(layer):
        return f"{kind_name(kind)}, whose weight is computed"
    return f"{kind_name(kind)}, with a `forward` of its own"


def dequantised(layer: nn.Module, signature: Layer | None = None) -> Tensor | None:
    """The weight of an opaque layer as a new plain tensor, if its library gives it; else None."""
    give = dequantiser(layer)
    if give is None:
        return None
    with torch.inference_mode(False), torch.no_grad():
        weight = give()
    shape = (signature or layer_of(layer)).stored_shape
    if not isinstance(weight, Tensor) or tuple(weight.shape) != shape or weight.dtype not in _FLOATS:
        return None
    return weight.detach().clone(memory_format=torch.contiguous_format)


def dequantiser(layer: Any) -> Callable[[], object] | None:
    """The function that gives an opaque layer's weight, or None."""
    weight = layer._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter:
        return _of_tensor(layer, weight)
    own = next((full for full in full_names(type(layer)) if full.startswith("hqq.")), None)
    if own is not None:
        return layer.dequantize  # type: ignore[no-any-return]
    computed = getattr(layer, "weight", None)
    if callable(computed) and not isinstance(computed, Tensor):  # torch.ao's
        return lambda: computed().dequantize()
    if is_computed(layer) and torch_kind(type(layer)) is not None:
        return lambda: _computed(layer)
    return None


def _of_tensor(layer: Any, weight: Any) -> Callable[[], object] | None:
    names = full_names(type(weight))
    functional = getattr(sys.modules.get("bitsandbytes"), "functional", None)
    if _FOUR_BITS in names:
        state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
        return None if state is None else lambda: _from_four_bits(functional, weight.data, copy.copy(state))
    if "bitsandbytes.nn.modules.Int8Params" in names:
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB
        dtype = torch.float16 if layer.bias is None else layer.bias.dtype
        return None if scales is None else lambda: (weight.data.float() * (scales.view(-1, 1) / 127)).to(dtype)
    made_so = [each for each in type(weight).__mro__ if each not in (nn.Parameter, *Tensor.__mro__)]
    return weight.dequantize if any("dequantize" in vars(each) for each in made_so) else None


def _from_four_bits(functional: Any, codes: Tensor, state: Any) -> object:
    if getattr(state, "packing_format_for_cpu", False):
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    return functional.dequantize_4bit(codes, state)


def is_packed_for_inference(layer: Any) -> bool:
    """Whether calls cannot be differentiated, as after bitsandbytes has packed 4-bit weights for some CPUs."""
    weight = layer._parameters.get("weight")
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) is True


def is_computed(layer: nn.Module) -> bool:
    """Whether a weight or bias is computed from other parameters, when it is read or before each call."""
    return parametrize.is_parametrized(layer) or any(True for _ in _hooks(layer))


def _computed(layer: nn.Module) -> object:
    for hook in _hooks(layer):
        made = getattr(hook, "compute_weight", None)
        if made is None:
            return hook.apply_mask(layer)  # pruning
        return made(layer, False) if hasattr(hook, "n_power_iterations") else made(layer)
    return layer.weight


def _hooks(layer: nn.Module) -> Iterator[Any]:
    """The hooks of torch that set the weight before each call: the old weight and spectral norm, and pruning."""
    for hook in layer._forward_pre_hooks.values():
        if "weight" in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            yield hook


def stand_in(layer: nn.Module, signature: Layer) -> Tensor:
    """A tensor without values for the weight of an opaque layer, with its shape and device and the cores' width."""
    tensors = [*layer._parameters.values(), *layer._buffers.values(), *layer.parameters()]
    known = [tensor for tensor in tensors if tensor is not None]
    floats = [tensor.dtype for tensor in known if tensor.dtype in _FLOATS]
    device = known[0].device if known else torch.device("cpu")
    dtype = torch.float64 if torch.float64 in floats else torch.float32
    return torch.empty(1, dtype=dtype, device=device).expand(signature.stored_shape)


def beside(network: Network, tensors: Sequence[Tensor | None], base: Tensor, layer_name: str) -> list[Tensor]:
    """Cores on the device of the `base` weight, which replaces None; shared cores may be elsewhere, or wider.

    Raises ExecutionError for cores without values.
    """
    stored = [tensor for tensor in tensors if tensor is not None]
    if not base.is_meta and any(tensor.is_meta for tensor in stored):
        raise without_values(layer_name, True)
    dtype = torch.promote_types(torch.float32, base.dtype)
    for tensor in stored:
        dtype = torch.promote_types(dtype, tensor.dtype if tensor.is_floating_point() else dtype)
    placed = []
    for known, core in zip(tensors, network.cores, strict=True):
        one = canonical_weight(network.layer, base).reshape(core.shape) if known is None else known
        placed.append(one.to(base.device, dtype if one.is_floating_point() else one.dtype))
    return placed
