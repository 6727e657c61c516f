"""PEFT's tuners as rows of a table: the spec of each, and the tensors and options in its files for cores and params.

A row is all that a tuner needs to be read (`tuner_reading`, `tuner_update`) and written (`tuner_writing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tnpeft.io.foreign import tuner_forms as forms
from tnpeft.io.foreign.tuner_table import Config, Slot, Tensors, Tuner
from tnpeft.network import Layer

__all__ = ["METHODS", "TUNERS", "rows_of"]


def _side(entries: int) -> int:
    """The side of a square whose upper triangle has so many entries."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


_SEED = 777  # where FourierFT's config says none


def _no_triangle(layer: Layer, tensors: Tensors) -> tuple[str, str] | None:
    """Why OFT's numbers are no upper triangles."""
    shape = tuple(tensors["oft_R"].shape)
    side = _side(shape[-1])
    if len(shape) == 2 and side * (side - 1) // 2 == shape[1]:
        return None
    return "`oft_R` of (blocks, b (b - 1) / 2)", f"{shape}"


_OFT = {"coft": (False,), "block_share": (False,)}
_OFT_FORM: dict[str, Any] = {
    "method": "OFT",
    "slots": (Slot("R", "oft_R"),),
    "leaf": ".weight",
    "copy": {"R": 0.0},
    "misfit": _no_triangle,
    "dropout": "module_dropout",
}
_BOFT: dict[str, Any] = {
    "method": "BOFT",
    "params": lambda config, tensors, layer: {"b": tensors["boft_R"].shape[-1]},
    "dropout": "boft_dropout",
}
_IA3: dict[str, Any] = {
    "method": "IA3",
    "params": lambda config, tensors, layer: {},
    "gain": "l",
    "kinds": ("Linear", "Conv2d", "Conv3d"),
}


def _blocks(sizes: Mapping[str, int]) -> dict[str, int]:
    """BOFT's blocks by their side alone."""
    return {"boft_block_size": sizes["x"], "boft_block_num": 0}


