"""A stand-in for a model of which only the checkpoint is known: layers are guessed from names and shapes of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tnpeft.errors import AttachError, Problem, clip
from tnpeft.io.manifest import FITTED_AS
from tnpeft.surgery import adapted, adapters_of

__all__ = ["note_layers", "skeleton_of"]

_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}  # by the axes of their weights
_STATISTICS = ("running_mean", "running_var")
_DEEPEST = 64  # modules in modules


def skeleton_of(checkpoint: Mapping[str, Tensor]) -> nn.Module:
    """Modules on the meta device with the checkpoint's tensors, under their names.

    `x.weight` with two axes makes `x` a Linear, with three to five axes a convolution without groups, if there is
    nothing else but `x.bias`. Running statistics make a BatchNorm. All else becomes parameters or, if not floating,
    buffers. Raises AttachError for names that no model has.
    """
    tree: dict[str, Any] = {}
    for name in checkpoint:
        *owners, key = name.split(".")
        place = tree
        for owner in owners:
            place = place.setdefault(owner, {})
            if not isinstance(place, dict) or len(owners) > _DEEPEST:
                raise _odd(name)
        if key in place:
            raise _odd(name)
        place[key] = checkpoint[name].to("meta")
    return _module(tree, "")


def note_layers(model: nn.Module, name: str) -> None:
    """Note in the adapter's file which layer each was taken for: `load` refuses a model with another layer there."""
    _, state = adapted(model)
    record = state.adapters[name]
    layers = {layer: str(adapter.network.layer) for layer, adapter in adapters_of(model, name).items()}
    state.adapters[name] = replace(record, about={**record.about, FITTED_AS: layers})


def _module(tree: Mapping[str, Any], where: str) -> nn.Module:
    layer = _layer(tree) if where else None
    if layer is not None:
        return layer
    module = nn.Module()
    for key, value in tree.items():
        name = f"{where}.{key}" if where else key
        try:
            if not isinstance(value, Tensor):
                module.add_module(key, _module(value, name))
            elif value.is_floating_point():
                module.register_parameter(key, nn.Parameter(value))
            else:
                module.register_buffer(key, value)
        except KeyError as error:  # a name that modules have for something else
            raise _odd(name) from error
    return module


def _layer(tree: Mapping[str, Any]) -> nn.Module | None:
    """The Linear, convolution or BatchNorm that has these tensors; None where there is none."""
    weight, bias = tree.get("weight"), tree.get("bias")
    if _is_batch_norm(tree):
        mean = tree["running_mean"]
        return nn.BatchNorm1d(len(mean), affine=weight is not None, device="meta", dtype=mean.dtype)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or not tree.keys() <= {"weight", "bias"}:
        return None
    if bias is not None and not (isinstance(bias, Tensor) and bias.shape == weight.shape[:1]):
        return None
    how: dict[str, Any] = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    if weight.dim() == 2 and weight.numel():
        return nn.Linear(weight.shape[1], weight.shape[0], **how)
    if weight.dim() in _CONVOLUTIONS and weight.numel():
        convolution: nn.Module = _CONVOLUTIONS[weight.dim()](weight.shape[1], weight.shape[0], weight.shape[2:], **how)
        return convolution
    return None


def _is_batch_norm(tree: Mapping[str, Any]) -> bool:
    """Whether nothing is missing that a BatchNorm has, in its shapes."""
    numbers = {name: value for name, value in tree.items() if name != "num_batches_tracked"}
    if numbers.keys() not in ({*_STATISTICS}, {*_STATISTICS, "weight", "bias"}) or len(numbers) == len(tree):
        return False
    if not all(isinstance(value, Tensor) for value in tree.values()) or tree["num_batches_tracked"].dim():
        return False
    mean = numbers["running_mean"]
    alike = all(value.shape == mean.shape and value.is_floating_point() for value in numbers.values())
    return alike and mean.dim() == 1 and mean.numel() > 0


def _odd(name: str) -> AttachError:
    return AttachError(Problem("checkpoint", "names as a model's tensors have", clip(name), "Name the model: --model."))
