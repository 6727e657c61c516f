"""MONAI's DiffusionModelUNet from a configuration, and its checkpoints."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_lab.base_file import FIX, model_tensors, name_some
from ddpm_lab.config import Base, Model
from ddpm_lab.durable import write_tensors
from ddpm_lab.faults import fault, raise_all
from tnpeft.errors import Problem

__all__ = ["build_unet", "divisor", "load_base", "recompute_activations", "save_weights"]

FEW = 2  # tensors that a message names one by one
OLD = "--set base.old_generative=true"


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


def load_base(unet: DiffusionModelUNet, base: Base, note: Callable[[str], None] = lambda _: None) -> None:
    """Load the base checkpoint into `unet`; raises LabError that says what differs and leaves `unet` as it was.

    `note` is told which part of the file was taken, and what else is in it.
    """
    assert base.checkpoint is not None
    own = unet.state_dict()
    state = model_tensors(base.checkpoint, [*own], note)
    if base.old_generative:
        _load_old(unet, state, base.checkpoint)
        return
    raise_all(_differences(own, state, base.checkpoint), str(base.checkpoint))
    unet.load_state_dict(state)


def _differences(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: Path) -> list[Problem]:
    """What differs: one or two tensors by name, more of them as counts with a few names."""
    missing = [name for name in own if name not in state]
    foreign = [name for name in state if name not in own]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    fix = _advice(own, state, missing, [*other, *foreign])
    if len(missing) + len(foreign) + len(other) <= FEW:
        names = [*(name for name in own if name in missing or name in other), *foreign]
        return [Problem(f"tensor `{name}`", _shape(own, name), _shape(state, name), fix, str(path)) for name in names]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({name_some(missing)})")
    if other:
        first = f"{_shape(state, other[0])} for {_shape(own, other[0])}"
        parts.append(f"{len(other)} of other sizes ({name_some(other)}; the first {first})")
    if foreign:
        parts.append(f"{len(foreign)} that it has not ({name_some(foreign)})")
    return [Problem("the base's tensors", f"the {len(own)} of this model", ", ".join(parts), fix, str(path))]


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    return "x".join(map(str, tensors[name].shape)) if name in tensors else "no such tensor"


def _advice(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], missing: Sequence[str], wrong: Sequence[str]
) -> str:
    """What to set, by what the checkpoint looks like."""
    if any(name.endswith(".proj_attn.weight") for name in state):
        return f"It was written with monai-generative: pass `{OLD}`."
    projections = {name for name in own if ".attn.out_proj." in name}
    if projections and projections.isdisjoint(state):
        more = "" if projections.issuperset(missing) and not wrong else ", and set `model` to the checkpoint's"
        return f"It has no `attn.out_proj`, as models of monai-generative: pass `{OLD}`{more}."
    first = state.get("conv_in.conv.weight")
    if first is not None and first.dim() == 5 and first.shape[1] != 1:
        return f"Give a model of volumes with one channel: this one takes {first.shape[1]}, and no setting does that."
    if any(name.startswith("class_embedding.") or ".transformer_blocks." in name for name in wrong):
        return "Give a model without classes and conditions: this one has them, and no setting does that."
    return FIX


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