def _waves(config: Config, layer: Layer, tensors: Tensors) -> dict[str, Tensor]:
    """The waves of FourierFT's places, which torch draws of the config's seed."""
    outs, ins, count = layer.out_channels, layer.in_channels, tensors["fourierft_spectrum"].shape[0]
    generator = torch.Generator().manual_seed(int(config.get("random_loc_seed", _SEED)))
    places = torch.randperm(outs * ins, generator=generator)[:count]
    made: dict[str, Tensor] = {}
    for leg, size, numbers in (("o", outs, places // ins), ("i", ins, places % ins)):
        # Of n k the remainder stands for the same angle, and loses no digit.
        angles = numbers[:, None] * torch.arange(size) % size * (2 * math.pi / size)
        made |= {f"cos_{leg}": angles.double().cos().float(), f"sin_{leg}": angles.double().sin().float()}
    return made


def _undivided(layer: Layer, tensors: Tensors) -> tuple[str, str] | None:
    """Why a layer's inputs are not of blocks of MiSS's rank."""
    rank = tensors["miss_block"].shape[0]
    return (f"an `r` that divides {layer.in_channels} inputs", f"{rank}") if layer.in_channels % rank else None


def _odd_places(layer: Layer, tensors: Tensors) -> tuple[str, str] | None:
    """Why so many places are none of SHiRA's, whose number is r times (inputs + outputs)."""
    count, sides = tensors["shira_weight"].shape[0], layer.in_channels + layer.out_channels
    places = tensors["shira_indices"]
    if tuple(places.shape) == (2, count):
        for axis, size in enumerate((layer.out_channels, layer.in_channels)):
            least, most = float(places[axis].min()), float(places[axis].max())
            if least < 0 or most >= size or bool((places[axis] != places[axis].round()).any()):
                return f"whole `shira_indices` of 0 to {size - 1} for {layer}", f"some of {least:g} to {most:g}"
    if count % sides == 0 and count <= layer.in_channels * layer.out_channels:
        return None
    return f"a multiple of {sides} entries, no more than the weight has", f"{count}"


def _wide_only(layer: Layer, tensors: Tensors) -> tuple[str, str] | None:
    """Why RandLoRA's diagonal stands on another side than here."""
    expected = "layers of no more inputs than outputs: the other ones have their diagonal beside the outputs"
    return (expected, str(layer)) if layer.in_channels > layer.out_channels else None


TUNERS: tuple[Tuner, ...] = (
    Tuner(
        **_OFT_FORM,
        spec="oft",
        when=lambda config, tensors: config.get("use_cayley_neumann", True),
        numbers=("num_cayley_neumann_terms",),
        params=lambda config, tensors, layer: {
            "b": _side(tensors["oft_R"].shape[-1]),
            "order": max(config.get("num_cayley_neumann_terms", 5), 4),  # PEFT's 3 terms are its 4
        },
        options=lambda params, sizes: {
            "oft_block_size": sizes["x"],
            "r": 0,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": params["order"],
        },
        needs={**_OFT, "num_cayley_neumann_terms": (5, *range(3, 100))},
    ),
    Tuner(
        **_OFT_FORM,
        spec="oft_cayley",
        params=lambda config, tensors, layer: {"b": _side(tensors["oft_R"].shape[-1])},
        options=lambda params, sizes: {"oft_block_size": sizes["x"], "r": 0, "use_cayley_neumann": False},
        needs=_OFT,
    ),
    Tuner(
        **_IA3,
        spec="ia3_input",
        slots=(Slot("l", "ia3_l", forms.LESS_ONE_ROW),),
        options=lambda params, sizes: {},
        lists="feedforward_modules",
    ),
    Tuner(
        **_IA3,
        spec="ia3",
        slots=(Slot("l", "ia3_l", forms.LESS_ONE_COLUMN),),
        options=lambda params, sizes: {},
        scales_bias="l",
    ),
    Tuner(
        method="ADALORA",
        numbers=("lora_alpha", "init_r"),
        spec="adalora",
        slots=(Slot("Q", "lora_A"), Slot("E", "lora_E", forms.COLUMN), Slot("P", "lora_B")),
        params=lambda config, tensors, layer: {
            "r": (rank := tensors["lora_A"].shape[0]),
            # It divides by r + 1e-5, and goes on to where ranks were pruned.
            "alpha": (config.get("lora_alpha", 8) if config.get("lora_alpha", 8) > 0 else rank)
            * (rank / (config.get("init_r", 12) + 1e-5)),
        },
        options=lambda params, sizes: {
            "r": sizes["r"],
            "init_r": sizes["r"],
            "target_r": sizes["r"],
            "total_step": 1,
            "lora_alpha": params["alpha"] * (sizes["r"] + 1e-5) / sizes["r"],
        },
        gain="E",
        input_dropout="lora_dropout",
    ),
    Tuner(
        method="VERA",
        spec="vera",
        slots=(
            Slot("d", "vera_lambda_d"),
            Slot("b", "vera_lambda_b"),
            Slot("A", "vera_A", forms.FIRST_INPUTS, shared=True),
            Slot("B", "vera_B", forms.FIRST_OUTPUTS, shared=True),
        ),
        params=lambda config, tensors, layer: {"r": tensors["vera_lambda_d"].shape[0]},
        options=lambda params, sizes: {"r": sizes["r"], "save_projection": True},
        needs={"save_projection": (True,)},
        gain="b",
        input_dropout="vera_dropout",
    ),
    Tuner(
        method="HRA",
        spec="hra",
        slots=(Slot("u", "hra_u"),),
        params=lambda config, tensors, layer: {"rank": tensors["hra_u"].shape[-1]},
        options=lambda params, sizes: {"r": 2 * sizes["p"], "apply_GS": False},
        needs={"apply_GS": (False,)},  # of `hra_gs` no value of the core is none, which could be subtracted
        copy={"u": 0.0},
        misfit=lambda layer, tensors: (
            ("an even `r`", f"{tensors['hra_u'].shape[-1]}") if tensors["hra_u"].shape[-1] % 2 else None
        ),
    ),
    Tuner(
        **_BOFT,
        spec="boft",
        slots=(Slot("X", "boft_R", item=0), Slot("s", "boft_s")),
        when=lambda config, tensors: tensors["boft_R"].shape[0] == 1,
        options=lambda params, sizes: {
            "boft_block_size": sizes["x"],
            "boft_block_num": 0,
            "boft_n_butterfly_factor": 1,
        },
        copy={"X": 0.0, "s": 1.0},
    ),
    Tuner(
        **_BOFT,
        spec="boft_2",
        slots=(Slot("X_1", "boft_R", item=0), Slot("X_2", "boft_R", item=1), Slot("s", "boft_s")),
        when=lambda config, tensors: tensors["boft_R"].shape[0] == 2,
        options=lambda params, sizes: {
            "boft_block_size": sizes["x"],
            "boft_block_num": 0,
            "boft_n_butterfly_factor": 2,
        },
        copy={"X_1": 0.0, "X_2": 0.0, "s": 1.0},
    ),
    Tuner(
        method="C3A",
        spec="c3a",
        slots=(Slot("kernel", "c3a_kernel"),),
        params=lambda config, tensors, layer: {"b": tensors["c3a_kernel"].shape[-1]},
        options=lambda params, sizes: {"block_size": sizes["x"]},
        patterns={"block_size": "block_size_pattern"},
        anchored=False,
        gain="kernel",
    ),
    Tuner(
        method="SHIRA",
        spec="shira",
        slots=(Slot("values", "shira_weight"), Slot("places", "shira_indices", forms.PLACES, whole=True)),
        params=lambda config, tensors, layer: {
            "r": tensors["shira_weight"].shape[0] // (layer.in_channels + layer.out_channels)
        },
        options=lambda params, sizes: {"r": sizes["n"] // (sizes["o"] + sizes["i"]), "mask_type": "random"},
        misfit=_odd_places,
        gain="values",
    ),
    Tuner(
        method="DELORA",
        spec="delora",
        slots=(Slot("A", "delora_A"), Slot("B", "delora_B"), Slot("lambda_", "delora_lambda")),
        params=lambda config, tensors, layer: {"r": tensors["delora_A"].shape[0]},
        options=lambda params, sizes: {"r": sizes["r"]},
        patterns={"r": "rank_pattern"},
        remade={"delora_w_norm": lambda weight: weight.norm(dim=0)},
        gain="lambda_",
        input_dropout="module_dropout",
    ),
    Tuner(
        method="VBLORA",
        spec="vblora",
        slots=(
            Slot("logits_a", "vblora_logits_A"),
            Slot("logits_b", "vblora_logits_B"),
            Slot("bank", "vblora_vector_bank", shared=True),
        ),
        params=lambda config, tensors, layer: {
            "r": tensors["vblora_logits_A"].shape[0],
            "top": config.get("topk", 2),
            **dict(zip(("vectors", "length"), tensors["vblora_vector_bank"].shape, strict=False)),
        },
        options=lambda params, sizes: {
            "r": sizes["r"],
            "topk": params["top"],
            "num_vectors": sizes["v"],
            "vector_length": sizes["x"],
            "save_only_topk_weights": False,
        },
        needs={"save_only_topk_weights": (False,)},
        numbers=("topk",),
        copy={"logits_a": 0.0, "logits_b": 0.0, "bank": 0.0},
        input_dropout="vblora_dropout",
    ),
    Tuner(
        method="FOURIERFT",
        spec="fourierft",
        slots=(Slot("c", "fourierft_spectrum"),),
        params=lambda config, tensors, layer: {
            "waves": tensors["fourierft_spectrum"].shape[0],
            "alpha": config.get("scaling", 150.0),
        },
        options=lambda params, sizes: {
            "n_frequency": sizes["n"],
            "scaling": params["alpha"],
            "random_loc_seed": _SEED,
        },
        patterns={"n_frequency": "n_frequency_pattern"},
        anchored=False,
        numbers=("scaling", "random_loc_seed"),
        made=_waves,
        gain="c",
    ),
    Tuner(
        method="GRALORA",
        spec="gralora",
        slots=(Slot("A", "gralora_A"), Slot("B", "gralora_B")),
        params=lambda config, tensors, layer: {
            "r": tensors["gralora_A"].shape[-1],
            "blocks": tensors["gralora_A"].shape[0],
            "alpha": config.get("alpha", 64),
        },
        options=lambda params, sizes: {
            "r": params["r"],
            "gralora_k": sizes["n"],
            "alpha": params["alpha"],
            "hybrid_r": 0,
        },
        needs={"hybrid_r": (0,)},
        numbers=("alpha",),
        gain="B",
        input_dropout="gralora_dropout",
    ),
    Tuner(
        method="MISS",
        spec="miss_bat",
        slots=(Slot("M", "miss_block"),),
        when=lambda config, tensors: config.get("init_weights", True) == "bat",
        params=lambda config, tensors, layer: {"r": tensors["miss_block"].shape[-1]},
        options=lambda params, sizes: {"r": sizes["x"], "init_weights": "bat"},
        made=lambda config, layer, tensors: {"every": torch.ones(layer.in_channels // tensors["miss_block"].shape[-1])},
        gain="M",
        dropout="miss_dropout",
    ),
    Tuner(
        method="MISS",
        spec="miss",
        slots=(Slot("block", "miss_block", forms.TURNED),),
        params=lambda config, tensors, layer: {"r": tensors["miss_block"].shape[0]},
        options=lambda params, sizes: {"r": sizes["s"], "init_weights": True},
        needs={"init_weights": (True, False)},
        made=lambda config, layer, tensors: {"repeat": torch.ones(layer.in_channels // tensors["miss_block"].shape[0])},
        misfit=_undivided,
        gain="block",
        input_dropout="miss_dropout",
    ),
    Tuner(
        method="RANDLORA",
        spec="randlora",
        slots=(
            Slot("L", "randlora_lambda"),
            Slot("G", "randlora_gamma"),
            Slot("A", "randlora_A", forms.BASES_A, shared=True),
            Slot("B", "randlora_B", forms.BASES_B, shared=True),
        ),
        params=lambda config, tensors, layer: {
            "r": tensors["randlora_lambda"].shape[0],
            "alpha": config.get("randlora_alpha", 640),
        },
        options=lambda params, sizes: {"r": sizes["r"], "randlora_alpha": params["alpha"], "save_projection": True},
        needs={"save_projection": (True,)},
        numbers=("randlora_alpha",),
        misfit=_wide_only,
        gain="L",
        input_dropout="randlora_dropout",
    ),
)
METHODS = tuple(dict.fromkeys(row.method for row in TUNERS))


def rows_of(method: object) -> tuple[Tuner, ...]:
    """The forms of one of PEFT's methods; none for a method that is not in the table."""
    return tuple(row for row in TUNERS if row.method == method)
