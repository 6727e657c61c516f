"""Verifying: examples are drawn, every check runs on each, and failing examples are shrunk."""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnpeft.errors import Problem, TnpeftError, near_miss
from tnpeft.network import Layer, Spec, load_spec
from tnpeft.spec.habits import unknown_params
from tnpeft.verify.case import DTYPES, Case
from tnpeft.verify.checks import CHECKS, Check
from tnpeft.verify.conditioning import Conditioning, conditioning_of, rows_on
from tnpeft.verify.dead_cores import reached
from tnpeft.verify.directions import Directions, directions_on
from tnpeft.verify.gauge import Gauge, gauge_of
from tnpeft.verify.model_under_test import Mismatch, Skip, Subject
from tnpeft.verify.properties import Flaky, Found, HealthCheck, NoSuchExample, Phase, Unsatisfiable, find, settings, st
from tnpeft.verify.report import CheckResult, Counterexample, VerifyReport
from tnpeft.verify.strategies import cases, params_of
from tnpeft.verify.supported_layers import gauge_cases, reachable

__all__ = ["failure_of", "run_check", "verify"]

SHRINKING_SECONDS = 15.0  # for each check that fails
DRAWN_FOR_EACH = 5  # of which at least one should not be refused
_PACKAGE = Path(__file__).parents[1]
BATCH = 10  # after so many Hypothesis makes variations of what it has, where fresh examples tell more


def verify(
    spec: Spec | str | Path,
    *,
    examples: int = 50,
    seed: int = 0,
    layer: Layer | None = None,
    seconds: float = 60.0,
    label: str | None = None,
    advice: bool = True,
    progress: Callable[[int, int], None] | None = None,
    keep_interrupted: bool = False,
    **params: Any,
) -> VerifyReport:
    """Try `spec` (or a shipped name, a path) on random layers that it supports, and report what does not hold.

    `layer` and `params` fix what is otherwise drawn. No new example starts after `seconds`. `label` is the spec's name
    in printed counter-examples. Without `advice` the report has only what can fail. `progress` is called after each
    example, with its number and how many there are. With `keep_interrupted` Ctrl-C ends in a report of what was tried
    so far. Raises SpecError for a spec that cannot be read; all other failures are in the report.
    """
    started = time.monotonic()
    if label is None:
        label = spec.file if isinstance(spec, Spec) else str(spec)
    spec = spec if isinstance(spec, Spec) else load_spec(spec)
    _check_arguments(spec, examples, params)
    run = _Run(spec, label, examples, started + seconds, progress)
    drawn = cases(reachable(spec, layer, params, seed), params_of(spec, params), DTYPES)
    interrupted, told = False, _Advice()
    with _one_thread():
        try:
            for run.batch in range(1000 * seed, 1000 * seed + math.ceil(examples * DRAWN_FOR_EACH / BATCH)):
                _search(drawn, run.take, BATCH, run.batch)
            results = [run.result(check, drawn) for check in CHECKS]
            told = _advice(spec, layer, params, run.accepted, seed) if advice else told
        except KeyboardInterrupt:
            if not keep_interrupted:
                raise
            interrupted, results = True, [run.as_found(check) for check in CHECKS]
    return VerifyReport(
        spec.name,
        spec.file,
        seed,
        len(run.accepted),
        time.monotonic() - started,
        run.stopped,
        (run.reach(), *results, run.alive(whole=not interrupted)),
        run.seen,
        run.refused,
        run.notes(),
        *told,
        planned=examples,
        interrupted=interrupted,
    )


class _Advice(NamedTuple):
    """The parts of a report that cannot fail."""

    gauge: Gauge | None = None
    conditioning: tuple[Conditioning, ...] = ()
    directions: tuple[Directions, ...] = ()


def _advice(spec: Spec, layer: Layer | None, params: Mapping[str, Any], accepted: Sequence[Case], seed: int) -> _Advice:
    gauge = gauge_of(spec, gauge_cases(spec, layer, params, accepted))
    conditioning = conditioning_of(spec, params, layer, seed)
    return _Advice(gauge, conditioning, rows_on(partial(directions_on, spec), params, layer, seed))


def run_check(name: str, spec: Spec | str | Path, case: Case) -> None:
    """Run one check on one case, as a counter-example prints it. Raises AssertionError if it fails."""
    known = {check.name: check for check in CHECKS}
    if name not in known:
        fix = near_miss(str(name), known) or "Name one of them."
        raise TnpeftError(Problem("check", f"one of {', '.join(known)}", f"{name!r}", fix))
    subject = Subject(spec if isinstance(spec, Spec) else load_spec(spec), case)
    message = failure_of(known[name], subject)
    if message is not None:
        raise AssertionError(f"{name}: {message}")


