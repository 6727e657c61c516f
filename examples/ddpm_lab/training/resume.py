"""Going on where a run was cut short: what must be the same, what a checkpoint holds, and what is done already."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ddpm_lab.config.settings import Config
from ddpm_lab.data.files import Split
from ddpm_lab.model.diffusion import HeldOutError
from ddpm_lab.model.method import Trained
from ddpm_lab.support.durable import digest_of_file
from ddpm_lab.support.faults import fault, raise_all
from ddpm_lab.support.processes import together
from ddpm_lab.training.checkpoint import Checkpoint, Checkpoints
from ddpm_lab.training.progress import Loop, random_states, restore_random_states
from tnpeft.errors import Problem

__all__ = [
    "Kept",
    "Saver",
    "check_identity",
    "check_same_checkpoint",
    "check_settings",
    "differences",
    "earlier_checkpoint",
    "finished_summary",
    "flat",
    "identity",
    "in_shards",
]

# Settings that change how fast a run is and how it is watched, not what comes out of it.
FREE = (
    "data.cache",
    "data.skip_damaged",
    "training.checkpoint_every",
    "training.device",
    "training.keep_checkpoints",
    "training.processes",
    "training.tensorboard",
    "training.threads",
    "training.workers",
)
AFTERWARDS = ("sampling.", "metrics.")  # read when training is over
ANOTHER = "Choose another `--out`, put the setting back, or remove the folder to start anew."


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON has it."""
    return dict(flat(config.model_dump(mode="json")))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_settings(out: Path, config: Config, earlier: Mapping[str, Any], done: bool) -> None:
    """Raise LabError that names every setting in which `config` differs from the earlier run's (nested, as JSON)."""
    own, theirs = settings_of(config), dict(flat(earlier))
    problems = []
    for name, was, now in differences(own, theirs):
        if name not in FREE and (done or not name.startswith(AFTERWARDS)):
            what = f"`{name}` of the run in this folder"
            problems.append(Problem(what, f"{was}, as when it started", now, ANOTHER, str(out)))
    raise_all(problems, str(out))


