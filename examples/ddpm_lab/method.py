"""What trains: an adapter, everything, or biases and norms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import tnpeft
from ddpm_lab.config import Base, Method
from ddpm_lab.faults import fault
from ddpm_lab.unet import save_weights

__all__ = ["PAPER_LAYERS", "Trained", "apply_method", "check_method"]

# The layers that the paper adapts. It leaves the middle block out.
PAPER_LAYERS = (
    r"resnets\.\d+\.conv[12]\.conv$|attentions\.\d+\.attn\.to_[qv]$|^time_embed\.2$|resnets\.\d+\.time_emb_proj$"
)
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
        """Write what trained: an adapter file, or the trained tensors."""
        path = folder / self.file_name
        if self.report is not None:
            tnpeft.save(self.unet, path)
        else:
            save_weights(self.unet, path, trained_only=True)
        return path


def check_method(method: Method, base: Base) -> None:
    """Raise TnpeftError where a recipe or spec cannot be read, or the parts of `method` do not fit each other."""
    if method.kind == "adapter":
        if (method.recipe is None) == (method.spec is None):
            found = "neither" if method.recipe is None else "both"
            raise fault("method", "the adapter", "`recipe` or `spec`", found, "Give one of the two.")
        if method.spec is not None and method.match is None:
            fix = "Give the regular expression of the layers to adapt."
            raise fault("method.match", "the layers of a spec", "a regular expression", "nothing", fix)
        if method.recipe is not None:
            tnpeft.load_recipe(method.recipe)
        else:
            tnpeft.load_spec(method.spec or "")
    if method.match is not None:
        try:
            re.compile(method.match)
        except re.error as error:
            raise fault("method.match", "the layers", "a regular expression", str(error), "Mend it.") from None
    if method.kind != "full" and base.checkpoint is None:
        expected = "a pretrained model's checkpoint"
        fix = "Pass `--set base.checkpoint=FILE`, or train from nothing with `--set method.kind=full`."
        raise fault("base.checkpoint", f"the base of method `{method.kind}`", expected, "nothing", fix)


def apply_method(unet: nn.Module, method: Method) -> Trained:
    """Make exactly the method's parameters of `unet` trainable; raises TnpeftError or LabError."""
    total = sum(parameter.numel() for parameter in unet.parameters())
    if method.kind == "adapter":
        handle = _attach(unet, method)
        title = method.recipe or method.spec or ""
        return Trained(unet, Path(title).stem, "adapter.safetensors", _trainable(unet), total, handle.report())
    if method.kind == "full":
        unet.requires_grad_(True)
        return Trained(unet, "full fine-tuning", "model.safetensors", _trainable(unet), total)
    _train_biases_and_norms(unet, re.compile(method.match or PAPER_LAYERS))
    return Trained(unet, "biases and norms", "bias_norm.safetensors", _trainable(unet), total)


def _attach(unet: nn.Module, method: Method) -> Any:
    """A recipe, or a spec on the layers that match."""
    if method.recipe is not None:
        return tnpeft.attach(unet, tnpeft.load_recipe(method.recipe), mode=method.mode, **method.params)
    assert method.spec is not None
    train = {"bias": "adapted", "norm": True} if method.train == "bias_norm" else None
    return tnpeft.attach(unet, method.spec, match=method.match, train=train, mode=method.mode, **method.params)


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
