"""What one run does, as data; `reader` reads it from YAML.

Every number of a run stands here, none in the code: the paper's values are the defaults, except
where a comment says otherwise.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from tnpeft.documents.paths import is_file

__all__ = [
    "Anatomy",
    "Base",
    "Config",
    "Data",
    "DemoConfig",
    "Diffusion",
    "Distributed",
    "Method",
    "Metrics",
    "Model",
    "Population",
    "Sampling",
    "Training",
    "Validation",
]

Positive = Annotated[int, Field(gt=0)]
Millimetres = Annotated[float, Field(gt=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
Size = tuple[Positive, Positive, Positive]
Anatomy = Literal["mni152", "icbm2009c", "colin27", "three_tissue", "inia19"]  # what made subjects descend from


class Section(BaseModel):
    """A part of the configuration; unknown keys and numbers written as words are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """Where the volumes lie and what is done to each: orient, space, crop, resize, scale."""

    root: Path | None = None
    layout: Literal["plain", "ukb", "adni", "ppmi", "brats"] = "plain"
    keep: Path | None = None  # BraTS: a text file with the file names to keep, one a line
    paper_order: bool = False  # crop, orient, space, as the paper's code does; then crops depend on stored axes
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    crop: Size | None = None  # cropped or padded to this many voxels
    resize: Size | None = None
    intensity: tuple[float, float] = (0.0, 1.0)  # every volume's minimum and maximum are moved here, or:
    percentiles: tuple[Percent, Percent] | None = None  # these, as [0, 99.9]; what lies beyond them is cut off
    cache: Literal["memory", "disk", "none"] = "memory"
    manifest: Path | None = None  # `prepare`'s: names the files and the split, in place of root, layout and keep
    checksums: bool = False  # compare each file's sha256 with the manifest's, not its size alone: reads every file
    skip_damaged: bool = False  # leave out, and list, volumes that turn out damaged in mid-epoch or in `evaluate`
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of subjects that a study reports on, and nothing else sees
    split_seed: int = 0
    strata: str | None = None  # a pattern of file names with one group: each part of the split has its share of each
    unseen: tuple[str, ...] = ()  # strata held out whole, which are measured before and after as those to test on are

    @field_validator("strata")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error:
            groups = 0
        if groups != 1:
            raise ValueError("a regular expression with one group")
        return pattern

    @field_validator("unseen")
    @classmethod
    def _of_strata(cls, unseen: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if unseen and info.data.get("strata") is None:
            raise ValueError("nothing without `strata`, which says of a file which it is of")
        return tuple(sorted(set(unseen)))

    @field_validator("intensity")
    @classmethod
    def _darkest_first(cls, intensity: tuple[float, float]) -> tuple[float, float]:
        if intensity[0] >= intensity[1]:
            raise ValueError("two numbers, the first below the second")
        return intensity

    @field_validator("percentiles")
    @classmethod
    def _lowest_first(cls, percentiles: tuple[float, float] | None) -> tuple[float, float] | None:
        if percentiles is not None and percentiles[0] >= percentiles[1]:
            raise ValueError("two numbers, the first below the second")
        return percentiles

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later settings where they say nothing: then caches and runs keep their names."""
        values: dict[str, Any] = dump(self)
        for name in ("percentiles", "test_share", "strata", "unseen"):
            if not values.get(name):
                values.pop(name, None)
        return values


class Model(Section):
    """MONAI's DiffusionModelUNet; the defaults are the paper's model, 166.7 M parameters."""

    channels: tuple[Positive, ...] = (32, 32, 64, 128, 256, 512)
    attention_levels: tuple[bool, ...] = (False, False, False, False, True, True)
    head_channels: tuple[Annotated[int, Field(ge=0)], ...] = (0, 0, 0, 0, 256, 512)
    res_blocks: Positive = 2
    norm_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    flash_attention: bool = False
    checkpointing: bool = False  # recompute activations level by level: less memory, about a third more time


class Base(Section):
    """The pretrained model that is fine-tuned."""

    checkpoint: Path | None = None  # .safetensors, or a state dict that torch.load can read with weights_only
    old_generative: bool = False  # written with the monai-generative package: no `attn.out_proj`


class Diffusion(Section):
    """The noise schedule, and what the network predicts."""

    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    schedule: Literal["scaled_linear_beta", "linear_beta", "cosine", "sigmoid_beta"] = "scaled_linear_beta"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0005
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.0195
    timesteps: Annotated[int, Field(ge=10)] = 1000


class Method(Section):
    """What trains: an adapter (a recipe, or a spec with `match`), everything, or biases and norms."""

    kind: Literal["adapter", "full", "bias_norm"] = "adapter"
    recipe: str | None = None  # a shipped name or a path, from here or from the configuration's folder
    spec: str | None = None  # the same, with `match`
    match: str | None = None  # a regular expression over module names, or `all` for a spec
    train: Literal["cores", "bias_norm"] = "bias_norm"  # with `spec`: the cores alone, or adapted biases and norms too
    params: dict[str, Any] = {}  # the spec's: {r: 4}
    mode: Literal["auto", "dense", "factored", "hybrid"] = "auto"
    also: tuple[str, ...] = ()  # joint fine-tuning: patterns of layers that train whole, beside the adapters
    start_std: Annotated[float, Field(ge=0)] | None = (
        None  # every adapter starts so large (`model/starts.py`); 0: at zero
    )
    zero_scale: bool = False  # as the paper's scripts build LoRA and LoHa: rank // 4 = 0 scales updates to nothing

    @field_validator("recipe", "spec")
    @classmethod
    def _beside_the_configuration(cls, name: str | None, info: ValidationInfo) -> str | None:
        folder = (info.context or {}).get("folder")
        if name is None or folder is None or is_file(name):
            return name
        beside = Path(os.path.normpath(folder / name))
        return str(beside) if is_file(beside) else name


class Training(Section):
    """The loop: Adam on the mean squared error. The paper's scripts use 5e-5, its text says 1e-5."""

    steps: Positive | None = None  # optimiser steps, or:
    epochs: Positive | None = None
    batch_size: Positive = 1
    accumulation: Positive = 4
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    schedule: Literal["constant", "one_cycle"] = "constant"
    loss: Literal["mse", "mae"] = "mse"
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # decay of an average of what trains; the average is the result
    )
    checkpoint_every: Positive | None = None  # optimiser steps; a run that was cut short goes on from the last one
    keep_checkpoints: Positive = 2
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the hardware multiplies in it
    device: Literal["auto", "cpu"] = "auto"
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None  # torch's; its own choice when not given
    processes: Positive | None = None  # refuse to run with another number of them (started by torchrun)
    workers: Annotated[int, Field(ge=0)] = 0  # processes that load volumes
    tensorboard: bool = False
    seed: int = 0


