"""What trains: an adapter, everything, or biases and norms."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import tnpeft
import tnpeft.surgery
from ddpm_lab.config.settings import Base, Method, Model
from ddpm_lab.model.sharding import whole_tensors
from ddpm_lab.model.starts import recipe_from, spec_from
from ddpm_lab.model.unet import build_unet
from ddpm_lab.support.durable import write_tensors
from ddpm_lab.support.faults import fault

__all__ = ["PAPER_JOINT", "PAPER_LAYERS", "Trained", "apply_method", "check_fit", "check_method", "check_parts"]

# The layers that the paper adapts. It leaves the middle block out.
PAPER_LAYERS = (
    r"resnets\.\d+\.conv[12]\.conv$|attentions\.\d+\.attn\.to_[qv]$|^time_embed\.2$|resnets\.\d+\.time_emb_proj$"
)
# What the paper's joint fine-tuning (Table 2) trains whole beside the adapters: for `method.also`.
PAPER_JOINT = (
    r"attentions\.\d+\.attn\.(to_k|out_proj)\.",
    r"resnets\.\d+\.skip_connection\.conv\.",
    r"downsampler\.op\.conv\.",
    r"upsampler\.postconv\.conv\.",
)
ZERO_SCALE = ", update scaled by 0: biases and norms alone learn"
ADAPTER = "adapter.safetensors"
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm3d)


@dataclass(frozen=True)
class Trained:
    """What `apply_method` made trainable in `unet`."""

    unet: nn.Module
    title: str
    file_name: str
    parameters: int
    total: int  # of the base model
    report: Any | None = None  # tnpeft's, printable by rich or as text

    def save(self, folder: Path) -> Path:
        """Write what trained: an adapter file, or the trained tensors.

        Of a sharded model every process comes here, and the first one writes.
        """
        path = folder / self.file_name
        if self.report is not None:
            tnpeft.save(self.unet, path)
        else:
            named = self.unet.named_parameters()
            tensors = whole_tensors({name: tensor for name, tensor in named if tensor.requires_grad})
            if tensors:
                write_tensors(path, tensors)
        return path


def check_method(method: Method, base: Base) -> None:
    """Raise TnpeftError where a method cannot be read, its parts do not fit each other, or it has no base."""
    check_parts(method)
    if method.kind != "full" and base.checkpoint is None:
        expected = "a pretrained model's checkpoint"
        fix = "Pass `--set base.checkpoint=FILE`, or train from nothing with `--set method.kind=full`."
        raise fault("base.checkpoint", f"the base of method `{method.kind}`", expected, "nothing", fix)


def check_parts(method: Method) -> None:
    """Raise TnpeftError where a recipe or spec cannot be read, or the parts of `method` do not fit each other."""
    if method.kind == "adapter":
        if (method.recipe is None) == (method.spec is None):
            found = "neither" if method.recipe is None else "both"
            raise fault("method", "the adapter", "`recipe` or `spec`", found, "Give one of the two.")
        if method.spec is not None and method.match is None:
            fix = "Give the regular expression of the layers to adapt."
            raise fault("method.match", "the layers of a spec", "a regular expression", "nothing", fix)
        if method.recipe is not None:
            _recipe(method)
        else:
            _spec(method)
    if method.match is not None:
        try:
            re.compile(method.match)
        except re.error as error:
            raise fault("method.match", "the layers", "a regular expression", str(error), "Mend it.") from None
    _check_extras(method)


def check_fit(model: Model, base: Base, method: Method) -> None:
    """Raise TnpeftError where a method does not fit the model: its layers, params and patterns. No memory is needed."""
    with torch.device("meta"):
        apply_method(build_unet(model, base), method)


def _check_extras(method: Method) -> None:
    """`also`, `zero_scale` and `start_std` say something about an adapter."""
    parts = {"also": bool(method.also), "zero_scale": method.zero_scale, "start_std": method.start_std is not None}
    for name, given in parts.items():
        if given and method.kind != "adapter":
            raise fault(f"method.{name}", "the method", "an adapter", f"`{method.kind}`", f"Remove `method.{name}`.")
    if method.zero_scale and method.spec is not None and method.train == "cores" and not method.also:
        fix = "Set `method.train=bias_norm`."
        raise fault("method.zero_scale", "what trains", "something beside the cores", "the cores alone", fix)


def apply_method(unet: nn.Module, method: Method, saved: Path | None = None) -> Trained:
    """Make exactly the method's parameters of `unet` trainable; raises TnpeftError or LabError.

    With `saved`, a folder that `Trained.save` wrote to, they go on from the values there.
    """
    total = sum(parameter.numel() for parameter in unet.parameters())
    if method.kind == "adapter":
        handle = _attach(unet, method) if saved is None else tnpeft.load(unet, saved / ADAPTER)
        title, trainable = _title(method), _trainable(unet)
        if method.zero_scale:
            _freeze_cores(unet, handle.name)
        return Trained(unet, title, ADAPTER, trainable, total, handle.report())
    if method.kind == "full":
        unet.requires_grad_(True)
        trained = Trained(unet, "full fine-tuning", "model.safetensors", _trainable(unet), total)
    else:
        _train_biases_and_norms(unet, re.compile(method.match or PAPER_LAYERS))
        trained = Trained(unet, "biases and norms", "bias_norm.safetensors", _trainable(unet), total)
    if saved is not None:
        _read(unet, saved / trained.file_name)
    return trained


@torch.no_grad()
def _read(unet: nn.Module, path: Path) -> None:
    for name, value in load_file(path).items():
        unet.get_parameter(name).copy_(value)


def _title(method: Method) -> str:
    title = Path(method.recipe or method.spec or "").stem
    joint = " + joint layers" if method.also else ""
    return f"{title}{joint}{ZERO_SCALE if method.zero_scale else ''}"


def _freeze_cores(unet: nn.Module, name: str) -> None:
    """Scale the update by zero: it starts as zero, and cores that would get zero gradients may as well rest."""
    for adapter in tnpeft.surgery.adapters_of(unet, name).values():
        adapter.requires_grad_(False)


def _attach(unet: nn.Module, method: Method) -> Any:
    """A recipe, or a spec on the layers that match; with what trains whole beside it."""
    if method.recipe is not None:
        recipe = _recipe(method)
        recipe = replace(recipe, train=replace(recipe.train, also=(*recipe.train.also, *method.also)))
        return tnpeft.attach(unet, recipe, mode=method.mode, **method.params)
    train = {"bias": "adapted", "norm": True} if method.train == "bias_norm" else {}
    train |= {"also": list(method.also)}
    return tnpeft.attach(unet, _spec(method), match=method.match, train=train, mode=method.mode, **method.params)


def _recipe(method: Method) -> tnpeft.Recipe:
    recipe = tnpeft.load_recipe(method.recipe or "")
    return recipe if method.start_std is None else recipe_from(recipe, method.start_std)


def _spec(method: Method) -> tnpeft.Spec:
    spec = tnpeft.load_spec(method.spec or "")
    return spec if method.start_std is None else spec_from(spec, method.start_std)


def _train_biases_and_norms(unet: nn.Module, match: re.Pattern[str]) -> None:
    """The biases of the matching layers and all norms: what a recipe trains beside its adapters."""
    unet.requires_grad_(False)
    layers = 0
    for name, module in unet.named_modules():
        if isinstance(module, NORMS):
            module.requires_grad_(True)
        elif match.search(name) and isinstance(getattr(module, "bias", None), nn.Parameter):
            module.get_parameter("bias").requires_grad_(True)
            layers += 1
    if not layers:
        fix = "Compare it with `unet.named_modules()`."
        raise fault("method.match", "the layers", "at least one layer with a bias", f"none for {match.pattern!r}", fix)


def _trainable(unet: nn.Module) -> int:
    return sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
