"""What a search on a study's model is, and what is claimed of the network that it found, as data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ddpm_lab.config.reader import read_config
from ddpm_lab.config.settings import Positive, Section, Training
from ddpm_lab.study.settings import StudyConfig, StudyMethod
from ddpm_lab.support.faults import fault

__all__ = ["Budget", "ClaimConfig", "HeldOut", "OfStudy", "SearchConfig"]

Seeds = Annotated[tuple[int, ...], Field(min_length=1)]


class OfStudy(Section):
    """Something about a study, which a file beside this one describes."""

    study: Path

    @field_validator("study")
    @classmethod
    def _beside_the_configuration(cls, path: Path, info: ValidationInfo) -> Path:
        folder = (info.context or {}).get("folder")
        return path if folder is None else Path(os.path.normpath(folder / path))

    def read_study(self, *overrides: str) -> StudyConfig:
        """The study. Raises LabError with its mistakes."""
        return read_config(self.study, overrides, StudyConfig)


class Budget(Section):
    """As many parameters as a spec's adapters have on the searched layers."""

    spec: str = "tenvoo_l"
    params: dict[str, int] = Field(default_factory=lambda: {"r": 4})


class SearchConfig(OfStudy):
    """A search: layers, budget, and which of the study's data sets and seeds it sees.

    `selected` and `tested` have seeds by data set: of full fine-tunes whose updates are captured, and of short
    fine-tunes. What is `tested` the search never sees.
    """

    match: str
    test_match: str | None = None  # layers that the search never sees
    budget: Budget = Budget()
    selected: Annotated[dict[str, Seeds], Field(min_length=1)]
    tested: dict[str, Seeds] = Field(default_factory=dict)
    evaluations: Positive = 100
    iterations: Positive = 15
    cores: Annotated[int, Field(ge=2)] = 8
    sampler: str = "mixed"
    seed: int = 0
    finalists: Positive = 3
    rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    training: Training = Training()  # of the short fine-tunes: replaces these settings of the study's `training`

    def check(self, study: StudyConfig) -> None:
        """Raise LabError for a data set that the study has not, or a fine-tune that is both selected and tested."""
        for where, seeds in (("selected", self.selected), ("tested", self.tested)):
            for name in seeds:
                if name not in study.datasets:
                    expected = f"one of {', '.join(study.datasets)}"
                    raise fault(f"{where}.{name}", "a data set", expected, f"`{name}`", "Correct the name.")
        for name in self.selected:
            both = sorted({*self.selected[name]} & {*self.tested.get(name, ())})
            if both:
                found = f"seed {both[0]} of `{name}` in both"
                raise fault("tested", "fine-tunes", "none that the search has seen", found, "Remove it from one.")


class HeldOut(Section):
    """Volumes that a claim is tested on: a part of the split of a data set."""

    dataset: str
    part: Literal["test", "unseen"]


class ClaimConfig(OfStudy):
    """A claim: `found` beats every one of `rivals` on what is `held_out`, whose volumes are taken together.

    `methods` are added to the study's. `controls` are run and compared as rivals are, but decide nothing.
    """

    found: str
    rivals: Annotated[tuple[str, ...], Field(min_length=1)]
    controls: tuple[str, ...] = ()
    held_out: Annotated[tuple[HeldOut, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=2)]
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    methods: dict[str, StudyMethod] = Field(default_factory=dict)
    budget_of: str  # a rival: `found` may train no more parameters than it does

    @property
    def members(self) -> tuple[str, ...]:
        return self.found, *self.rivals, *self.controls

    def as_study(self, minutes: float | None) -> StudyConfig:
        """The study of this claim: its data sets, seeds and methods as `table1`. Raises LabError."""
        study = self.read_study()
        if self.budget_of not in self.rivals:
            fix = "Name one of them."
            raise fault("budget_of", "a rival", f"one of {', '.join(self.rivals)}", f"`{self.budget_of}`", fix)
        names = {each.dataset for each in self.held_out}
        unknown = sorted(names - {*study.datasets})
        if unknown:
            expected = f"one of {', '.join(study.datasets)}"
            raise fault("held_out", "a data set", expected, f"`{unknown[0]}`", "Correct the name.")
        change = {
            "datasets": {name: each for name, each in study.datasets.items() if name in names},
            "methods": {**study.methods, **self.methods},
            "seeds": self.seeds,
            "table1": self.members,
            "minutes": minutes,
        }
        return study.model_copy(update=change)
