"""`screen_linear`: the shipped specs, and some tuners of PEFT by PEFT's own code, on a small transformer and made text.

The transformer is pretrained on the source text once in OUT, and each run adapts it to the target text.
"""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tnpeft
from ddpm_lab.config.settings import Base, Config, Method, Training
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.study.plan import Plan
from ddpm_lab.study.run import Run, made_of
from ddpm_lab.study.screen_cost import Step, costs
from ddpm_lab.study.screen_peft import attach_peft
from ddpm_lab.study.screen_settings import LinearScreen
from ddpm_lab.study.screen_text import Transformer, made_text
from ddpm_lab.study.settings import DataSet, StudyConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json, write_tensors
from ddpm_lab.support.faults import DivergenceError
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone
from ddpm_lab.training.resume import flat
from tnpeft.errors import Problem

__all__ = ["TEXT", "LinearPlan", "LinearRun", "trained"]

TEXT = "text"  # stands where a data set would
GROUP = 8  # sequences whose mean error is one number of a row


@dataclass(frozen=True)
class LinearPlan(Plan):
    """The runs of `screen_linear`; nothing must be there."""

    @classmethod
    def sketch(cls, name: str, config: StudyConfig, out: Path) -> LinearPlan:
        return cls(name, config, out, Base(), "", {TEXT: DataSet(title="Made text")})

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
        about, screened = self.config.screen_linear, self.config.methods[method].screened
        assert screened is not None
        parts = {
            name: value for name, value in made_of(own, {}, "").items() if name.startswith(("method.", "training."))
        }
        shared = about.model_dump(mode="json", include={"width", "layers", "text", "pretraining", "scopes"})
        settings = {**parts, **dict(flat({"linear": shared})), "method.peft": screened.peft}
        common = (method, dataset, seed, own, folder, self.out / "cache" / dataset, settings, rate, search)
        return LinearRun(*common, about=about, base=self.out / "linear", peft=screened.peft)


@dataclass(frozen=True)
class LinearRun(Run):
    """One method on the transformer; its errors are the cross-entropies of groups of held-out sequences."""

    about: LinearScreen = field(default_factory=LinearScreen)
    base: Path = Path()  # the folder with the pretrained transformer
    peft: bool = False

    def _stages(self, screen: Screen) -> None:
        make_accelerator(self.config.training)  # sets the number of threads
        base = pretrained(self.about, self.base)
        text = made_text(self.about.text, target=True)
        torch.manual_seed(self.config.training.seed)
        model = attached(copy.deepcopy(base), self.config.method, self.about, self.peft)
        parts = ("validation",) if self.search else ("validation", "test")
        before = {part: errors_of(model, text[part]) for part in parts}
        points = trained(model, text["train"], self.config.training, text["validation"])
        after = {part: errors_of(model, text[part]) for part in parts}
        run = {
            "method": self.method,
            "trainable_parameters": trainable(model),
            "base_parameters": sum(each.numel() for each in base.parameters()),
            "steps": self.config.training.steps,
            "held_out_error_before": statistics.fmean(before["validation"]),
            "held_out_error_after": statistics.fmean(after["validation"]),
            **{f"{part}_change_percent": _change(before[part], after[part]) for part in parts},
            "by_volume": {part: {"before": before[part], "after": after[part]} for part in parts},
            **({} if self.search else self._costs(base, text["train"])),
        }
        write_json(
            self.folder / "split.json", {part: [f"{part}-{n:02d}" for n in range(len(before[part]))] for part in parts}
        )
        rate = {"training": {"learning_rate": self.config.training.learning_rate}}
        write_json(self.folder / "summary.json", {"run": run, "history": {"validation": points}, "config": rate})

    def _costs(self, base: nn.Module, text: Tensor) -> dict[str, float]:
        batch = text[: self.config.training.batch_size]

        def step(adapted: bool) -> Step:
            model = copy.deepcopy(base).requires_grad_(True)
            if adapted:
                model = attached(model, self.config.method, self.about, self.peft)
            optimizer = _optimizer(model, self.config.training)
            return lambda: _step(model, optimizer, batch, self.config.training)

        return costs(lambda: step(True), lambda: step(False), self.about.rounds, make_accelerator(self.config.training))


def pretrained(about: LinearScreen, folder: Path) -> nn.Module:
    """The transformer after the source text, trained where OUT has none yet."""
    torch.manual_seed(about.text.seed)
    model: nn.Module = Transformer(about.text.words, about.text.length, about.width, about.layers)
    make_folder(folder)
    with alone(folder / "lock", wait=True):
        path = folder / "base.safetensors"
        if not path.is_file():
            trained(model, made_text(about.text, target=False)["train"], about.pretraining)
            write_tensors(path, {name: value.detach() for name, value in model.state_dict().items()})
        model.load_state_dict(load_file(path))
    return model


def attached(model: nn.Module, method: Method, about: LinearScreen, peft: bool) -> nn.Module:
    """The model with a method's adapters, which alone train."""
    if peft:
        return attach_peft(model, method)
    spec = tnpeft.load_spec(method.spec or "")
    scopes = {name: pattern for name, pattern in about.scopes.items() if name in spec.scopes}
    tnpeft.attach(model, spec, match=method.match, scopes=scopes, mode=method.mode, **method.params)
    return model


def trained(
    model: nn.Module, text: Tensor, training: Training, held_out: Tensor | None = None
) -> list[tuple[int, float, list[float]]]:
    """Train what requires a gradient; the held-out errors on the way. Raises DivergenceError."""
    assert training.steps is not None
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = _optimizer(model, training)
    peak = training.learning_rate
    rates = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=training.steps)
        if training.schedule == "one_cycle"
        else torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    )
    points: list[tuple[int, float, list[float]]] = []
    model.train()
    for number in range(1, training.steps + 1):
        batch = text[torch.randint(len(text), (training.batch_size,), generator=generator)]
        loss = _step(model, optimizer, batch, training)
        if not math.isfinite(loss):
            raise DivergenceError(*_diverged(number, loss))
        rates.step()
        if held_out is not None and number % max(1, training.steps // 4) == 0 and number < training.steps:
            points.append((number, statistics.fmean(errors_of(model, held_out)), []))
    return points


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    return torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=training.learning_rate)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, training: Training) -> float:
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    if training.clip_norm is not None:
        nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], training.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


@torch.no_grad()
def errors_of(model: nn.Module, text: Tensor) -> list[float]:
    """The mean cross-entropy of each group of sequences, in nats a word."""
    model.eval()
    logits = model(text[:, :-1])
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(1)
    model.train()
    return [float(losses[first : first + GROUP].mean()) for first in range(0, len(losses), GROUP)]


def trainable(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


def _change(before: list[float], after: list[float]) -> float:
    return 100 * (statistics.fmean(after) / statistics.fmean(before) - 1)


def _diverged(number: int, loss: float) -> tuple[Problem]:
    return (Problem(f"the loss of step {number}", "a finite number", str(loss), "Lower the rate.", "training"),)
