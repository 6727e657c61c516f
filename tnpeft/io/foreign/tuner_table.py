"""PEFT's tuners as rows of a table: which spec each is, and which tensor and option of its files each core and param.

A row is all that a tuner needs to be read and written (`tuner_update`, `tuner_reading`, `tuner_writing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tnpeft.io.foreign import tuner_forms as forms
from tnpeft.io.foreign.tuner_forms import SAME, Form
from tnpeft.network import Layer

__all__ = ["METHODS", "TUNERS", "Slot", "Tuner", "rows_of"]

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Slot:
    """A core and the end of its key in the file.

    `item` is the core's place along the first axis of a tensor that holds several; `shared` says that the file has it
    once for the model, as large as the largest layer needs it.
    """

    core: str
    key: str
    form: Form = SAME
    item: int | None = None
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Tuner:
    """One form of a tuner: `method` is PEFT's `peft_type`, `spec` the shipped spec that it is.

    * `params` are the spec's, from the config and a layer's tensors by key;
    * `options` say the same in the config, from a network's params and sizes; those in `patterns` may differ between
      layers, which the option that it names there says;
    * `when` says whether a file's layer has this form, where a method has several;
    * `needs` are options that leave the update alone at these values alone, with PEFT's default first;
    * `copy` fills the frozen copy: PEFT subtracts what the cores make at these values;
    * `gain` is a core in which the update is linear;
    * `made` are frozen cores that the file does not hold; `remade` tensors of the file that follow from the weight;
    * `numbers` are the options that `params` reads;
    * `misfit` says why some layer has no such spec: what is expected and found;
    * `input_dropout` is the option that drops entries of the input, `dropout` another one, without a counterpart here.
    """

    method: str
    spec: str
    slots: tuple[Slot, ...]
    params: Callable[[Config, Tensors], Numbers]
    options: Callable[[Mapping[str, float], Mapping[str, int]], dict[str, Any]]
    leaf: str = ""
    when: Callable[[Config, Tensors], bool] = lambda config, tensors: True
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    copy: Mapping[str, float] = field(default_factory=dict)
    gain: str | None = None
    made: Callable[[Config, Layer], dict[str, Tensor]] = lambda config, layer: {}
    remade: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    misfit: Callable[[Layer, Tensors], tuple[str, str] | None] = lambda layer, tensors: None
    kinds: tuple[str, ...] = ("Linear",)
    lists: str | None = None  # the option that names the layers of this form
    scales_bias: str | None = None  # the core whose values above 1 PEFT multiplies the bias with
    numbers: tuple[str, ...] = ()
    input_dropout: str | None = None
    dropout: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The ends of the keys that a layer's tensors have."""
        return (*dict.fromkeys(slot.key for slot in self.slots if not slot.shared), *self.remade)

    @property
    def shared_keys(self) -> tuple[str, ...]:
        return tuple(slot.key for slot in self.slots if slot.shared)


def _side(entries: int) -> int:
    """The side of a square whose upper triangle has so many entries."""
    return (1 + math.isqrt(1 + 8 * entries)) // 2


_OFT = {"coft": (False,), "block_share": (False,)}
_OFT_FORM: dict[str, Any] = {
    "method": "OFT",
    "slots": (Slot("R", "oft_R"),),
    "leaf": ".weight",
    "copy": {"R": 0.0},
    "dropout": "module_dropout",
}
_IA3: dict[str, Any] = {
    "method": "IA3",
    "params": lambda config, tensors: {},
    "gain": "l",
    "kinds": ("Linear", "Conv2d", "Conv3d"),
}


def _is_row(config: Config, tensors: Tensors) -> bool:
    """Whether IA3 multiplies the inputs: its vector is a row then; of a single output both are one shape."""
    return tensors["ia3_l"].shape[0] == 1 and tensors["ia3_l"].shape[1] != 1


TUNERS: tuple[Tuner, ...] = (
    Tuner(
        **_OFT_FORM,
        spec="oft",
        when=lambda config, tensors: config.get("use_cayley_neumann", True),
        numbers=("num_cayley_neumann_terms",),
        params=lambda config, tensors: {
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
        params=lambda config, tensors: {"b": _side(tensors["oft_R"].shape[-1])},
        options=lambda params, sizes: {"oft_block_size": sizes["x"], "r": 0, "use_cayley_neumann": False},
        needs=_OFT,
    ),
    Tuner(
        **_IA3,
        spec="ia3_input",
        slots=(Slot("l", "ia3_l", forms.LESS_ONE_ROW),),
        when=_is_row,
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
        numbers=("lora_alpha",),
        spec="adalora",
        slots=(Slot("Q", "lora_A"), Slot("E", "lora_E", forms.COLUMN), Slot("P", "lora_B")),
        params=lambda config, tensors: {
            "r": (rank := tensors["lora_A"].shape[0]),
            "alpha": (config.get("lora_alpha", 8) or rank) * rank / (rank + 1e-5),  # it divides by r + 1e-5
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
        params=lambda config, tensors: {"r": tensors["vera_lambda_d"].shape[0]},
        options=lambda params, sizes: {"r": sizes["r"], "save_projection": True},
        needs={"save_projection": (True,)},
        gain="b",
        input_dropout="vera_dropout",
    ),
    Tuner(
        method="HRA",
        spec="hra",
        slots=(Slot("u", "hra_u"),),
        when=lambda config, tensors: not config.get("apply_GS", False),
        params=lambda config, tensors: {"rank": tensors["hra_u"].shape[-1]},
        options=lambda params, sizes: {"r": 2 * sizes["p"], "apply_GS": False},
        copy={"u": 0.0},
        misfit=lambda layer, tensors: (
            ("an even `r`", f"{tensors['hra_u'].shape[-1]}") if tensors["hra_u"].shape[-1] % 2 else None
        ),
        kinds=("Linear", "Conv2d"),
    ),
)
METHODS = tuple(dict.fromkeys(row.method for row in TUNERS))


def rows_of(method: object) -> tuple[Tuner, ...]:
    """The forms of one of PEFT's methods; none of a method that is no row."""
    return tuple(row for row in TUNERS if row.method == method)
