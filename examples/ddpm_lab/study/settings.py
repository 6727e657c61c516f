"""What a study is, as data: data sets, methods and seeds, and which of them make which table.

A section of a method or a data set replaces those settings of the common section that it names and no others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, ValidationInfo, field_validator, model_serializer

from ddpm_lab.config.settings import (
    Anatomy,
    Base,
    Config,
    Data,
    Diffusion,
    Method,
    Metrics,
    Model,
    Positive,
    Sampling,
    Section,
    Size,
    Training,
    Validation,
)
from ddpm_lab.study.screen_members import derived_linear, derived_unet
from ddpm_lab.study.screen_settings import SCREENS, LinearScreen, Screen, Screened
from ddpm_lab.support.faults import fault

__all__ = [
    "STUDIES",
    "Cost",
    "DataSet",
    "Made",
    "Ranks",
    "Start",
    "Starts",
    "StudyConfig",
    "StudyMethod",
    "Unseen",
    "overlaid",
]

STRATA = r"^sub-\d+_(.+)_"  # the anatomy in the name of a made subject's file
STUDIES = ("table1", "table2", "table3", "table4", "figure4", "start", *SCREENS)

# Names become folders, on any file system.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
S = TypeVar("S", bound=Section)


class Unseen(Section):
    """Subjects of anatomies that nothing sees before the tables do: neither a base nor a method nor the rates."""

    anatomies: Annotated[tuple[Anatomy, ...], Field(min_length=1)]
    count: Annotated[int, Field(ge=1)] = 20


class Made(Section):
    """Subjects made from templates, dealt to the anatomies in turn, for machines that have no MRI data."""

    domain: Literal["t1", "t2", "atrophy", "lesion"]
    anatomies: Annotated[tuple[Anatomy, ...], Field(min_length=1)] = ("mni152",)
    count: Annotated[int, Field(ge=4)] = 60
    side: Annotated[int, Field(ge=8)] = 32  # voxels
    seed: int = 0
    unseen: Unseen | None = None  # beside `count`, in the same domain

    @property
    def named(self) -> bool:
        """Whether files are named after their anatomy: not those of MNI152 alone, so that they stay what they were."""
        return self.anatomies != ("mni152",) or self.unseen is not None

    @property
    def held_out(self) -> tuple[Anatomy, ...]:
        return self.unseen.anatomies if self.unseen is not None else ()

    def split(self) -> dict[str, Any]:
        """What a split must know of these subjects, as settings of `data`."""
        return {"strata": STRATA, "unseen": tuple(sorted(self.held_out))} if self.named else {}

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later settings where they say nothing: then runs have the names that they always had."""
        values: dict[str, Any] = dump(self)
        says = {"anatomies": self.anatomies != ("mni152",), "unseen": self.unseen is not None}
        return {name: value for name, value in values.items() if says.get(name, True)}


class DataSet(Section):
    """One data set: `made` subjects, or the folder or manifest that `data` names."""

    title: str | None = None
    made: Made | None = None
    data: Data = Data()  # replaces these settings of the study's `data`


class StudyMethod(Section):
    """One method: what trains, and how its training differs from the common one."""

    title: str | None = None
    note: str | None = None  # printed under the tables that the method stands in
    method: Method = Method()
    training: Training = Training()  # replaces these settings of the study's `training`
    sampling: Sampling = Sampling()  # and of the study's `sampling`
    rates: tuple[Annotated[float, Field(gt=0)], ...] = ()  # tried on each data set; the best trains the study's seeds
    rate_of: Name | None = None  # in place of `rates`: the method whose search finds the rate
    screened: Screened | None = None  # of a screen: where it comes from


class Ranks(Section):
    """Figure 4: these methods at each of these ranks, the parameter `r`."""

    methods: tuple[Name, ...] = ()
    ranks: tuple[Positive, ...] = (1, 2, 4, 6)


class Start(Section):
    """One start of a method: `std` is the size of T there, in standard deviations of the weight; 0 is from zero."""

    std: Annotated[float, Field(ge=0)]
    rates: tuple[Annotated[float, Field(gt=0)], ...] = ()  # in place of the method's


