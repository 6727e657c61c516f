"""A study without its data: build every method on the full model, count, and take one step at reduced size."""

from __future__ import annotations

import gc
import math
import re
from pathlib import Path
from typing import Any

from rich.table import Table

from ddpm_lab.config.settings import Data
from ddpm_lab.data.files import find_volumes
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.base_file import name_some
from ddpm_lab.model.unet import divisor
from ddpm_lab.study.cost import Subject, subject
from ddpm_lab.study.plan import Plan
from ddpm_lab.study.rows import Rows, alike
from ddpm_lab.study.screen_linear import LinearPlan
from ddpm_lab.study.screen_settings import SCREENS
from ddpm_lab.study.search import Choice, change_of
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.support.console import Screen, clock
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import fault
from ddpm_lab.support.record import machine, versions
from tnpeft.documents.paths import is_file

__all__ = ["dry_run"]

QUERY_OR_KEY = re.compile(r"\.attn\.to_[qk]\.")


def dry_run(name: str, config: StudyConfig, out: Path, screen: Screen) -> dict[str, Any]:
    """Check a study as far as that goes without training, and write `dry-run-NAME.json`."""
    if name in SCREENS:
        return _dry_screen(name, config, out, screen)
    side = divisor(config.model)  # the smallest volume that the model can take
    shape = (side, side, side)
    accelerator = make_accelerator(config.training)
    methods: dict[str, dict[str, Any]] = {}
    members = config.members(name)
    with screen.bar(f"build and step, {side}x{side}x{side}", len(members)) as bar:
        for number, each in enumerate(members, 1):
            training = config.training_of(each, config.seeds[0])
            built = subject(config, config.methods[each].method, training, accelerator)
            methods[each] = _described(built, each, shape)
            del built
            gc.collect()
            bar(number, each)
    found = {
        "study": name,
        "shape": list(shape),
        "methods": methods,
        "datasets": {each: _files(config.data_of(about)) for each, about in config.datasets.items() if not about.made},
        **_left(name, config, out),
        "machine": machine(),
        "versions": versions(),
    }
    write_json(out / f"dry-run-{name}.json", found)
    _show(found, screen)
    return found


def _dry_screen(name: str, config: StudyConfig, out: Path, screen: Screen) -> dict[str, Any]:
    """What a screen would run: its specs were counted when its members were found, and none takes a step."""
    members = {each: config.methods[each].screened for each in config.members(name)}
    budgets: dict[str, int] = {}
    for about in members.values():
        assert about is not None
        label = "more" if about.budget is None else f"{about.budget:,}"
        budgets[label] = budgets.get(label, 0) + 1
    left_out = dict(getattr(config, name).left_out)
    found = {"study": name, "methods": budgets, "left_out": left_out, **_left(name, config, out)}
    write_json(out / f"dry-run-{name}.json", found)
    rows = ", ".join(f"{number} at {label}" for label, number in budgets.items())
    screen.line(f"Dry run of {name}: {found['runs']} runs for {len(members)} rows ({rows})")
    screen.line(f"{found['left']} of {found['runs']} runs are left: {_how_long(found['seconds_left'])}")
    for each, why in left_out.items():
        screen.line(f"not here: {each}: {why}")
    return found


def _how_long(seconds: float | None) -> str:
    return "no row says how long" if seconds is None else f"about {clock(seconds)} in one process, by the rows"


