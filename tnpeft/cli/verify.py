"""`tnpeft verify`: is an adapter what its spec says, on every layer that it supports?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tnpeft.cli.arguments import parse_layer, parse_settings
from tnpeft.cli.count import check_params
from tnpeft.cli.output import Output, UsageError, table
from tnpeft.errors import Problem
from tnpeft.network import Spec, load_spec

if TYPE_CHECKING:
    from tnpeft.verify import CheckResult, Conditioning, VerifyReport

__all__ = ["verify_spec"]

REFUSALS = 3  # reasons that are printed
PAUSE = 2.0  # seconds between two lines of progress


def verify_spec(
    output: Output,
    name: str,
    layer: str | None,
    settings: Sequence[str],
    examples: int,
    seed: int,
    seconds: float,
    quiet: bool,
    as_json: bool,
) -> VerifyReport:
    """Verify a spec and print the report; after Ctrl-C, a report on what was tried."""
    spec = load_spec(name)
    params: dict[str, Any] = parse_settings(settings)
    check_params(spec, params)
    signature = None if layer is None else parse_layer(layer)
    if signature is not None and signature.kind not in spec.layers:
        fix = "Choose another layer, or add the kind to the spec's `layers`."
        raise UsageError(Problem("--layer", f"one of {', '.join(spec.layers)}", signature.kind, fix))
    from tnpeft.verify import verify
    from tnpeft.verify.properties import kept_nowhere

    with kept_nowhere():
        report = verify(
            spec, label=name, examples=examples, seed=seed, layer=signature, seconds=seconds,
            progress=None if quiet else _Progress(output), keep_interrupted=True, **params,
        )  # fmt: skip
    if as_json:
        output.data(report.as_dict())
    else:
        _print(output, spec, report)
    return report


class _Progress:
    """A line of progress every few seconds; none in a shorter run."""

    def __init__(self, output: Output) -> None:
        self.output, self.said = output, time.monotonic()

    def __call__(self, number: int, examples: int) -> None:
        if time.monotonic() - self.said >= PAUSE:
            self.said = time.monotonic()
            self.output.progress(f"[{number}/{examples}] examples")


def _print(output: Output, spec: Spec, report: VerifyReport) -> None:
    output.say(f"{spec.name}: {spec.title}" if spec.title else spec.name)
    stopped = " (time ran out)" if report.stopped else ""
    stopped = f" of {report.planned} (interrupted)" if report.interrupted else stopped
    refused = sum(report.refused.values())
    output.say(
        f"{report.examples} examples{stopped} in {report.seconds:.0f} s, seed {report.seed}; {refused} layers refused\n"
    )
    rows = (
        (check.name, _verdict(check, report.interrupted), str(check.examples), str(check.skipped or ""), check.title)
        for check in report.checks
    )
    columns = {"check": "left", "": "left", "examples": "right", "skipped": "right", "what holds": "left"}
    output.show(table("", columns, rows))
    output.say()
    for heading, counts in report.seen.items():
        output.say(f"{heading:<12}{_counts(counts) or 'none'}")
    for reason, number in report.refused.most_common(REFUSALS):
        output.say(f"{'refused':<12}{number}: {reason}")
    for failure in report.failures:
        output.say(f"\n{failure}")
    if report.interrupted:
        left = report.planned - report.examples
        output.say(f"\n{'not run':<12}{left} examples, redundancy, the size of the first step and its directions")
    _print_advice(output, report)


def _verdict(check: CheckResult, interrupted: bool) -> str:
    if check.failure is not None:
        return "FAILS"
    return "ok" if check.examples else "not run" if interrupted else "-"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({number})" for name, number in sorted(counts.items()))


def _print_advice(output: Output, report: VerifyReport) -> None:
    output.say()
    if report.gauge is not None:
        output.say(f"{'redundancy':<12}{report.gauge}")
        for cause in report.gauge.causes:
            output.say(f"{'':<12}{cause}")
    for note in report.notes:
        output.say(f"{'note':<12}{note}")
    if report.conditioning:
        rate = report.conditioning[0].rate
        columns = {
            "start on": "left",
            "std W": "right",
            "std T / std W": "right",
            "first step / std W": "right",
            "by core": "left",
        }
        output.say()
        output.show(table("", columns, map(_row, report.conditioning)))
        output.say(f"The first step is Adam's at rate {rate:g}, along a random gradient.")
        for row in report.conditioning:
            if row.advice:
                output.say(f"{row.layer}: {row.advice}")
    for directions in report.directions:
        output.say(str(directions))


def _row(row: Conditioning) -> tuple[str, ...]:
    ratio = f"{row.network_ratio:.3g}" if row.start == "frozen_copy" else "starts at 0"
    ordered = sorted(row.steps.items(), key=lambda item: -item[1])
    whole = sum(row.steps.values()) or 1.0
    shares = ", ".join(f"{name} {share / whole:.0%}" for name, share in ordered[:3] if share)
    return row.layer, f"{row.weight:.3g}", ratio, f"{row.step_ratio:.2g}", shares
