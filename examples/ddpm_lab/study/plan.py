"""The runs of a study: those that try rates, and those of its tables at the rates that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_lab.config.settings import Base, Config
from ddpm_lab.study.data import base_of, described, identity, settled
from ddpm_lab.study.run import BASE, Run, made_of
from ddpm_lab.study.screen_cost import CostRun, costs_of
from ddpm_lab.study.screen_settings import SCREENS
from ddpm_lab.study.search import Choice, folder_of
from ddpm_lab.study.settings import DataSet, StudyConfig
from ddpm_lab.study.shares import ShareRun
from ddpm_lab.support.console import Screen

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """A study whose base and data are there."""

    name: str
    config: StudyConfig
    out: Path
    base: Base
    base_key: str
    datasets: Mapping[str, DataSet]

    @classmethod
    def sketch(cls, name: str, config: StudyConfig, out: Path) -> Plan:
        """The plan of a study whose base and data are not there: `alike` finds its rows."""
        return cls(name, config, out, Base(), "", config.datasets_of(name))

    @classmethod
    def of(cls, name: str, config: StudyConfig, out: Path, screen: Screen) -> Plan:
        """Make what all runs share, unless an earlier command did."""
        base, base_key = base_of(config, out, screen)
        own = config.datasets_of(name)
        datasets = {each: settled(each, config, about, out, screen) for each, about in own.items()}
        return cls(name, config, out, base, base_key, datasets)

    def searches(self) -> list[Run]:
        """A run for each rate of each method that has several, on each data set."""
        runs = []
        for dataset, about in self.datasets.items():
            for method in self.config.members(self.name):
                rates = self.config.methods[method].rates
                for rate in rates if len(rates) > 1 else ():
                    own = self.config.tried(method, about, rate, self.base)
                    folder = folder_of(self.out, method, dataset, rate)
                    runs.append(self._run(method, dataset, self.config.search_seed, own, folder, rate, search=True))
        return runs

    def finals(self, chosen: Mapping[tuple[str, str], Choice]) -> tuple[list[Run], list[str]]:
        """The runs of the tables, seed by seed, so that a whole table of the first seed stands early.

        Beside them those that wait for a rate, in words.
        """
        runs, waiting = [], []
        config = self.config
        base = () if self.name in SCREENS else (BASE,)  # whose samples nothing is compared with there
        for seed in config.seeds_of(self.name):
            for dataset, about in self.datasets.items():
                for method in (*base, *config.members(self.name)):
                    rates = config.methods[config.searcher(method)].rates if method != BASE else ()
                    choice = chosen.get((config.searcher(method), dataset))
                    rate = choice.best if choice is not None else rates[0] if rates else None
                    if rates and rate is None:
                        waiting.append(f"{method} on {dataset}, seed {seed}")
                        continue
                    own = config.run(None if method == BASE else method, about, seed, self.base, rate)
                    folder = self.out / "runs" / method / dataset / f"seed-{seed}"
                    runs.append(self._run(method, dataset, seed, own, folder, rate))
        return runs, waiting

    def measures(self, finals: Sequence[Run]) -> list[Run]:
        """What is measured beside the runs: the shares of `start`, the costs of `screen`."""
        return [*self._all_shares(finals), *self._costs(finals)]

    def _costs(self, finals: Sequence[Run]) -> list[Run]:
        """In `screen`: a run for each method that measures a training step beside one of full fine-tuning."""
        if self.name != "screen":
            return []
        cost, rounds = self.config.cost, self.config.screen.rounds
        shape = next(iter(cost.shapes.values()))
        about = {"cost.shape": list(shape), "cost.batch_size": cost.batch_size, "cost.rounds": rounds}
        kept = ("method.", "model.", "diffusion.", "training.precision")
        runs: list[Run] = []
        for run in finals:
            parts = {name: value for name, value in run.made_of.items() if name.startswith(kept)}
            folder = costs_of(self.out, run.method)
            own = (run.method, run.dataset, run.seed, run.config, folder, run.cache, {**parts, **about})
            runs.append(CostRun(*own, shape=shape, batch=cost.batch_size, rounds=rounds))
        return runs

    def _all_shares(self, finals: Sequence[Run]) -> list[ShareRun]:
        """In `start`: a run for each method and data set that measures the shares of its update, where that has run."""
        config = self.config
        names = (
            [name for name in config.members(self.name) if name != config.start.update] if self.name == "start" else []
        )
        updates = {
            run.dataset: run for run in finals if (run.method, run.seed) == (config.start.update, config.seeds[0])
        }
        return [
            self._shares(name, updates[dataset]) for name in names for dataset in self.datasets if dataset in updates
        ]

    def _shares(self, method: str, update: Run) -> ShareRun:
        start, dataset, seed = self.config.start, update.dataset, update.seed
        own = self.config.run(method, self.datasets[dataset], seed, self.base)
        parts = made_of(own, {}, self.base_key)
        settings = {
            **{
                f"update.{name}" if name.startswith("method.") else name: value
                for name, value in update.made_of.items()
            },
            **{name: value for name, value in parts.items() if name.startswith("method.")},
            "shares.layers": start.layers,
            "shares.sweeps": start.sweeps,
        }
        folder = self.out / "shares" / method / dataset
        about = (method, dataset, seed, own, folder, update.cache, settings)
        return ShareRun(*about, update=update, layers=start.layers, sweeps=start.sweeps)

    def _run(
        self,
        method: str,
        dataset: str,
        seed: int,
        own: Config,
        folder: Path,
        rate: float | None,
        search: bool = False,
    ) -> Run:
        about = self.datasets[dataset]
        data = identity(self.config, about) if self.base_key else described(self.config, about)
        settings = made_of(own, data, self.base_key)
        cache = self.out / "cache" / dataset
        return Run(method, dataset, seed, own, folder, cache, settings, rate, search)
