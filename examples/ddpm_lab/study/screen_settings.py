"""What the screens are, as data: families of specs, budgets of trained parameters, and the small transformer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ddpm_lab.config.reader import read_config
from ddpm_lab.config.settings import Positive, Section, Training

__all__ = ["SCREENS", "Family", "LinearScreen", "Screen", "Screened", "Text"]

SCREENS = ("screen", "screen_linear")

Rate = Annotated[float, Field(gt=0)]
# What sets a spec's size: a param that `tnpeft.budget` solves for, a param with values to try, or nothing.
Size = str | dict[str, tuple[int | float, ...]] | None


class Family(Section):
    """Specs that train at one rate, which the first of them that fits searches for."""

    title: str
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    specs: dict[str, Size]


class Families(Section):
    """A file of families, which several screens share."""

    families: dict[str, Family]


class Screened(Section):
    """Where a method of a screen comes from: a shipped spec, the least budget that holds it, or None above all."""

    study: Literal["screen", "screen_linear"]
    spec: str
    family: str
    budget: int | None
    peft: bool = False  # the tuner of PEFT that this spec is, by PEFT's own code


class Screen(Section):
    """`screen`: every shipped spec that fits, at each budget, on one data set."""

    dataset: str = ""
    budgets: tuple[Positive, ...] = ()  # of all parameters that train
    match: tuple[str, ...] = ()  # the layers of the first pattern must fit; those of others are adapted where they do
    scopes: dict[str, str] = Field(default_factory=dict)
    families: dict[str, Family] = Field(default_factory=dict)  # or a file that has them
    training: Training = Training()  # replaces these settings of the study's
    rounds: Positive = 5  # in which a step is timed, in turns with full fine-tuning
    left_out: dict[str, str] = Field(default_factory=dict)  # filled in: specs that are in no row, and why

    @field_validator("families", mode="before")
    @classmethod
    def _from_a_file(cls, families: Any, info: ValidationInfo) -> Any:
        if not isinstance(families, str):  # by JSON's rules, under which a list is a tuple
            return Families.model_validate_json(json.dumps({"families": families})).families
        folder = (info.context or {}).get("folder", Path())
        return read_config(Path(os.path.normpath(folder / families)), (), Families).families

    @property
    def middle(self) -> int:
        """The budget at which rates are searched for."""
        return sorted(self.budgets)[len(self.budgets) // 2]


class Text(Section):
    """Text made by a seeded grammar: a Markov chain over pairs of words; the target's differs for a share of pairs."""

    words: Annotated[int, Field(ge=4)] = 64
    length: Annotated[int, Field(ge=4)] = 32
    choices: Positive = 4  # words that may follow a pair
    shifted: Annotated[float, Field(gt=0, le=1)] = 0.5
    sequences: Positive = 4096  # to train on
    held_out: Positive = 128  # to validate, and as many to test on
    seed: int = 0


class LinearScreen(Screen):
    """`screen_linear`: the same for a small transformer on made text; its adapters train cores alone."""

    width: Annotated[int, Field(ge=8, multiple_of=4)] = 128
    layers: Positive = 4
    text: Text = Text()
    pretraining: Training = Training(steps=600, batch_size=16, learning_rate=2e-3, schedule="one_cycle")
    anchors: tuple[str, ...] = ()  # specs beside which PEFT's own code trains, at the same params
