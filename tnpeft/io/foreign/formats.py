"""Which library's file it is, by its keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path

from tnpeft.errors import AdapterFileError, Problem, clip
from tnpeft.io.files import refuse
from tnpeft.io.foreign.spelling import respelled

__all__ = [
    "FORMATS",
    "INCOMPLETE",
    "MADE_FOR",
    "MERGE",
    "ONE_ADAPTER",
    "PEFT_DROPOUTS",
    "PEFT_SLOTS",
    "SUPPORTED",
    "clip_key",
    "guess",
    "trained_problem",
    "unknown",
    "unsupported",
]

INCOMPLETE = "The file is incomplete: copy it again, or save the adapter once more."
MADE_FOR = "Load the file onto the model it was made for."
MERGE = "Merge it into the model instead, or keep it in tnpeft's own file."
ONE_ADAPTER = "Save one adapter in a file."
PEFT_SLOTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
PEFT_SLOTS |= {"lora_embedding_A": "down", "lora_embedding_B": "up"}

# PEFT's method → its options for what training leaves out, by what they are called here.
PEFT_DROPOUTS = {
    "LORA": {"lora_dropout": "input"},
    "LOHA": {"module_dropout": "module"},
    "LOKR": {"module_dropout": "module"},
}

FORMATS = ("peft", "diffusers", "lycoris", "kohya", "comfyui", "tenvoo")
SUPPORTED = (
    "LoRA, LoHa and LoKr of PEFT, LyCORIS, diffusers, kohya and ComfyUI, or TenVOO, QuanTA, LoCon, LoHa and LoKr of "
    "the TenVOO paper"
)
_PEFT = re.compile(r"\.(lora_(A|B|embedding_A|magnitude_vector)|(hada|lokr)_[wt]\d(_[ab])?(\.\w+)?$)")
_PAPER = re.compile(r"(tenvoo_weights|quanta_weights|\.loha_w\d_[ab]$)")
_LYCORIS = re.compile(r"\.(lora_(up|down|mid)\.weight|(hada|lokr)_[wt]\d(_[ab])?|w_norm|diff)$")
_COMFYUI = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
_KOHYA = ("lora_unet_", "lora_te", "lora_transformer_")
# Marks of methods that are none of the supported ones, in their keys.
_OTHERS = {
    "oft_": "OFT or BOFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    ".on_input": "IA3",
    "lora_E": "AdaLoRA",
    "vera_lambda": "VeRA",
    ".a1.weight": "GLoRA",
    ".lambda_layer": "T-LoRA",
    "prompt_embeddings": "prompt tuning",
}
# What torch's own modules call their tensors.
_OF_MODULES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight", "in_proj_bias"}


def guess(keys: Collection[str], pickled: bool, has_config: bool) -> str | None:
    """The format of a file with these keys, which may be a pickle or have PEFT's config beside it; None if unknown."""
    if any(_PAPER.search(key) for key in keys):
        return "tenvoo"
    if any(key.startswith("base_model.") for key in keys):
        return "peft"
    latest = [respelled(key) for key in keys]
    if any("lora_A" in key or "lora_B" in key for key in latest):
        if any(key.startswith(_COMFYUI) for key in keys):
            return "comfyui"
        return "peft" if has_config and list(keys) == latest and not _has_parts(keys) else "diffusers"
    if has_config and any(_PEFT.search(key) for key in keys) and not _has_parts(keys):
        return "peft"
    modules = [key[: match.start()] for key in keys if (match := _LYCORIS.search(key))]
    if modules and any(module.startswith(_COMFYUI) for module in modules):
        return "comfyui"
    if modules and all(module.startswith(_KOHYA) for module in modules):
        return "kohya"
    if modules:
        return "tenvoo" if pickled and all("." in module for module in modules) else "lycoris"
    return "peft" if has_config else None


def _has_parts(keys: Iterable[str]) -> bool:
    """Whether they are those of a pipeline, each with the prefix of its model."""
    return all(key.startswith(("unet.", "transformer.", "text_encoder")) for key in keys)


def unsupported(path: Path, keys: Iterable[str]) -> AdapterFileError:
    """The error for a file whose method cannot be read."""
    keys = list(keys)
    name = next((other for mark, other in _OTHERS.items() if any(mark in key for key in keys)), None)
    found = f"{name} ({_first(keys)})" if name else _first(keys)
    return refuse(path, "method", SUPPORTED, found, "Convert such adapters with the library that made them.")


def trained_problem(trained: Iterable[str], expected: str) -> Problem:
    """The problem of parameters that train beside the cores, for a format that has no place for them."""
    found = ", ".join(f"'{name}'" for name in islice(trained, 3))
    fix = "Train the cores alone, or merge the adapter."
    return Problem("parameters trained beside the cores", expected, found, fix)


def unknown(path: Path, keys: Collection[str]) -> AdapterFileError:
    """The error for a file whose keys are those of no known format."""
    if keys and all(key.rpartition(".")[2] in _OF_MODULES for key in keys):
        found = f"a model's own weights ({_first(keys)})"
        fix = "`tnpeft fit` makes an adapter of a fine-tuned checkpoint and its base."
        return refuse(path, "file", f"an adapter: {SUPPORTED}", found, fix)
    return unsupported(path, keys)


def _first(keys: Iterable[str]) -> str:
    return ", ".join(f"'{clip_key(key)}'" for key in islice(keys, 3)) or "no tensors"


def clip_key(key: str) -> str:
    return key if key.isprintable() and len(key) <= 120 else clip(key, 120)
