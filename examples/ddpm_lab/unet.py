"""MONAI's DiffusionModelUNet from a configuration, and its checkpoints."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_lab.config import Base, Model
from ddpm_lab.durable import write_tensors
from ddpm_lab.faults import fault, raise_all
from tnpeft.errors import Problem

__all__ = ["build_unet", "divisor", "load_base", "recompute_activations", "save_weights"]

FIX = "Give the checkpoint of this model, or set `model` to the checkpoint's."


def build_unet(model: Model, base: Base | None = None, seed: int = 0) -> DiffusionModelUNet:
    """The network of `model` with fresh weights, the same for the same seed; raises LabError."""
    levels = len(model.channels)
    for name in ("attention_levels", "head_channels"):
        count = len(getattr(model, name))
        if count != levels:
            raise fault(
                f"model.{name}", "its length", f"{levels} values, as `channels` has", str(count), "Add or remove."
            )
    if any(channels % model.norm_groups for channels in model.channels):
        expected = f"multiples of `norm_groups`, {model.norm_groups}"
        raise fault("model.channels", "channels", expected, str(list(model.channels)), "Change either.")
    if model.head_channels[-1] == 0 or any(
        attends and (head == 0 or channels % head)
        for attends, head, channels in zip(model.attention_levels, model.head_channels, model.channels, strict=True)
    ):
        expected = "divisors of `channels` where a level attends, and on the last level (the middle block attends)"
        raise fault(
            "model.head_channels", "channels of a head", expected, str(list(model.head_channels)), "Change them."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffusionModelUNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=model.channels,
            attention_levels=model.attention_levels,
            num_head_channels=model.head_channels,
            num_res_blocks=model.res_blocks,
            norm_num_groups=model.norm_groups,
            norm_eps=model.norm_eps,
            use_flash_attention=model.flash_attention,
            # monai-generative defines a projection after attention and never applies it.
            include_fc=not (base is not None and base.old_generative),
        )


def divisor(model: Model) -> int:
    """Every axis of a volume must be a multiple of this: the network halves it between levels."""
    return int(2 ** (len(model.channels) - 1))


def load_base(unet: DiffusionModelUNet, base: Base) -> None:
    """Load the base checkpoint into `unet`; raises LabError that says what differs and leaves `unet` as it was."""
    assert base.checkpoint is not None
    state = _read(base.checkpoint)
    if base.old_generative:
        _load_old(unet, state, base.checkpoint)
        return
    raise_all(_differences(unet.state_dict(), state, base.checkpoint), str(base.checkpoint))
    unet.load_state_dict(state)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, whatever it is wrapped in; nothing but tensors is ever unpickled."""
    if not path.is_file():
        raise fault(path, "`base.checkpoint`", "a file", "nothing there", "Check the path.")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        found = " ".join(str(error).split())[:120] or type(error).__name__
        raise fault(path, "`base.checkpoint`", "a safetensors file or a state dict", found, "Check the file.") from None
    for wrapper in ("state_dict", "model_state_dict", "model", "unet"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise fault(path, "`base.checkpoint`", "a mapping of names to tensors", type(content).__name__, FIX)
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _differences(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: Path) -> list[Problem]:
    old = any(name.endswith(".proj_attn.weight") for name in state)
    fix = "It was written with monai-generative: pass `--set base.old_generative=true`." if old else FIX
    problems = []
    for name in [*own, *(name for name in state if name not in own)]:
        expected = "x".join(map(str, own[name].shape)) if name in own else "no such tensor"
        found = "x".join(map(str, state[name].shape)) if name in state else "no such tensor"
        if expected != found:
            problems.append(Problem(f"tensor `{name}`", expected, found, fix, str(path)))
    return problems


def _load_old(unet: DiffusionModelUNet, state: dict[str, torch.Tensor], path: Path) -> None:
    """A monai-generative checkpoint: MONAI renames its tensors, and takes them out of the dict it is given."""
    left = dict(state)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            unet.load_old_state_dict(left)
    except (KeyError, RuntimeError) as error:
        unet.load_state_dict(before)
        found = " ".join(str(error).split())[:160]
        new = any(".attn.to_q." in name for name in state)
        fix = "It was written with MONAI itself: pass `--set base.old_generative=false`." if new else FIX
        raise fault(path, "`base.checkpoint`", "the tensors of this model in monai-generative", found, fix) from None
    unused = [name for name in left if ".proj_attn." not in name and name not in before]
    if unused:
        unet.load_state_dict(before)
        raise fault(path, "`base.checkpoint`", "no other tensors", f"`{unused[0]}`", FIX)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's tensors as safetensors, whole or not at all."""
    write_tensors(path, module.state_dict())


def recompute_activations(unet: DiffusionModelUNet) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them."""
    blocks = [*unet.down_blocks, unet.middle_block, *unet.up_blocks]
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Any) -> Any:
    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return run