class Validation(Section):
    """The error on held-out volumes: the same noise and timesteps before, during and after.

    Volumes of the test split are measured before and after alone, with noise of their own.
    """

    every: Positive | None = None  # optimiser steps; when not given, before and after only
    buckets: Positive = 10  # equal ranges of timesteps, reported one by one
    draws: Positive = 1  # noises for each volume and bucket
    batch_size: Positive | None = None  # the training batch size when not given
    seed: int = 1234
    test: bool = True  # measure on the test split too, where there is one; a search for a rate does not

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `test` where it says nothing: then runs have the names that they always had."""
        values: dict[str, Any] = dump(self)
        if self.test:
            values.pop("test", None)
        return values


class Sampling(Section):
    """Volumes drawn from the base and from the fine-tuned model, both from the same noise."""

    scheduler: Literal["ddim", "ddpm"] = "ddim"
    steps: Positive = 250
    count: Annotated[int, Field(ge=0)] = 8
    batch_size: Positive = 1
    adapters: tuple[Path, ...] = ()  # `sample`: adapter files over one base, each with a folder of its own
    base: bool = True  # `sample`: the base itself too
    merge: bool = True  # `sample`: with merged weights
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 4321


class Metrics(Section):
    """Distances between samples and real volumes."""

    # Whose features FID and MMD compare. `auto`: MedicalNet's where its weights are named, else deepbet's where that is
    # installed (extra `encoder`), else random ones.
    encoder: Literal["auto", "medicalnet", "deepbet", "random"] = "auto"
    medicalnet: Path | None = None  # weights of MedicalNet's ResNet-50 (resnet_50.pth)
    # Which real volumes the samples are compared with; `all` takes in those that were trained on.
    reference: Literal["validation", "test", "all"] = "validation"
    most: Annotated[int, Field(ge=2)] = 1000  # real volumes of a set that are read, evenly chosen
    pairs: Positive = 100  # for MS-SSIM
    resamples: Annotated[int, Field(ge=0)] = 200  # of the bootstrap; 0 for none
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95  # of the intervals
    seed: int = 99


class Distributed(Section):
    """Several processes, started by torchrun: each holds the whole model, or a part of every tensor (FSDP2)."""

    # Gather one residual, attention or resampling block at a time. Then `batch_size * accumulation` samples of an
    # optimiser step are shared out to the processes, so that their number changes no result.
    shard: Literal["block"] | None = None


class Config(Section):
    """One fine-tuning run."""

    data: Data = Data()
    model: Model = Model()
    base: Base = Base()
    diffusion: Diffusion = Diffusion()
    method: Method = Method()
    training: Training = Training()
    distributed: Distributed = Distributed()
    validation: Validation = Validation()
    sampling: Sampling = Sampling()
    metrics: Metrics = Metrics()

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `distributed` where it says nothing: then runs have the names that they always had."""
        values: dict[str, Any] = dump(self)
        if self.distributed == Distributed():
            values.pop("distributed", None)
        return values


class Population(Section):
    """The subjects that the demonstration makes from the MNI152 template."""

    source: Annotated[int, Field(ge=4)] = 120  # T1-like
    target: Annotated[int, Field(ge=4)] = 60  # T2-like
    side: Annotated[int, Field(ge=8)] = 32  # voxels; the files' grid is finer than the model's
    seed: int = 0


class Published(Section):
    """An adapter as its paper has it, and how it is trained."""

    method: Method = Method()
    training: Training = Training()


class DemoConfig(Config):
    """The demonstration: a population, a base pretrained on its source, and the run on its target.

    `published` trains a paper's adapter on the same target, to compare with. `bias_norm` trains biases and norms alone:
    the baseline that an adapter has to beat.
    """

    population: Population = Population()
    pretraining: Training = Training()
    published: Published | None = None
    bias_norm: Training = Training()