class Starts(Section):
    """`start`: these methods from their own start and from these, beside the method whose update they are held to."""

    methods: dict[Name, tuple[Start, ...]] = Field(default_factory=dict)
    update: Name = "full"
    layers: Positive = 3  # of each kind, evenly spaced, whose shares of the update are measured
    sweeps: Positive = 40  # of alternating least squares, which find what is within reach
    sampling: Sampling = Sampling()  # replaces these settings for starts that no other table has


class Cost(Section):
    """Table 4: what is timed. Methods take turns, so that a slow minute slows them all."""

    shapes: dict[Name, Size] = Field(default_factory=dict)  # a name for each size of volume
    batch_size: Positive = 1
    rounds: Annotated[int, Field(ge=3)] = 9
    warmup: Positive = 2  # the first passes plan and group layers


class StudyConfig(Section):
    """Everything that `study` runs; `seeds` are those of training, and are added to the seed of sampling."""

    title: str = "Study"
    caveat: str = ""  # printed with every result
    source: DataSet = DataSet()  # the base is pretrained on it, unless `base` names a checkpoint
    datasets: dict[Name, DataSet] = Field(default_factory=dict)
    data: Data = Data()
    model: Model = Model()
    base: Base = Base()
    pretraining: Training | None = None
    diffusion: Diffusion = Diffusion()
    training: Training = Training()
    validation: Validation = Validation()
    sampling: Sampling = Sampling()
    metrics: Metrics = Metrics()
    methods: dict[Name, StudyMethod]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    search_seed: int = 1000  # of training while rates are tried: none of `seeds`
    table1: tuple[Name, ...] = ()  # methods side by side
    table2: tuple[Name, ...] = ()  # the same, with whole layers that train along (`method.also`)
    table3: tuple[Name, ...] = ()  # frozen copy against zero start
    table4: tuple[Name, ...] = ()  # time and memory
    figure4: Ranks = Ranks()
    start: Starts = Starts()
    screen: Screen = Screen()  # every shipped spec on convolutions
    screen_linear: LinearScreen = LinearScreen()  # and on a small transformer
    cost: Cost = Cost()
    templates: Path | None = None  # a folder with templates of made subjects, looked at before the packages' own
    rows: Path | None = None  # finished runs, one a line: those are not run again, and others are added
    minutes: Annotated[float, Field(gt=0)] | None = None  # no run starts that would not end within so many
    dry_run: bool = False  # build everything, count, and take one step at reduced size

    @field_validator("rows", "templates")
    @classmethod
    def _beside_the_configuration(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        folder = (info.context or {}).get("folder")
        return path if path is None or folder is None else Path(os.path.normpath(folder / path))

    def members(self, study: str) -> tuple[str, ...]:
        """The names of a study's methods, those that `with_variants` makes among them."""
        if study == "figure4":
            return tuple(self.ranked(name, rank) for name in self.figure4.methods for rank in self.figure4.ranks)
        if study == "start":
            own = [each for name in self.start.methods for each in self.started(name)]
            return (self.start.update, *own) if own else ()
        if study in SCREENS:
            return tuple(name for name, each in self.methods.items() if each.screened and each.screened.study == study)
        return tuple(getattr(self, study))

    def datasets_of(self, study: str) -> dict[str, DataSet]:
        """The data sets that a study trains on."""
        return {self.screen.dataset: self.datasets[self.screen.dataset]} if study == "screen" else dict(self.datasets)

    def seeds_of(self, study: str) -> tuple[int, ...]:
        """The seeds that a study trains with: a screen has one."""
        return self.seeds[:1] if study in SCREENS else self.seeds

    def searcher(self, method: str) -> str:
        """The method whose search finds the rate of this one."""
        return self.methods[method].rate_of or method if method in self.methods else method

    def ranked(self, name: str, rank: int) -> str:
        """The name of a method at a rank: its own name at its own rank, so that tables share the run."""
        return name if self.methods[name].method.params.get("r") == rank else f"{name}-r{rank}"

    def started(self, name: str) -> dict[str, float | None]:
        """The names of a method at its starts with their sizes: first its own name, at its own start."""
        sizes = {f"{name}-std{each.std:g}".replace(".", "_"): each.std for each in self.start.methods[name]}
        return {name: None, **sizes}

    def with_variants(self, *studies: str) -> StudyConfig:
        """The same study, with a method of its own for each rank of Figure 4 and each start of `start`.

        Where `studies` has a screen, also for each spec at each budget: half a minute's work, so only where asked for.
        """
        methods = dict(self.methods)
        for name in self.figure4.methods:
            for rank in self.figure4.ranks:
                params = {**self.methods[name].method.params, "r": rank}
                made = self._variant(name, {"params": params}, f"rank {rank}")
                methods.setdefault(self.ranked(name, rank), made)
        for name, starts in self.start.methods.items():
            for start, variant in zip(starts, [*self.started(name)][1:], strict=True):
                made = self._variant(name, {"start_std": start.std}, f"start {start.std:g}")
                change: dict[str, Any] = {"sampling": self.start.sampling}
                change |= {"rates": start.rates} if start.rates else {}
                methods.setdefault(variant, made.model_copy(update=change))
        screens = {}
        for study in (each for each in SCREENS if each in studies):
            added, left_out = self._screened(study)
            methods |= added
            screens[study] = getattr(self, study).model_copy(update={"left_out": left_out})
        return self.model_copy(update={"methods": methods, **screens})

    def _screened(self, study: str) -> tuple[dict[str, StudyMethod], dict[str, str]]:
        """The methods of a screen, of which one of each family searches for the rate; and what is in none."""
        linear = study == "screen_linear"
        screen: Screen = self.screen_linear if linear else self.screen
        found = derived_linear(self.screen_linear) if linear else derived_unet(self.model, self.base, screen)
        prefix, anchors = ("linear", self.screen_linear.anchors) if linear else ("screen", ())
        methods = {}
        for member in found.members:
            lead, name = f"{prefix}-{found.lead(member.family, screen.middle).name}", f"{prefix}-{member.name}"
            own: dict[str, Any] = {"rates": screen.families[member.family].rates} if name == lead else {"rate_of": lead}
            params = "".join(f", {param} {value:g}" for param, value in member.params.items())
            train: dict[str, Any] = {"train": "cores" if linear else "bias_norm"}
            about: dict[str, Any] = {"study": study, "spec": member.spec, "family": member.family}
            screened = Screened(**about, budget=member.budget)
            methods[name] = StudyMethod(
                title=f"{member.spec}{params}",
                method=Method(spec=member.spec, match=member.match, params=dict(member.params), **train),
                training=screen.training,
                sampling=Sampling(count=0),
                screened=screened,
                **own,
            )
            if member.spec in anchors:
                peft = screened.model_copy(update={"peft": True})
                change = {"title": f"{member.spec}{params}, PEFT", "screened": peft, "rates": (), "rate_of": lead}
                methods[f"{name}-peft"] = methods[name].model_copy(update=change)
        return methods, found.left_out

    def _variant(self, name: str, change: Mapping[str, Any], what: str) -> StudyMethod:
        own = self.methods[name]
        method = own.method.model_copy(update=dict(change))
        return own.model_copy(update={"method": method, "title": f"{own.title or name}, {what}", "note": None})

    def settled(self) -> StudyConfig:
        """The same study with nothing left to replace: every method and data set has all of its settings."""
        methods = {
            name: each.model_copy(
                update={
                    "training": overlaid(self.training, each.training),
                    "sampling": overlaid(self.sampling, each.sampling),
                }
            )
            for name, each in self.methods.items()
        }
        datasets = {name: each.model_copy(update={"data": self.data_of(each)}) for name, each in self.datasets.items()}
        return self.model_copy(update={"methods": methods, "datasets": datasets})

    def training_of(self, method: str, seed: int, rate: float | None = None) -> Training:
        """The common training with what the method replaces, the seed, and a rate where it has several."""
        own = self.methods[method]
        found = overlaid(self.training, own.training)
        rates = self.methods[self.searcher(method)].rates
        if rates:
            rate = rate or sorted(rates)[len(rates) // 2]  # of a dry run, or a check
            found = found.model_copy(update={"learning_rate": rate})
        return found.model_copy(update={"seed": seed})

    @property
    def pretrained_on(self) -> DataSet:
        """The source, with no subjects to test on unless it asks for some: nothing is reported on it."""
        own = self.source.data
        if "test_share" in own.model_fields_set:
            return self.source
        return self.source.model_copy(update={"data": own.model_copy(update={"test_share": 0.0})})

    def data_of(self, dataset: DataSet) -> Data:
        """The common settings with what the data set replaces, and the anatomies of made subjects as strata."""
        found = overlaid(self.data, dataset.data)
        return found if dataset.made is None else found.model_copy(update=dataset.made.split())

    def tried(self, method: str, dataset: DataSet, rate: float, checkpoint: Base) -> Config:
        """The configuration of a run that tries a rate: no samples, and no look at what is tested on."""
        found = self.run(method, dataset, self.search_seed, checkpoint, rate)
        blind = self.validation.model_copy(update={"test": False})
        return found.model_copy(update={"validation": blind, "sampling": Sampling(count=0), "metrics": Metrics()})

    def run(
        self, method: str | None, dataset: DataSet, seed: int, checkpoint: Base, rate: float | None = None
    ) -> Config:
        """The configuration of one run; of the base itself where there is no method."""
        common = self.training
        sampling = overlaid(self.sampling, self.methods[method].sampling) if method is not None else self.sampling
        plain = Training(precision=common.precision, device=common.device, threads=common.threads)
        return Config(
            data=self.data_of(dataset),
            model=self.model,
            base=checkpoint,
            diffusion=self.diffusion,
            method=self.methods[method].method if method is not None else Method(),
            training=self.training_of(method, seed, rate) if method is not None else plain,
            validation=self.validation,
            sampling=sampling.model_copy(update={"seed": sampling.seed + seed}),
            metrics=self.metrics,
        )

    def _check_unseen(self) -> None:
        """Raise LabError where a base, or a method, trains on an anatomy that is to be unseen."""
        source = self.source.made.anatomies if self.source.made is not None else ()
        for name, dataset in self.datasets.items():
            made = dataset.made
            if made is None:
                continue
            for anatomy in made.held_out:
                seen = [what for what, own in (("source", source), (name, made.anatomies)) if anatomy in own]
                if seen:
                    where = f"datasets.{name}.made.unseen"
                    fix = "Take it out of one of the two."
                    found = f"{anatomy} in `{seen[0]}`"
                    raise fault(where, "an anatomy that nothing sees", "none to train on", found, fix)

    def check_names(self) -> None:
        """Raise LabError where a table names a method that is not there, or a seed stands twice."""
        self._check_unseen()
        if self.screen.families and self.screen.dataset not in self.datasets:
            expected, found = f"one of {', '.join(self.datasets)}", f"`{self.screen.dataset}`"
            raise fault("screen.dataset", "a data set", expected, found, "Correct the name.")
        for study in STUDIES:
            for name in self._named(study):
                if name not in self.methods:
                    expected = f"one of {', '.join(self.methods)}"
                    raise fault(study, "a method", expected, f"`{name}`", "Add it to `methods`, or correct the name.")
        for name, starts in self.start.methods.items():
            if len(self.started(name)) < len(starts) + 1:
                found = str([each.std for each in starts])
                raise fault(
                    f"start.methods.{name}", "the sizes of a start", "each once", found, "Remove one of the two."
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise fault("seeds", "the seeds", "each once", str(list(self.seeds)), "Remove one of the two.")

    def _named(self, study: str) -> tuple[str, ...]:
        """The names of methods that stand under a study."""
        if study == "figure4":
            return self.figure4.methods
        if study == "start":
            return (self.start.update, *self.start.methods) if self.start.methods else ()
        return () if study in SCREENS else tuple(getattr(self, study))


def overlaid(common: S, own: S) -> S:
    """`common` with every setting that was written down in `own`."""
    return common.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})
