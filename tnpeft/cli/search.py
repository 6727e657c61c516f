"""`tnpeft search`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnpeft.cli.arguments import parse_number
from tnpeft.cli.models import build_example, build_model
from tnpeft.cli.output import Output, UsageError, table
from tnpeft.errors import Problem, shown_path

if TYPE_CHECKING:
    from tnpeft.searching import Candidate, Search
    from tnpeft.searching.compared import Row
    from tnpeft.searching.updates import Pair, Pairs

__all__ = ["search_networks"]

_SHOWN = 5  # candidates in the text


def search_networks(
    output: Output,
    files: Sequence[str],
    model_text: str,
    params_text: str,
    target: str,
    *,
    tests: Sequence[str],
    rates: Sequence[float] | None,
    report: str | None,
    test_commands: Sequence[str],
    example: str | None,
    quiet: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Search, write the winner's file and report; `how` goes to `tnpeft.search`."""
    from tnpeft.draw.files import need_matplotlib
    from tnpeft.fitting.checkpoint import Checkpoint
    from tnpeft.searching import search, search_report
    from tnpeft.searching.needs import check_target, need_optuna
    from tnpeft.searching.search import RATES, time_after

    params, held_out = parse_number(params_text, "--params"), _checked(files, tests)
    named_tests = dict(map(_test_command, test_commands))
    need_optuna()
    check_target(Path(target))
    if report is not None:
        need_matplotlib()
    named = [*zip(files[::2], files[1::2], strict=True)]
    pairs, test_pairs = (_by_name([(Checkpoint(base), Checkpoint(tuned)) for base, tuned in each], each)
                         for each in (named, held_out))  # fmt: skip
    until = time_after(how["minutes"])
    found = search(
        build_model(model_text),
        pairs,
        params,
        test_pairs=test_pairs,
        rates=rates or RATES,
        progress=None if quiet else partial(_progress, output),
        **how,
    )
    found.save(target)
    rows = []
    if report is not None and not found.interrupted:
        left = None if until is None else max(until - time.time(), 1.0) / 60
        more: dict[str, Any] = {}
        if example is not None:
            more = {"model": build_model(model_text, "cpu"), "example": build_example(example)}
        more |= {"minutes": left, "test_commands": named_tests}
        rows = search_report(found, report, how["storage"], how["jobs"], **more)
    if as_json:
        output.data({"file": target} | found.as_dict() | {"comparison": [row.as_dict() for row in rows]})
    else:
        _print_search(output, target, found)
        if rows:
            _print_comparison(output, f"{report}/report.md", rows)


def _checked(files: Sequence[str], tests: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs to test on, where all is in pairs. Raises UsageError."""
    if len(files) % 2:
        fix = "For example base.safetensors tuned.safetensors."
        raise UsageError(Problem("checkpoints", "pairs: a base and its fine-tune each", f"{len(files)} files", fix))
    return [_test_pair(text) for text in tests]


def _by_name(pairs: Sequence[Pair], files: Sequence[tuple[str, str]]) -> Pairs:
    """Pairs by the file of the fine-tune, where that tells them apart."""
    names = [shown_path(tuned) for _, tuned in files]
    return dict(zip(names, pairs, strict=True)) if len({*names}) == len(names) else pairs


def _test_command(text: str) -> tuple[str, str]:
    name, equals, command = text.partition("=")
    if not equals or not name.strip() or not command.strip():
        fix = "For example --test-command 'seed 1=python test.py --spec {spec} --rate {rate} --seed 1'."
        raise UsageError(Problem("--test-command", "NAME=COMMAND", f"{text[:80]!a}", fix))
    return name.strip(), command


def _test_pair(text: str) -> tuple[str, str]:
    base, equals, tuned = text.partition("=")
    if not equals or not base or not tuned:
        fix = "For example --test base.safetensors=tuned.safetensors."
        raise UsageError(Problem("--test", "BASE=TUNED", f"{text[:80]!a}", fix))
    return base, tuned


def _progress(output: Output, candidate: Candidate | None, count: int) -> None:
    """A line for each network: a search takes minutes to hours."""
    if candidate is not None:
        score = "given up" if candidate.score is None else f"captures {candidate.score:.2%}"
        cores = len(candidate.topology.legs)
        output.progress(f"[{count}] {candidate.origin}: {cores} cores, {candidate.parameters:,} parameters, {score}")


def _print_search(output: Output, target: str, found: Search) -> None:
    columns = {"network": "right", "drawn by": "left", "cores": "right", "parameters": "right"}
    columns |= {"selection score (optimistic)": "right"}
    rows = (
        (f"{row.number}", row.origin, f"{len(row.topology.legs)}", f"{row.parameters:,}", f"{row.score or 0:.2%}")
        for row in found.candidates[:_SHOWN]
        if row.score is not None
    )
    output.show(table(target, columns, rows))
    output.say()
    given_up = sum(row.score is None for row in found.candidates)
    output.say(f"evaluated    {len(found.candidates)} networks, {given_up} given up early")
    output.say(f"passed over  {found.shared} drawn again, {found.refused} that do not meet the budget")
    test = "none: no update was held out" if found.test_score is None else f"{found.test_score:.2%}"
    output.say(f"test score   {test}")
    for run in found.finetunes:
        score = "no score" if run.score is None else f"{run.score:.6g}"
        output.say(f"fine-tuned   network {run.number} at rate {run.rate:g}: {score}")
    if (best := found.best_finetune) is not None:
        score = f"selection score (optimistic) {best.score:.6g}"
        output.say(f"chosen       network {best.number} at rate {best.rate:g}, {score}")
    output.say(f"wrote        {target}")
    if found.interrupted:
        output.say("cut short    with --storage the same command goes on from here")


def _print_comparison(output: Output, title: str, rows: Sequence[Row]) -> None:
    columns = {"": "left", "parameters": "right", "selection score": "right", "test score": "right", "step": "right"}
    columns |= {"why not": "left"}
    lines = (
        (
            row.name,
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.selection_score is None else f"{row.selection_score:.2%}",
            "" if row.test_score is None else f"{row.test_score:.2%}",
            "" if row.step is None else f"{row.step:.2f}",
            row.missing,
        )
        for row in rows
    )
    output.say()
    output.show(table(title, columns, lines))
