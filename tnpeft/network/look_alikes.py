"""Classes of other libraries that look like torch's layers and weights and are something else, by their names alone.

Some cannot be adapted, whatever they are made of: other libraries' adapters, weights in several places. Others are
quantised; they are adapted as they are, if they say their sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from tnpeft.spec.pattern import KINDS

__all__ = ["by_class", "conv1d_of", "full_names", "kind_name", "look_alike", "opaque", "quantised"]

_UNQUANTISED = "Attach to the unquantised model."
_WRAP = "Attach to the plain model first, then wrap it."

# The start of a class's full name → the library that quantises with it.
_QUANTISED = {
    "torch.ao.nn.": "torch.ao",
    "torch.nn.quantized.": "torch.ao",
    "torch.nn.qat.": "torch.ao",
    "torchao.": "torchao",
    "bitsandbytes.": "bitsandbytes",
    "auto_gptq.": "GPTQ",
    "gptqmodel.": "GPTQ",
    "awq.": "AWQ",
    "auto_round": "AutoRound",
    "hqq.": "HQQ",
    "optimum.quanto.": "optimum-quanto",
    "quanto.": "optimum-quanto",
    "eetq.": "EETQ",
    "aqlm.": "AQLM",
    "vptq.": "VPTQ",
    "compressed_tensors.": "compressed-tensors",
    "nunchaku.": "nunchaku",
    "modelopt.": "ModelOpt",
    "neural_compressor.": "Neural Compressor",
    "diffusers.quantizers.gguf.": "GGUF",
}
# Quantised layers of transformers itself: `transformers.integrations.NAME`.
_TRANSFORMERS = re.compile(
    r"transformers\.integrations\.(aqlm|awq|bitnet|bitsandbytes|compressed_tensors|eetq|fbgemm_fp8|finegrained_fp8|"
    r"fouroversix|fp_quant|gemma_quant|ggml|gguf|higgs|hqq|metal_quantization|mxfp4|nvfp4|quanto|sinq|spqr|vptq)\."
)
_PEFT = ("which PEFT has adapted", "Take PEFT's adapters off first, by `unload()` or `merge_and_unload()`.")
# The start of a class's full name → what it is, after its own name, and the way out.
_OTHERS = {
    "peft.tuners.tuners_utils.BaseTunerLayer": _PEFT,
    "peft.utils.other.": _PEFT,
    "lycoris.": ("which LyCORIS has adapted", "Take LyCORIS's network off first, by its `restore()`."),
    "transformer_engine.": (
        "a layer of Transformer Engine with kernels of its own",
        "Match other layers, or build the model of torch's.",
    ),
    "torch.distributed.fsdp.": ("whose weights FSDP shards", _WRAP),
    "torch.distributed._composable.": ("whose weights FSDP shards", _WRAP),
    "torch.distributed.tensor.": ("which lies on several devices", _WRAP),
    "torch.distributed._tensor.": ("which lies on several devices", _WRAP),
}
# Those of torch.ao that no update can be added to, by the start of the full name of the class itself.
_INTEGERS = "quantised by torch.ao, its input and output too"
_TORCH_AO = {
    "torch.ao.nn.quantized.modules.": _INTEGERS,
    "torch.ao.nn.quantized.reference.": _INTEGERS,
    "torch.ao.nn.intrinsic.qat.": "fused by torch.ao with what follows it",
    "torch.ao.nn.intrinsic.quantized.": "fused by torch.ao with what follows it",
}
_UNIT = "FSDPModule"
_CONV1D = re.compile(r"transformers\.(pytorch_utils|modeling_utils)\.Conv1D")


_Result = TypeVar("_Result")


def by_class(function: Callable[[type], _Result]) -> Callable[[type], _Result]:
    """What a function says of a class, asked once for each."""
    return lru_cache(maxsize=256)(function)


def full_names(kind: type) -> list[str]:
    """The full names of a class and of those it is derived from."""
    return [f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__]


def _without_units(kind: type) -> list[str]:
    """The full names of a class and its bases, but for what FSDP2 makes of one: a unit, whole whenever it runs."""
    made = [each for each in kind.__mro__ if any(base.__qualname__ == _UNIT for base in each.__mro__)]
    return [full for each, full in zip(kind.__mro__, full_names(kind), strict=True) if each not in made]


@by_class
def look_alike(kind: type) -> tuple[str, str] | None:
    """What a class of layers or tensors is in truth that cannot be adapted, and the way out; None for any other."""
    name = kind.__name__
    for full in _without_units(kind):
        for start, (what, fix) in _OTHERS.items():
            if full.startswith(start):
                return f"{name}, {what}", fix
    for start, what in _TORCH_AO.items():
        if full_names(kind)[0].startswith(start):
            return f"{name}, {what}", _UNQUANTISED
    return None


@by_class
def quantised(kind: type) -> str | None:
    """What a class of layers or tensors is that is quantised, by its library or by its own name; None for any other."""
    name = kind.__name__
    for full in full_names(kind):
        library = next((library for start, library in _QUANTISED.items() if full.startswith(start)), None)
        if library is None and (match := _TRANSFORMERS.match(full)):
            library = f"transformers ({match[1]})"
        if library is not None and not _is_float(full):
            return f"{name}, quantised by {library}"
    if re.search("quant(?!a)", name, re.IGNORECASE) and re.search("(linear|conv.?d)$", name, re.IGNORECASE):
        return f"{kind_name(kind)}, a quantised layer"
    return None


def opaque(kind: type) -> tuple[str, str] | None:
    """What a class of layers is that another library has made, by its name, and the way out where it says no sizes."""
    known = quantised(kind)
    return look_alike(kind) or (None if known is None else (f"{known}, which does not say its sizes", _UNQUANTISED))


@by_class
def conv1d_of(kind: type) -> type | None:
    """transformers' Conv1D, a linear layer with a transposed weight, where a class is derived from it."""
    for each, full in zip(kind.__mro__, full_names(kind), strict=True):
        if _CONV1D.fullmatch(full):
            return each
    return None


def _is_float(full: str) -> bool:
    """torch.ao also has containers of plain layers that will be quantised together."""
    return full.startswith(("torch.ao.nn.intrinsic.modules.", "torch.ao.nn.quantizable."))


def kind_name(kind: type) -> str:
    """A class's name; with its module where it could be taken for one of torch's layers."""
    same = kind.__name__.casefold() in {known.casefold() for known in KINDS}
    return (
        f"{kind.__name__} of {kind.__module__}" if same and not kind.__module__.startswith("torch.") else kind.__name__
    )
