"""The format of a row in the table of PEFT's tuners (`tuner_rows` has the rows).

A row is all that a tuner needs to be read and written (`tuner_update`, `tuner_reading`, `tuner_writing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tnpeft.io.foreign.tuner_forms import SAME, Form
from tnpeft.network import Layer

__all__ = ["Config", "Numbers", "Slot", "Tensors", "Tuner"]

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Slot:
    """A core and the end of its key in the file.

    `item` is the core's place along the first axis of a tensor that holds several cores. `shared` says that the file
    has it once for the model, as large as the largest layer needs. `whole` marks whole numbers, which are places.
    """

    core: str
    key: str
    form: Form = SAME
    item: int | None = None
    shared: bool = False
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Tuner:
    """One form of a tuner: `method` is PEFT's `peft_type`, `spec` the shipped spec that it is.

    * `params` are the spec's, from the config and a layer's tensors by key;
    * `options` say the same in the config, from a network's params and sizes; those in `patterns` may differ between
      layers, which the option says that is named there, with regular expressions if `anchored`, else with names;
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
    params: Callable[[Config, Tensors, Layer], Numbers]
    options: Callable[[Mapping[str, float], Mapping[str, int]], dict[str, Any]]
    leaf: str = ""
    when: Callable[[Config, Tensors], bool] = lambda config, tensors: True
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    anchored: bool = True
    copy: Mapping[str, float] = field(default_factory=dict)
    gain: str | None = None
    made: Callable[[Config, Layer, Tensors], dict[str, Tensor]] = lambda config, layer, tensors: {}
    remade: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    misfit: Callable[[Layer, Tensors], tuple[str, str] | None] = lambda layer, tensors: None
    kinds: tuple[str, ...] = ("Linear",)
    lists: str | None = None  # the option that names the layers of this form, which no others have
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
