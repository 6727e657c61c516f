"""MONAI's DiffusionModelUNet from a configuration, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_lab.config.settings import Base, Model
from ddpm_lab.model.base_file import FIX, model_tensors, name_some
from ddpm_lab.support.durable import write_tensors
from ddpm_lab.support.faults import fault, raise_all
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
    raise_all(_differences(own, state, base.checkpoint, old=False), str(base.checkpoint))
    unet.load_state_dict(state)


def _differences(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: Path, old: bool
) -> list[Problem]:
    """What differs: one or two tensors by name, more of them as counts with a few names."""
    missing = [name for name in own if name not in state]
    foreign = [name for name in state if name not in own]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    fix = _advice_on_old(own, state) if old else _advice_on_new(own, state, missing, [*other, *foreign])
    fix = fix or _advice(state, [*other, *foreign])
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
    expected = f"the {len(own)} of this model{' without `attn.out_proj`' * old}"
    return [Problem("the base's tensors", expected, ", ".join(parts), fix, str(path))]


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    return "x".join(map(str, tensors[name].shape)) if name in tensors else "no such tensor"


def _advice_on_new(
    own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], missing: Sequence[str], wrong: Sequence[str]
) -> str:
    """To say that a checkpoint has no projections, where it has the attention around them and most of a model."""
    projections = {name for name in own if ".attn.out_proj." in name}
    others = [name for name in own if name not in projections]
    if _has_blocks(state, ".to_q", ".to_k", ".to_v", ".proj_attn") and _has_most(map(_old_name, others), state):
        return f"It was written with monai-generative: pass `{OLD}`."
    attends = _has_blocks(state, ".attn.to_q", ".attn.to_k", ".attn.to_v")
    if projections and projections.isdisjoint(state) and attends and _has_most(others, state):
        more = "" if projections.issuperset(missing) and not wrong else ", and set `model` to the checkpoint's"
        return f"It has no `attn.out_proj`, as models of monai-generative: pass `{OLD}`{more}."
    return ""


def _advice_on_old(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """To say that a checkpoint has projections, as MONAI's own have."""
    if _has_blocks(state, ".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.out_proj") and _has_most(own, state):
        return f"It was written with MONAI itself: pass `{OLD.replace('true', 'false')}`."
    return ""


def _has_blocks(state: Mapping[str, torch.Tensor], *parts: str) -> bool:
    """Whether a checkpoint has attention of these parts."""
    first = f"{parts[0]}.weight"
    blocks = [name.removesuffix(first) for name in state if name.endswith(first)]
    return any(all(f"{block}{part}.weight" in state for part in parts) for block in blocks)


def _has_most(names: Iterable[str], state: Mapping[str, torch.Tensor]) -> bool:
    found = [name in state for name in names]
    return 2 * sum(found) > len(found)


def _advice(state: Mapping[str, torch.Tensor], wrong: Sequence[str]) -> str:
    """What to set or to give, by what the checkpoint looks like."""
    first = state.get("conv_in.conv.weight")
    if first is not None and first.dim() == 5 and first.shape[1] != 1:
        return f"Give a model of volumes with one channel: this one takes {first.shape[1]}, and no setting does that."
    if any(name.startswith("class_embedding.") or ".transformer_blocks." in name for name in wrong):
        return "Give a model without classes and conditions: this one has them, and no setting does that."
    return FIX


def _old_name(name: str) -> str:
    """What monai-generative calls a tensor of MONAI's model."""
    return name.replace(".attn.out_proj.", ".proj_attn.").replace(".attn.to_", ".to_").replace("postconv", "conv")


def _load_old(unet: DiffusionModelUNet, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """A checkpoint with MONAI's names or monai-generative's, whose projections are never applied."""
    own = unet.state_dict()
    state = {name: value for name, value in state.items() if ".proj_attn." not in name}
    renamed = not any(".attn.to_q." in name for name in state)
    names = {_old_name(name) if renamed else name: name for name in own}
    expected = {old: own[name] for old, name in names.items()}
    raise_all(_differences(expected, state, path, old=True), str(path))
    unet.load_state_dict({names[old]: value for old, value in state.items()})


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
