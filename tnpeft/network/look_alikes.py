"""Classes of other libraries that look like torch's layers and weights and are something else, by their names alone."""

from __future__ import annotations

import re
from functools import lru_cache

from tnpeft.spec.pattern import KINDS

__all__ = ["full_names", "kind_name", "look_alike", "opaque"]

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
_CONV1D = re.compile(r"transformers\.(pytorch_utils|modeling_utils)\.Conv1D")


def full_names(kind: type) -> list[str]:
    """The full names of a class and of those it is derived from."""
    return [f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__]


@lru_cache(maxsize=256)
def look_alike(kind: type) -> tuple[str, str] | None:
    """What a class of layers or tensors is in truth, and the way out; None where nothing is known against it."""
    name = kind.__name__
    for full in full_names(kind):
        if _CONV1D.fullmatch(full):
            fix = (
                "Put an `nn.Linear` with its bias and `nn.Parameter(weight.T.contiguous())` in its place, then attach; "
                "save such a model with `tnpeft.save`, or turn the weights back first: "
                "what `save_pretrained` writes of it loads as another model, or not at all."
            )
            return "transformers' Conv1D, a linear layer with a transposed weight", fix
        library = next((library for start, library in _QUANTISED.items() if full.startswith(start)), None)
        if library is None and (match := _TRANSFORMERS.match(full)):
            library = f"transformers ({match[1]})"
        if library is not None and not _is_float(full):
            return f"{name}, quantised by {library}", _UNQUANTISED
        for start, (what, fix) in _OTHERS.items():
            if full.startswith(start):
                return f"{name}, {what}", fix
    return None


@lru_cache(maxsize=256)
def opaque(kind: type) -> tuple[str, str] | None:
    """As `look_alike`, of a class that is none of torch's layers: one that by its name is quantised counts too."""
    if known := look_alike(kind):
        return known
    name = kind.__name__
    if re.search("quant(?!a)", name, re.IGNORECASE) and re.search("(linear|conv.?d)$", name, re.IGNORECASE):
        return f"{kind_name(kind)}, a quantised layer", _UNQUANTISED
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
