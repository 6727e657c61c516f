"""One run: check everything, adapt, train, sample, measure, write."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from monai.networks.schedulers import DDPMScheduler
from torch import nn

import tnpeft
from ddpm_lab.config.settings import Config, Training
from ddpm_lab.data.files import Split, check_data, find_volumes, rooted, split_volumes
from ddpm_lab.data.order import Source
from ddpm_lab.data.outliers import warnings_of
from ddpm_lab.data.volumes import check_sizes, dataset
from ddpm_lab.evaluation.encoder import Encoder, load_encoder
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.diffusion import HeldOut, HeldOutError, noise_schedule
from ddpm_lab.model.method import Trained, apply_method, check_fit, check_method
from ddpm_lab.model.sharding import shard
from ddpm_lab.model.unet import build_unet, divisor, load_base, recompute_activations
from ddpm_lab.sampling.draw import check_sampling, draw_samples
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import writing
from ddpm_lab.support.faults import fault
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.processes import together
from ddpm_lab.training.checkpoint import Checkpoint
from ddpm_lab.training.engine import smaller_steps
from ddpm_lab.training.resume import Kept, Saver, check_identity, identity, in_shards
from ddpm_lab.training.train import History, Step, measure, steps_of, train

__all__ = ["Run", "Setup", "Volumes", "prepare", "prepare_volumes", "probe", "run_training", "sample"]


NEVER_LEFT_OUT = "Mend the file: held-out volumes are never left out, for errors before and after would not compare."
BROKEN_BASE = "Mend `base.checkpoint`, or set `training.precision=fp32`."
EVENTS = "TensorBoard's events"
FLUSH = 10  # seconds of events that a killed run may lose


@dataclass(frozen=True)
class Volumes:
    """The data of a run: datasets of (1, D, H, W) tensors, `test` and `unseen` where the run measures on them."""

    split: Split
    train: Any
    validation: Any
    test: Any | None
    shape: tuple[int, ...]
    unseen: Any | None = None


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, checked; nothing has trained yet."""

    config: Config
    out: Path
    volumes: Volumes
    unet: nn.Module
    scheduler: DDPMScheduler
    held_out: HeldOut
    tested: Mapping[str, HeldOut]  # by the name of the split's part: `test` and `unseen`, where there are some
    encoder: Encoder
    accelerator: Accelerator

    @property
    def sharded(self) -> bool:
        """Whether each process holds parts of the network: of several ones, where the configuration says so."""
        return in_shards(self.config) and self.accelerator.num_processes > 1

    def place(self, unet: nn.Module) -> None:
        """Put a network where it runs: in parts on all devices, or whole on this one."""
        if self.sharded:
            shard(unet, self.accelerator.device, self.accelerator.num_processes)
        else:
            unet.to(self.accelerator.device)


@dataclass(frozen=True)
class Run:
    """One trained method and its errors on the same held-out volumes, before and after.

    `tested` are those two errors on the parts `test` and `unseen` of the split, where there are some.
    """

    trained: Trained
    history: History
    before: HeldOutError
    after: HeldOutError
    start_difference: float  # largest difference between the base and the adapted model before the first step
    tested: Mapping[str, tuple[HeldOutError, HeldOutError]] = field(default_factory=dict)

    @property
    def change(self) -> float:
        return self.after.change(self.before)


def prepare(config: Config, out: Path, screen: Screen) -> Setup:
    """Check everything a user can get wrong, cheapest first; raises TnpeftError, and writes only the split."""
    config = config.model_copy(update={"data": rooted(config.data)})
    check_method(config.method, config.base)
    check_sampling(config.diffusion, config.sampling)
    steps_of(config.training, 1)
    unet = build_unet(config.model, config.base, config.training.seed)
    if config.base.checkpoint is not None:
        load_base(unet, config.base, screen.line)
    check_fit(config.model, config.base, config.method)
    encoder = load_encoder(config.metrics)
    accelerator = make_accelerator(config.training, config.distributed)
    with together():
        volumes = prepare_volumes(config, out, screen, accelerator)
    if config.model.checkpointing:
        recompute_activations(unet)
    scheduler = noise_schedule(config.diffusion)
    split, shape = volumes.split, volumes.shape
    named = Source(volumes.validation, split.validation, shape, NEVER_LEFT_OUT)
    held_out = HeldOut(named, scheduler, config.validation, config.training.batch_size)
    tested = {}
    for part, own, files in (("test", volumes.test, split.test), ("unseen", volumes.unseen, split.unseen)):
        if own is not None and config.validation.test:
            named = Source(own, files, shape, NEVER_LEFT_OUT)
            tested[part] = HeldOut(named, scheduler, config.validation, config.training.batch_size, part)
    setup = Setup(config, out, volumes, unet, scheduler, held_out, tested, encoder, accelerator)
    if not setup.sharded:  # that is for later: adapters are attached first
        setup.place(unet)
    return setup


