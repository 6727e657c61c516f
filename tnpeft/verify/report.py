"""The report of `verify`: counts, counter-examples, and notes on gauge, conditioning and directions."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tnpeft.verify.case import Case
from tnpeft.verify.conditioning import Conditioning
from tnpeft.verify.directions import Directions
from tnpeft.verify.gauge import Gauge

__all__ = ["CheckResult", "Counterexample", "VerifyReport"]


WHOLE = ("reach", "alive")  # what all examples together show


@dataclass(frozen=True)
class Counterexample:
    """The simplest case found on which a check fails, and how it fails."""

    check: str
    case: Case
    message: str
    spec: str = "SPEC"

    def __str__(self) -> str:
        lines = [
            f"{self.check}: {self.message}",
            f"  layer   {self.case.layer_text}",
            f"  params  {dict(self.case.params) or 'as the spec has them'}",
            f"  show    {self._show}",
        ]
        if self.check not in WHOLE:
            spec = "spec" if self.spec.startswith("<") else repr(self.spec)  # from a text, it has no name to load
            again = f"run_check({self.check!r}, {spec}, {self.case!r})"
            lines.append(f"  again   from tnpeft.testing import Case, run_check; {again}")
        return "\n".join(lines)

    @property
    def _show(self) -> str:
        spec = "SPEC" if self.spec.startswith("<") else self.spec
        return f"tnpeft show {spec} {self.case.option_text}"

    def as_dict(self) -> dict[str, Any]:
        case = self.case
        return {
            "message": self.message,
            "layer": case.layer_text,
            "params": dict(case.params),
            "dtype": case.dtype,
            "seed": case.seed,
            "case": repr(case),
            "show": self._show,
        }


@dataclass(frozen=True)
class CheckResult:
    """One check: on how many examples it ran, to how many it did not apply, and its counter-example, if it failed."""

    name: str
    title: str
    examples: int
    skipped: int = 0
    failure: Counterexample | None = None

    def as_dict(self) -> dict[str, Any]:
        failure = None if self.failure is None else self.failure.as_dict()
        return {
            "check": self.name,
            "title": self.title,
            "examples": self.examples,
            "skipped": self.skipped,
            "ok": self.failure is None,
            "failure": failure,
        }


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of `verify`; `ok` is true if nothing failed.

    `seen` counts the examples by kind of layer, groups, dtype and options; `refused` counts the layers that the spec
    refuses, by the reason. `notes`, `gauge`, `conditioning` and `directions` are advice and cannot fail. `interrupted`
    says that Ctrl-C ended the run before all `planned` examples were tried; the report is then not `ok`.
    """

    spec: str
    file: str
    seed: int
    examples: int
    seconds: float
    stopped: bool
    checks: tuple[CheckResult, ...]
    seen: Mapping[str, Counter[str]]
    refused: Counter[str]
    notes: tuple[str, ...] = ()
    gauge: Gauge | None = None
    conditioning: tuple[Conditioning, ...] = field(default_factory=tuple)
    directions: tuple[Directions, ...] = ()
    planned: int = 0
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        return not self.failures and not self.interrupted

    @property
    def failures(self) -> tuple[Counterexample, ...]:
        return tuple(check.failure for check in self.checks if check.failure is not None)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {
            "spec": self.spec,
            "file": self.file,
            "ok": self.ok,
            "seed": self.seed,
            "examples": self.examples,
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped,
            "planned": self.planned,
            "interrupted": self.interrupted,
            "refused": dict(self.refused),
            "seen": {key: dict(sorted(counts.items())) for key, counts in self.seen.items()},
            "checks": [check.as_dict() for check in self.checks],
            "notes": list(self.notes),
            "gauge": None if self.gauge is None else self.gauge.as_dict(),
            "conditioning": [row.as_dict() for row in self.conditioning],
            "directions": [row.as_dict() for row in self.directions],
        }

    def __str__(self) -> str:
        """A few lines, with every counter-example."""
        broken = ", ".join(check.name for check in self.checks if check.failure is not None)
        verdict = f"fails {broken}" if broken else f"holds on {self.examples} examples"
        verdict += f", interrupted before all {self.planned} were tried" * self.interrupted
        lines = [f"spec '{self.spec}' {verdict} (seed {self.seed}, {sum(self.refused.values())} layers refused)"]
        lines += [textwrap.indent(str(failure), "  ") for failure in self.failures]
        return "\n".join(lines)
