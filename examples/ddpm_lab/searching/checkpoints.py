"""The checkpoints that a search reads: the study's base, and full fine-tunes of it, made where the study has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ddpm_lab.config.settings import Base, Config, Sampling
from ddpm_lab.study.data import base_of, settled
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.training.driver import finetune

__all__ = ["FULL", "Checkpoints"]

FULL = "full"  # the method of the study that trains everything
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoints:
    """Those of a study in the folder `study_out`; what it lacks is made in `out`."""

    study: StudyConfig
    study_out: Path
    out: Path
    screen: Screen

    def base(self) -> Base:
        """The base of all runs, pretrained if it is not there."""
        return base_of(self.study, self.study_out, self.screen)[0]

    def pairs(self, seeds: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The base's and the tuned tensors of full fine-tunes, by data set and seed."""
        base = self.base()
        assert base.checkpoint is not None
        before = load_file(base.checkpoint)
        return {
            f"{dataset}, seed {seed}": (before, load_file(self._tuned(base, dataset, seed)))
            for dataset, each in seeds.items()
            for seed in each
        }

    def _tuned(self, base: Base, dataset: str, seed: int) -> Path:
        """The weights of a full fine-tune: the study's own, or one at the middle of its rates."""
        theirs = self.study_out / "runs" / FULL / dataset / f"seed-{seed}" / WEIGHTS
        if theirs.is_file():
            return theirs
        folder = self.out / FULL / dataset / f"seed-{seed}"
        self.screen.line(f"A full fine-tune on {dataset}, seed {seed}")
        finetune(self.config(FULL, base, dataset, seed), folder, Screen(quiet=True))
        return folder / WEIGHTS

    def config(self, method: str, base: Base, dataset: str, seed: int, rate: float | None = None) -> Config:
        """A run of the study without samples; at the middle of the method's rates where none is given."""
        about = settled(dataset, self.study, self.study.datasets[dataset], self.study_out, self.screen)
        return self.study.run(method, about, seed, base, rate).model_copy(update={"sampling": Sampling(count=0)})