def prepare_volumes(config: Config, out: Path, screen: Screen, accelerator: Accelerator) -> Volumes:
    """Find, read and split the files; raises LabError for whatever is wrong with one of them."""
    data = config.data
    paths = find_volumes(data)
    split = split_volumes(paths, data)
    split.reference(config.metrics.reference)
    needed = config.training.batch_size * accelerator.num_processes
    if len(split.train) < needed:
        found = f"{len(split.train)} of {len(paths)} after holding {len(paths) - len(split.train)} out"
        fix = "Lower `training.batch_size` or add files."
        raise fault(str(data.root), "files to train on", f"at least {needed}, one batch", found, fix)
    with screen.bar(f"check {len(paths)} files", len(paths)) as bar:
        outliers = check_data(data, paths, bar)
    for line in warnings_of(outliers, data.percentiles):
        screen.line(line)
    assert data.root is not None
    if accelerator.is_main_process:
        make_folder(out)
        with writing(out, "the split"):
            split.write(out / "split.json", data.root)
    compared = config.metrics.reference == "test" and config.sampling.count > 0
    asked = {"test": config.validation.test or compared, "unseen": config.validation.test}
    wanted = {name: files for name, files in split.named() if asked.get(name, True)}
    with screen.phase("load volumes"):
        sets = {name: dataset(files, data, out / "cache") for name, files in wanted.items()}
    shape = None
    for name, files in wanted.items():
        if data.cache != "none":
            with screen.bar("prepare volumes", len(files)) as bar:
                shape = check_sizes(sets[name], files, divisor(config.model), bar, shape)
    if shape is None:
        shape = check_sizes(sets["train"][:1], split.train[:1], divisor(config.model))
    return Volumes(split, sets["train"], sets["validation"], sets.get("test"), shape, sets.get("unseen"))


def run_training(
    setup: Setup,
    screen: Screen,
    title: str,
    training: Training | None = None,
    found: Checkpoint | None = None,
    safe: bool = False,
) -> Run:
    """Measure the base, apply the method, train, measure again.

    A `safe` run writes checkpoints, and goes on from the one that was `found`.
    """
    config, accelerator = setup.config, setup.accelerator
    training = training or config.training
    if setup.sharded:
        training = training.model_copy(update={"accumulation": accelerator.gradient_accumulation_steps})
    trained, kept = _started(setup, screen, title) if found is None else _continued(setup, found)
    share = f"{trained.parameters:,} of {trained.total:,} parameters train ({trained.parameters / trained.total:.2%})"
    screen.line(f"{trained.title}: {share}")
    split, start = setup.volumes.split, 0 if found is None else found.step
    saver = Saver(config, setup.out, split, accelerator, trained, kept, found) if safe else None
    total = steps_of(training, len(split.train), accelerator.num_processes)
    with screen.bar(title, total, start) as bar, _events(setup, training, start) as write:

        def show(step: Step) -> None:
            held_out = f"  held-out {step.held_out.mean:.4f}" if step.held_out is not None else ""
            bar(step.number, f"loss {step.loss:.4f}{held_out}")
            for name, reason in step.damaged:
                screen.line(f"Step {step.number} left out {name}: {reason}")
            write(step)

        history = train(
            setup.unet,
            Source(setup.volumes.train, split.train, setup.volumes.shape),
            setup.scheduler,
            training,
            accelerator,
            setup.held_out,
            config.validation.every,
            show,
            saver,
            config.data.skip_damaged,
        )
    after, tested = _measured(setup, screen, f"{title}, after", smaller_steps(training))
    both = {part: (kept.tested[part], error) for part, error in tested.items()}
    return Run(trained, history, kept.before, after, kept.start_difference, both)


def _started(setup: Setup, screen: Screen, title: str) -> tuple[Trained, Kept]:
    """A new run: what trains, and how the model did without it."""
    if setup.sharded:
        return _started_in_parts(setup, screen, title)
    before, tested = _measured(setup, screen, f"{title}, before", BROKEN_BASE)
    start = probe(setup, setup.unet)
    trained = _applied(setup)
    return trained, Kept(before, (probe(setup, setup.unet) - start).abs().max().item(), tested)


