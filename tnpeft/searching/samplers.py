"""Optuna's samplers and local moves, each seeded by the trial: a resumed search draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from tnpeft.searching.space import Choices, Space

__all__ = ["LocalSampler", "SearchSampler"]

POPULATION = 12
TURNS = ("local", "evolution", "local", "tpe")  # of `mixed`, after a first population


class SearchSampler(BaseSampler):
    """One sampler, or several in turn, whose only state is the study's.

    A trial is drawn by a sampler whose seed is the search's seed and the number of earlier trials that did not fail. So
    one process draws what it would have drawn without a break, and several processes never draw from one stream.
    """

    def __init__(self, kind: str, space: Space, seed: int) -> None:
        self.kind, self.space, self.seed = kind, space, seed
        self.current = ""  # what draws the last trial that was asked for
        self._number = -1
        self._sampler: BaseSampler = RandomSampler(seed)

    def _for(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            trials = study.get_trials(deepcopy=False)
            place = sum(each.number < trial.number and each.state != TrialState.FAIL for each in trials)
            self.current = self.kind
            if self.kind == "mixed":
                self.current = "evolution" if place < POPULATION else TURNS[(place - POPULATION) % len(TURNS)]
            self._number, self._sampler = trial.number, self._made(self.current, place)
        return self._sampler

    def _made(self, kind: str, place: int) -> BaseSampler:
        seed = random.Random(f"{self.seed} {place}").getrandbits(31)
        if kind == "local":
            return LocalSampler(self.space, self.seed, seed)
        if kind == "evolution":
            return NSGAIISampler(population_size=POPULATION, seed=seed)
        return TPESampler(seed=seed) if kind == "tpe" else RandomSampler(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._for(study, trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._for(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._for(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._for(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._for(study, trial).after_trial(study, trial, state, values)


class LocalSampler(BaseSampler):
    """Moves of one choice away from the best network so far (after TnALE: Li et al., ICML 2023, arXiv:2304.12875).

    One choice after the other, in an order drawn for this best network, takes its other values in turn, until one gives
    a network that no trial had. If none is left, or there is no best network yet, all choices are drawn.
    """

    def __init__(self, space: Space, seed: int, own_seed: int) -> None:
        self.space, self.seed, self.own_seed = space, seed, own_seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(options) for name, options in self.space.options.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        done = [
            each for each in trials if each.state == TrialState.COMPLETE and each.params.keys() == search_space.keys()
        ]
        move: Mapping[str, int] | None = None
        if done:
            best = max(done, key=lambda each: (each.value or 0.0, -each.number))
            move = self._move(best, {each.user_attrs.get("topology") for each in trials})
        if move is not None:
            return dict(move)
        choose = random.Random(self.own_seed)
        return dict(self.space.drawn(lambda name, options: choose.choice(options)))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        assert isinstance(param_distribution, CategoricalDistribution)
        return random.Random(f"{self.own_seed} {param_name}").choice(param_distribution.choices)

    def _move(self, best: FrozenTrial, known: set[Any]) -> Choices | None:
        names = sorted(self.space.options)
        random.Random(f"{self.seed} {best.number}").shuffle(names)
        for name in names:
            for value in self.space.options[name]:
                choices = {**best.params, name: value}
                if self.space.topology(choices).key not in known:
                    return choices
        return None
