"""Hypothesis, which only those who verify need: where it is missing, the error says what to install."""

from __future__ import annotations

from tnpeft.errors import Problem, TnpeftError

try:
    from hypothesis import HealthCheck, Phase, Verbosity, assume, find, settings
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky, NoSuchExample, Unsatisfiable
except ImportError as error:
    raise TnpeftError(
        Problem("verify", "the package hypothesis", "none installed", "Run `pip install 'tnpeft[testing]'`.")
    ) from error

__all__ = [
    "Flaky",
    "HealthCheck",
    "NoSuchExample",
    "Phase",
    "Unsatisfiable",
    "Verbosity",
    "assume",
    "find",
    "settings",
    "st",
]