def differences(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each setting that differs, by name: what an earlier run had and what this one has, as a message says it."""
    for name in sorted({*own, *theirs}):
        if own.get(name) != theirs.get(name):
            yield name, _shown(theirs.get(name)), _shown(own.get(name))


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def finished_summary(config: Config, out: Path) -> dict[str, Any] | None:
    """The summary of a run that is done in `out`; raises LabError if that had other settings."""
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        done, earlier = (out / summary["result"]).is_file(), dict(summary["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not done:
        return None
    check_settings(out, config, earlier, done=True)
    found: dict[str, Any] = summary
    return found


def earlier_checkpoint(config: Config, out: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """Where an earlier process stopped in `out`, with the threads it had; raises LabError if it had other settings."""
    found = Checkpoints(out, config.training.keep_checkpoints).newest(note)
    if found is None:
        return None
    check_settings(out, config, found.state["config"], done=False)
    threads = found.state["threads"]
    if config.training.threads not in (None, threads):
        fix = f"Pass `--set training.threads={threads}`: other threads sum in another order."
        what = "`training.threads` of the run in this folder"
        raise fault(out, what, f"{threads}, as when it started", str(config.training.threads), fix)
    if torch.get_num_threads() != threads:
        note(f"Threads set to {threads}, as when the run started")
        torch.set_num_threads(threads)
    return found


def check_same_checkpoint(out: Path, found: Checkpoint | None) -> None:
    """Raise LabError, the same in every process, where some go on from another step than the others."""
    steps = gather_object([0 if found is None else found.step])
    if len(set(steps)) > 1:
        expected, fix = "the same for every process", "Make `--out` a folder that all machines share."
        raise fault(out, "the last checkpoint", expected, f"those of the steps {', '.join(map(str, steps))}", fix)


def identity(config: Config, split: Split, accelerator: Accelerator) -> dict[str, Any]:
    """What else must be the same when a run goes on, beside its settings."""
    names = [[str(path) for path in files] for _, files in split.named()]
    base = config.base.checkpoint
    found = {
        "volumes": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        "base": None if base is None else digest_of_file(base),
        "precision": accelerator.mixed_precision,
    }
    return found if in_shards(config) else found | {"processes": accelerator.num_processes}


def in_shards(config: Config) -> bool:
    """Whether checkpoints are written in parts, for any number of processes to go on from, one included."""
    return config.distributed.shard is not None


WORDS = {
    "volumes": ("files to train on and to hold out", "those it started with", "others"),
    "base": ("content of `base.checkpoint`", "that it started from", "another"),
}


def check_identity(out: Path, own: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise LabError that names everything in which two `identity` differ."""
    problems = []
    for name, value in own.items():
        if theirs.get(name) != value:
            both = ("fp32" if one == "no" else str(one) for one in (theirs.get(name), value))  # accelerate says `no`
            what, expected, found = WORDS.get(name, (name, *both))
            fix = "Choose another `--out`, put this back, or remove the folder to start anew."
            if name == "processes":
                start = "Start as many with `torchrun --nproc_per_node`"
                fix = f"{start}, choose another `--out`, or remove the folder to start anew."
            problems.append(Problem(f"{what} of the run in this folder", expected, found, fix, str(out)))
    raise_all(problems, str(out))


@dataclass(frozen=True)
class Kept:
    """What was measured before the first step."""

    before: HeldOutError
    start_difference: float
    tested: Mapping[str, HeldOutError] = field(default_factory=dict)  # on other parts of the split, by their names

    @classmethod
    def of(cls, found: Checkpoint) -> Kept:
        tested = found.state.get("tested") or {}
        if not isinstance(tested, dict):  # of a version that knew no other part
            tested = {"test": tested}
        return cls(
            HeldOutError.from_data(found.state["before"]),
            found.state["start_difference"],
            {part: HeldOutError.from_data(error) for part, error in tested.items()},
        )


class Saver:
    """Keeps a run's training in checkpoints, and brings it back from the one that was found.

    Every process takes part; the first one writes. Raises LabError where the run is not the one of the checkpoint.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        split: Split,
        accelerator: Accelerator,
        trained: Trained,
        kept: Kept,
        found: Checkpoint | None = None,
    ) -> None:
        self.config, self.accelerator, self.trained, self.kept, self.found = config, accelerator, trained, kept, found
        self.checkpoints = Checkpoints(out, config.training.keep_checkpoints)
        self.identity = identity(config, split, accelerator)
        self.volumes = len(split.train)

    def restore(self, loop: Loop) -> None:
        """Bring a loop, and this process's random states, to where the checkpoint has them."""
        if self.found is None:
            return
        loop.restore(self.found.state["loop"], self._tensors(self.found, loop))
        states = self.found.state["random"]
        if len(states) == self.accelerator.num_processes:  # order and noise need none of them
            restore_random_states(states[self.accelerator.process_index])

    def _tensors(self, found: Checkpoint, loop: Loop) -> dict[str, dict[str, torch.Tensor]]:
        if not in_shards(self.config):
            return found.tensors()
        from ddpm_lab.training.shards import SHARDS, read_shards

        return read_shards(found.folder / SHARDS, loop.parameters)

    def after_step(self, loop: Loop, total: int) -> None:
        """Write a checkpoint where one is due, and after the last step."""
        every = self.config.training.checkpoint_every
        if every is None or not (loop.step % every == 0 or loop.step == total):
            return
        state = {
            "config": self.config.model_dump(mode="json"),
            "identity": self.identity,
            "threads": torch.get_num_threads(),
            "position": self._position(loop.step),
            "before": self.kept.before.as_data(),
            "tested": {part: error.as_data() for part, error in self.kept.tested.items()},
            "start_difference": self.kept.start_difference,
            "random": gather_object([random_states()]),
            "loop": loop.data(),
        }
        if in_shards(self.config):
            self._write_shards(loop, state)
            return
        with together():
            if self.accelerator.is_main_process:
                self.checkpoints.write(loop.step, state, loop.tensors(), self.trained.save)

    def _write_shards(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """The parts of all processes, and the adapter's file, which says what to attach before they are read."""
        from ddpm_lab.training.shards import SHARDS, write_shards

        first, step = self.accelerator.is_main_process, loop.step
        with self.checkpoints.begun(step) if first else contextlib.nullcontext():
            with together():
                if first:
                    self.checkpoints.make(step)
            folder = self.checkpoints.unfinished(step)
            with together(), self.checkpoints.writing(step):
                if self.trained.report is not None:
                    self.trained.save(folder)
                write_shards(folder / SHARDS, loop)
            with together():
                if first:
                    self.checkpoints.complete(step, {**state, "tensors": []})

    def _position(self, step: int) -> dict[str, int]:
        """The next sample: follows from the step alone, and is written down for people."""
        accelerator = self.accelerator
        share = self.config.training.batch_size * accelerator.gradient_accumulation_steps
        samples = step * share * accelerator.num_processes
        epoch, sample = divmod(samples, self.volumes)
        return {"epoch": epoch, "sample": sample}