def failure_of(check: Check, subject: Subject) -> str | None:
    """How the check fails, or None. Raises Skip if it does not apply."""
    try:
        check.run(subject)
    except Mismatch as mismatch:
        return str(mismatch)
    except Skip:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the library raises is the finding
        return f"{type(error).__name__}: {error} ({_place(error)})"
    return None


class _Run:
    """What one run of `verify` has seen so far."""

    def __init__(
        self, spec: Spec, label: str, examples: int, deadline: float, progress: Callable[[int, int], None] | None
    ) -> None:
        self.spec, self.label, self.examples, self.deadline = spec, label, examples, deadline
        self.progress = progress
        self.accepted: list[Case] = []
        self.tried: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.failed: dict[str, Counterexample] = {}
        self.refused: Counter[str] = Counter()
        self.refusals: list[tuple[Case, str]] = []
        self.seen: dict[str, Counter[str]] = {
            key: Counter() for key in ("kinds", "channels", "groups", "dtypes", "options")
        }
        self.reached: dict[str, list[bool]] = {}
        self.unreached: dict[str, Case] = {}
        self.batch = 0  # the seed of the examples that are drawn now
        self.batches: dict[str, int] = {}  # that of each failure
        self.small: list[Case] = []
        self.stopped = False
        self._known: set[str] = set()
        self._done = False

    def take(self, case: Case) -> bool:
        """Run every check on a case; true once there were enough."""
        if not self._done and time.monotonic() > self.deadline and self.accepted:
            self.stopped = self._done = True
        if self._done or repr(case) in self._known:
            return self._done
        self._known.add(repr(case))
        try:
            subject = Subject(self.spec, case)
        except TnpeftError as error:
            self._refuse(case, error)
            return False
        except Exception as error:  # noqa: BLE001 - a crash is a finding like any other
            self._fail("reach", case, f"{type(error).__name__}: {error} ({_place(error)})")
            return False
        self._count(case)
        for check in CHECKS:
            try:
                message = failure_of(check, subject)
            except Skip:
                self.skipped[check.name] += 1
                continue
            self.tried[check.name] += 1
            if message is not None:
                self._fail(check.name, case, message)
        self._reach(subject)
        if self.progress is not None:
            self.progress(len(self.accepted), self.examples)
        self._done = len(self.accepted) >= self.examples
        return self._done

    def _fail(self, name: str, case: Case, message: str) -> None:
        known = self.failed.get(name)
        if known is None or case.size < known.case.size:
            self.failed[name] = Counterexample(name, case, message, self.label)
            self.batches[name] = self.batch

    def _refuse(self, case: Case, error: TnpeftError) -> None:
        problem = error.problems[0]
        self.refused[re.sub(r"\b\d+\b", "n", f"{problem.what}: expected {problem.expected}")] += 1
        self.refusals.append((case, str(problem)))

    def _count(self, case: Case) -> None:
        self.accepted.append(case)
        self.seen["kinds"][case.kind] += 1
        self.seen["channels"].update(map(_number_class, (case.in_channels, case.out_channels)))
        self.seen["groups"][str(case.groups)] += 1
        self.seen["dtypes"][case.dtype] += 1
        self.seen["options"].update(list(case.options))

    def _reach(self, subject: Subject) -> None:
        try:
            found = reached(subject)
        except Exception as error:  # noqa: BLE001 - see above
            self._fail("alive", subject.case, f"{type(error).__name__}: {error} ({_place(error)})")
            return
        self.tried["alive"] += 1
        for name, one in found.items():
            self.reached.setdefault(name, []).append(one)
            known = self.unreached.get(name)
            if not one and (known is None or subject.case.size < known.size):
                self.unreached[name] = subject.case

    def result(self, check: Check, drawn: st.SearchStrategy[Case]) -> CheckResult:
        """The check's result, with its counter-example made small."""
        failure = self.failed.get(check.name)
        if failure is not None:
            failure = self._again(check) or self._shrunk(check, failure, drawn)
            self.small.append(failure.case)
        return CheckResult(check.name, check.title, self.tried[check.name], self.skipped[check.name], failure)

    def as_found(self, check: Check) -> CheckResult:
        """The check's result as it stands, with the counter-example that was found first."""
        return CheckResult(
            check.name, check.title, self.tried[check.name], self.skipped[check.name], self.failed.get(check.name)
        )

    def _again(self, check: Check) -> Counterexample | None:
        """The check on a simple case that an earlier one fails on: most likely they fail of one cause."""
        for case in self.small:
            message = self._message(check, case)
            if message is not None:
                return Counterexample(check.name, case, message, self.label)
        return None

    def _message(self, check: Check, case: Case) -> str | None:
        try:
            return failure_of(check, Subject(self.spec, case))
        except (Skip, TnpeftError):
            return None

    def _shrunk(self, check: Check, first: Counterexample, drawn: st.SearchStrategy[Case]) -> Counterexample:
        """The same draws once more with this check alone, until Hypothesis has nothing simpler."""
        best = [first]
        deadline = time.monotonic() + SHRINKING_SECONDS

        def fails(case: Case) -> bool:
            if time.monotonic() > deadline:
                return False
            message = self._message(check, case)
            if message is None:
                return False
            if case.size <= best[0].case.size:
                best[0] = Counterexample(check.name, case, message, self.label)
            return True

        _search(drawn, fails, BATCH, self.batches[check.name])
        return best[0]

    def reach(self) -> CheckResult:
        """Whether there was anything to verify."""
        title = "the spec takes layers of the kinds it names"
        failure = self.failed.get("reach")
        if failure is None and not self.accepted and self.refusals:
            case, message = min(self.refusals, key=lambda pair: pair[0].size)
            text = f"the spec refuses all {len(self.refusals)} layers tried, e.g. {message}"
            failure = Counterexample("reach", case, text, self.label)
        return CheckResult("reach", title, len(self.accepted), 0, failure)

    def alive(self, whole: bool) -> CheckResult:
        """A trainable core that no example reached is a mistake: it costs parameters and never trains.

        Of a run that is not `whole` it cannot be told.
        """
        title = "every trainable core receives a gradient within 3 steps"
        failure = self.failed.get("alive")
        dead = [name for name, found in self.reached.items() if not any(found)]
        if failure is None and dead and whole:
            case = min((self.unreached[name] for name in dead), key=lambda one: one.size)
            it = "it" if len(dead) == 1 else "them"
            text = f"no gradient ever reaches {_cores(dead)}: freeze {it}, or mend the inits of the cores around {it}"
            failure = Counterexample("alive", case, text, self.label)
        return CheckResult("alive", title, self.tried["alive"], 0, failure)

    def notes(self) -> tuple[str, ...]:
        """What is odd on some examples, and no mistake."""
        notes = []
        for name, found in self.reached.items():
            missing = len(found) - sum(found)
            if missing and any(found):
                case = self.unreached[name]
                notes.append(f"core '{name}' receives no gradient on {missing} of {len(found)} examples, e.g. {case!r}")
        return tuple(notes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors are tiny, and equal bits are expected of equal work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _search(strategy: st.SearchStrategy[Case], condition: Callable[[Case], bool], draws: int, seed: int) -> None:
    """Draw cases until the condition holds, then simpler ones; equal seeds draw alike."""
    chosen = settings(
        max_examples=draws,
        database=None,
        derandomize=False,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        find(strategy, condition, settings=chosen, random=random.Random(seed))
    except (NoSuchExample, Unsatisfiable):
        return
    except Flaky as flaky:  # time ran out while it shrank: the caller has noted the best
        for error in getattr(flaky, "exceptions", ()):
            if not isinstance(error, Found):
                raise error from flaky


def _check_arguments(spec: Spec, examples: object, params: Mapping[str, object]) -> None:
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise TnpeftError(Problem("`examples`", "a positive whole number", f"{examples!r}", "For example 50."))
    if unknown := [*unknown_params(f"params of spec '{spec.name}'", params, spec.params)]:
        raise TnpeftError(*unknown)


def _number_class(number: int) -> str:
    if number == 1:
        return "1"
    return "prime" if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)) else "composite"


def _cores(names: Sequence[str]) -> str:
    return ("core " if len(names) == 1 else "cores ") + ", ".join(f"'{name}'" for name in names)


def _place(error: BaseException) -> str:
    """The last line of the library that an error passed."""
    place, trace = "outside tnpeft", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and path.relative_to(_PACKAGE).parts[0] != "verify":
            place = f"in tnpeft/{path.relative_to(_PACKAGE).as_posix()}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
