"""`tnpeft search`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tnpeft.cli.models import build_model
from tnpeft.cli.output import Output, UsageError, table
from tnpeft.errors import Problem

if TYPE_CHECKING:
    from tnpeft.searching import Candidate, Search

__all__ = ["search_networks"]

_SHOWN = 5  # candidates in the text


def search_networks(
    output: Output,
    files: Sequence[str],
    model_text: str,
    match: str,
    params: int,
    target: str,
    *,
    evaluations: int,
    tests: Sequence[str],
    test_match: str | None,
    sampler: str,
    seed: int,
    jobs: int,
    storage: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Search, write the winner's file and report."""
    from tnpeft.fitting.checkpoint import Checkpoint
    from tnpeft.searching import search
    from tnpeft.searching.needs import check_target, need_optuna

    if len(files) % 2:
        fix = "For example base.safetensors tuned.safetensors."
        raise UsageError(Problem("checkpoints", "pairs: a base and its fine-tune each", f"{len(files)} files", fix))
    need_optuna()
    check_target(Path(target))
    pairs = [(Checkpoint(base), Checkpoint(tuned)) for base, tuned in zip(files[::2], files[1::2], strict=True)]
    found = search(
        build_model(model_text),
        pairs,
        params,
        match=match,
        evaluations=evaluations,
        test_pairs=[(Checkpoint(base), Checkpoint(tuned)) for base, tuned in map(_test_pair, tests)],
        test_match=test_match,
        sampler=sampler,
        seed=seed,
        jobs=jobs,
        storage=storage,
        progress=None if quiet else _progress,
    )
    found.save(target)
    if as_json:
        output.data({"file": target} | found.as_dict())
    else:
        _print_search(output, target, found)


def _test_pair(text: str) -> tuple[str, str]:
    base, equals, tuned = text.partition("=")
    if not equals or not base or not tuned:
        fix = "For example --test base.safetensors=tuned.safetensors."
        raise UsageError(Problem("--test", "BASE=TUNED", f"{text[:80]!a}", fix))
    return base, tuned


def _progress(candidate: Candidate | None, count: int) -> None:
    """A line on stderr for each network: a search takes minutes to hours."""
    if candidate is not None:
        score = "given up" if candidate.score is None else f"captures {candidate.score:.2%}"
        cores = len(candidate.topology.legs)
        sys.stderr.write(f"[{count}] {candidate.origin}: {cores} cores, {candidate.parameters:,} parameters, {score}\n")
        sys.stderr.flush()


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
    output.say(f"wrote        {target}")
    if found.interrupted:
        output.say("interrupted  with --storage the same command goes on from here")