def _left(name: str, config: StudyConfig, out: Path) -> dict[str, Any]:
    """How many runs the study has, how many no row has yet, and how long those take by the seconds of the rows."""
    kind = LinearPlan if name == "screen_linear" else Plan
    rows, plan = Rows(config.rows), kind.sketch(name, config, out)
    if name == "table4":
        return {"runs": 0, "left": 0, "seconds_left": 0.0}
    searches = plan.searches()
    found = {id(run): row for run in searches for row in rows.known.values() if alike(row, run)}
    chosen = {}
    for run in searches:
        same = [each for each in searches if (each.method, each.dataset) == (run.method, run.dataset)]
        changes: dict[float, float] = {}
        for each in same:
            row = found.get(id(each))
            change = change_of(row["status"], row["errors"]) if row is not None else None
            if change is not None and each.rate is not None:
                changes[each.rate] = change
        chosen[run.method, run.dataset] = Choice(tuple(each.rate or 0.0 for each in same), changes)
    finals, _ = plan.finals({key: choice if choice.best else _any(choice) for key, choice in chosen.items()})
    finals = [*finals, *plan.measures(finals)]
    done = [any(alike(row, run) for row in rows.known.values()) for run in finals]
    left = [run for run in searches if id(run) not in found]
    left += [run for run, there in zip(finals, done, strict=True) if not there]
    seconds = [rows.expected(run) for run in left]
    known = [each for each in seconds if each is not None]
    whole = sum(known) if len(known) == len(left) else None
    return {"runs": len(searches) + len(finals), "left": len(left), "seconds_left": whole}


def _any(choice: Choice) -> Choice:
    """A rate for runs that are counted before theirs is chosen."""
    return Choice(choice.rates[:1], {choice.rates[0]: 0.0})


def _described(built: Subject, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The size of a method and two real steps of it: a core beside one of zeros has no gradient in the first."""
    before = {each: value.detach().clone() for each, value in built.unet.named_parameters() if value.requires_grad}
    loss = built.step(*built.inputs(shape, 1))
    if not math.isfinite(loss):
        raise fault(f"methods.{name}", "the loss of the first step", "a finite number", str(loss), "Check the model.")
    built.step(*built.inputs(shape, 1))
    after = dict(built.unet.named_parameters())
    at_rest = [each for each, value in before.items() if after[each].equal(value)]
    return {
        "trainable_parameters": built.trained.parameters,
        "base_parameters": built.trained.total,
        "loss": loss,
        "tensors": len(before),
        "tensors_moved": len(before) - len(at_rest),  # in two steps
        "at_rest": at_rest,
    }


def _files(data: Data) -> dict[str, Any]:
    """How many files a data set has, where its folder is given."""
    if data.manifest is not None:
        return {"manifest": str(data.manifest), "there": is_file(data.manifest)}
    if data.root is None:
        return {"root": None}
    return {"root": str(data.root), "files": len(find_volumes(data))}


def _show(found: dict[str, Any], screen: Screen) -> None:
    table = Table(title=f"Dry run of {found['study']}: {found['runs']} runs", title_justify="left", title_style="bold")
    if found["left"]:
        screen.line(f"{found['left']} of {found['runs']} runs are left: {_how_long(found['seconds_left'])}")
    table.add_column("method", no_wrap=True)
    for name in ("trains", "of base", "loss of a step", "moved in 2 steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, about in found["methods"].items():
        table.add_row(
            name,
            f"{about['trainable_parameters']:,}",
            f"{about['trainable_parameters'] / about['base_parameters']:.2%}",
            f"{about['loss']:.4f}",
            f"{about['tensors_moved']} of {about['tensors']}",
        )
    screen.console.print(table)
    _explain(found["methods"], screen)
    for name, about in found["datasets"].items():
        screen.line(f"{name}: " + ", ".join(f"{key} {value}" for key, value in about.items()))


def _explain(methods: dict[str, dict[str, Any]], screen: Screen) -> None:
    """Why some tensors stay where they are, which is mostly as it should be."""
    if any(QUERY_OR_KEY.search(each) for about in methods.values() for each in about["at_rest"]):
        screen.line(
            "Queries and keys that did not move belong to an attention that sees a single voxel at this size: its "
            "weight is 1 whatever they are. They move on larger volumes."
        )
    for name, about in methods.items():
        others = [each for each in about["at_rest"] if not QUERY_OR_KEY.search(each)]
        if others:
            screen.line(f"{name}: no gradient moved {name_some(others)}")
