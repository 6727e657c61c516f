"""What a module is as a layer: its kind and sizes, and whether its weight can be read and replaced.

A layer is *plain* if it computes torch's own function of a plain torch tensor as its weight. It is `turned` if that
weight is stored as (in, out), as in transformers' Conv1D. It is *opaque* if it is anything else with known sizes:
quantised, computed, or with a `forward` of its own. An opaque layer is called as it is; its weight is not read.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tnpeft.errors import BindError, Problem
from tnpeft.network.layer import Layer
from tnpeft.network.look_alikes import by_class, conv1d_of, full_names, kind_name, look_alike, opaque
from tnpeft.spec.pattern import KINDS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["held_class", "is_opaque_layer", "is_own_method", "is_plain_tensor", "kind_of", "layer_of", "torch_kind"]

# What a class may replace of torch's layers: how they compute, and what a state dict has of them.
METHODS = ("forward", "_conv_forward", "_output_padding")
STATE_METHODS = ("get_extra_state", "set_extra_state", "_save_to_state_dict", "_load_from_state_dict")
_ALL = frozenset((*METHODS, *STATE_METHODS))
_OFFLOADED, _FORWARD = "_hf_hook", "_old_forward"
_CONV = re.compile(r"conv(transpose)?([123])d", re.IGNORECASE)
# Parts of the names of classes that do more to the output than their weight does.
_FUSED = re.compile(r"ReLU|GELU|SiLU|GLU|BN|Act|Norm")


def layer_of(module: nn.Module) -> Layer:
    """The signature of a layer, plain or opaque.

    Raises BindError for a module that cannot be adapted, and for a lazy one that has not seen an input.
    """
    kind = torch_kind(type(module)) or kind_of(module)
    if kind is None:
        module_class: type = type(module)
        fix = "Adapt the layers inside it, or train it as a whole with `also`."
        found, fix = opaque(module_class) or (kind_name(module_class), fix)
        raise BindError(Problem("unsupported layer", f"one of {', '.join(KINDS)}", found, fix))
    from torch.nn.parameter import is_lazy

    if any(map(is_lazy, module._parameters.values())):  # type: ignore[arg-type]
        fix = "Run the model once on a sample first."
        raise BindError(Problem("lazy layer", "a weight of known shape", "none yet", fix))
    hidden, turned = is_opaque_layer(module), conv1d_of(type(module)) is not None
    if turned:
        inputs, outputs = module.weight.shape  # type: ignore[misc]
        return Layer(kind, int(inputs), int(outputs), turned=True, opaque=hidden)
    sized: Any = module
    if kind == "Linear":
        return Layer(kind, sized.in_features, sized.out_features, opaque=hidden)
    kernel = tuple(int(size) for size in sized.kernel_size)
    return Layer(kind, sized.in_channels, sized.out_channels, kernel, sized.groups, opaque=hidden)


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module as a layer; None if it is no layer, or has no sizes."""
    module_class: type = type(module)
    kind = torch_kind(module_class)
    if kind is not None:
        return kind
    if look_alike(module_class) is not None:
        return None
    kind = _kind_by_name(module)
    # What holds other layers is none itself.
    return kind if kind is None or not any(True for child in module.children() for _ in child.parameters()) else None


def _kind_by_name(module: nn.Module) -> str | None:
    """The kind of a layer that is not derived from torch's, by its class's name and its attributes for sizes."""
    if conv1d_of(type(module)) is not None:
        weight = module._parameters.get("weight")
        return "Linear" if weight is not None and weight.dim() == 2 else None
    name = type(module).__name__
    found = _CONV.search(name)
    if _FUSED.search(name) or not (found or "linear" in name.lower()):
        return None
    if found is None:
        sizes = [getattr(module, key, None) for key in ("in_features", "out_features")]
        return "Linear" if all(map(_is_size, sizes)) else None
    sizes = [getattr(module, key, None) for key in ("in_channels", "out_channels", "groups")]
    kernel = getattr(module, "kernel_size", None)
    fits = all(map(_is_size, sizes)) and isinstance(kernel, tuple) and len(kernel) == int(found[2])
    return f"Conv{'Transpose' if found[1] else ''}{found[2]}d" if fits else None


def _is_size(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


@by_class
def torch_kind(module_class: type) -> str | None:
    """The kind of torch's layer from which a class is derived; None if there is none."""
    import torch  # only those who have a module pay for the import

    return next((kind for kind in KINDS if issubclass(module_class, getattr(torch.nn, kind))), None)


def is_opaque_layer(module: nn.Module) -> bool:
    """Whether a layer's weight cannot be read and replaced: it is quantised, computed, or used in an unknown way."""
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return True
    if not is_plain_tensor(type(weight)) and not is_plain_tensor(held_class(weight)):
        return True
    known: type = type(module)
    plain = conv1d_of(known) or _torch_class(known)
    if plain is None or not _computes_as(known, plain):
        return True
    replaced = _ALL.intersection(module.__dict__)  # nearly always empty
    return bool(replaced) and not all(is_own_method(module, method) for method in replaced)


@by_class
def _torch_class(module_class: type) -> type | None:
    import torch

    kind = torch_kind(module_class)
    return None if kind is None else getattr(torch.nn, kind)


@lru_cache(maxsize=256)
def _computes_as(module_class: Any, plain: Any) -> bool:
    """Whether a class inherits all methods of the plain one; a class known to be quantised never counts."""
    return all(getattr(module_class, method, None) is getattr(plain, method, None) for method in _ALL)


def is_own_method(layer: nn.Module, method: str) -> bool:
    """Whether an attribute of an instance is its class's own method, bare or within accelerate's hook."""
    replaced = layer.__dict__[method]
    if method == "forward" and _OFFLOADED in layer.__dict__:
        replaced = layer.__dict__.get(_FORWARD)
    bound = getattr(replaced, "__self__", None), getattr(replaced, "__func__", None)
    return bound[0] is layer and bound[1] is getattr(type(layer), method)


def held_class(tensor: Any) -> type:
    """The class of a tensor; for a DTensor, that of the part that this process holds."""
    return type(getattr(tensor, "_local_tensor", tensor))


@by_class
def is_plain_tensor(kind: Any) -> bool:
    """Whether tensors of this class compute as torch's own do; fake tensors, which stand in for such, count."""
    from torch import Tensor, nn

    if any(name.startswith("torch._subclasses.") for name in full_names(kind)):
        return True
    functions = {
        getattr(each.__torch_function__, "__func__", each.__torch_function__) for each in (Tensor, nn.Parameter)
    }
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return function in functions and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