def _started_in_parts(setup: Setup, screen: Screen, title: str) -> tuple[Trained, Kept]:
    """The same, measured after the model is sharded: no device holds all of the base."""
    trained = _applied(setup)
    with tnpeft.disabled(setup.unet) if trained.report is not None else contextlib.nullcontext():
        before, tested = _measured(setup, screen, f"{title}, before", BROKEN_BASE)
        start = probe(setup, setup.unet)
    return trained, Kept(before, (probe(setup, setup.unet) - start).abs().max().item(), tested)


def _continued(setup: Setup, found: Checkpoint) -> tuple[Trained, Kept]:
    """A run that goes on: what trains, with the values of the checkpoint. Raises LabError where it is another run."""
    own = identity(setup.config, setup.volumes.split, setup.accelerator)
    check_identity(setup.out, own, found.state["identity"])
    whole = setup.config.method.kind != "adapter"  # what trains of these is in the parts that the saver reads
    trained = _applied(setup, None if in_shards(setup.config) and whole else found.folder)
    probe(setup, setup.unet)  # as a new run does: layers plan how they run when they are first called
    return trained, Kept.of(found)


def _applied(setup: Setup, saved: Path | None = None) -> Trained:
    config = setup.config
    trained = apply_method(setup.unet, config.method, saved)
    setup.place(setup.unet)
    from_nothing = config.method.kind == "full" and config.base.checkpoint is None
    return replace(trained, title="pretraining") if from_nothing else trained


@contextmanager
def _events(setup: Setup, training: Training, start: int) -> Iterator[Callable[[Step], None]]:
    """A function that writes the steps after `start` to TensorBoard, where asked for."""
    folder, writer = setup.out / "tensorboard", None
    with together(), writing(folder, EVENTS):
        if training.tensorboard and setup.accelerator.is_main_process:
            writer = _writer(folder, start)
    if writer is None:
        yield lambda _: None
        return

    def write(step: Step) -> None:
        with writing(folder, EVENTS):
            writer.add_scalar("loss", step.loss, step.number)
            writer.add_scalar("learning rate", step.learning_rate, step.number)
            if step.held_out is not None:
                writer.add_scalar("held-out error", step.held_out.mean, step.number)

    try:
        yield write
    finally:  # what led to an error is worth seeing too
        with writing(folder, EVENTS):
            writer.close()


def _writer(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=start + 1, flush_secs=FLUSH)


def _measured(setup: Setup, screen: Screen, title: str, fix: str) -> tuple[HeldOutError, dict[str, HeldOutError]]:
    """The errors on the volumes to validate and, by the part of the split, on those that are tested on."""
    with screen.bar(title, setup.held_out.evaluations) as bar:
        validated = measure(setup.held_out, setup.unet, setup.accelerator, title, fix, bar)
    tested = {}
    for part, volumes in setup.tested.items():
        with screen.bar(f"{title}, {part}", volumes.evaluations) as bar:
            tested[part] = measure(volumes, setup.unet, setup.accelerator, f"{title}, {part}", fix, bar)
    return validated, tested


@torch.no_grad()
def probe(setup: Setup, unet: nn.Module) -> torch.Tensor:
    """The network's output for one fixed input: an adapter must not change it before its first step."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 1, *setup.volumes.shape), generator=generator).to(setup.accelerator.device)
    timesteps = torch.tensor([setup.scheduler.num_train_timesteps // 2], device=setup.accelerator.device)
    unet.eval()
    with setup.accelerator.autocast():
        return torch.as_tensor(unet(noise, timesteps=timesteps)).float()


def sample(setup: Setup, screen: Screen, title: str, unet: nn.Module | None = None) -> torch.Tensor:
    """Samples of a network, of the setup's own as it is now when none is given.

    Of a sharded one each process draws as many, so that they call it equally often; what is too much is dropped.
    """
    sampling, accelerator = setup.config.sampling, setup.accelerator
    each = math.ceil(sampling.count / accelerator.num_processes) if setup.sharded else sampling.count
    first = each * accelerator.process_index if setup.sharded else 0
    with screen.bar(title, each * sampling.steps) as bar, accelerator.autocast():
        drawn = draw_samples(
            unet or setup.unet,
            setup.volumes.shape,
            setup.config.diffusion,
            sampling,
            setup.config.data,
            accelerator.device,
            bar,
            range(first, first + each),
        )
    if setup.sharded:
        drawn = accelerator.gather(drawn.to(accelerator.device)).cpu()[: sampling.count]
    return drawn
