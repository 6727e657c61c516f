"""Hypothesis, which only `verify` needs: if it is missing, the error says what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from tnpeft.errors import needing

with needing("hypothesis", "verify"):
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis import strategies as st
    from hypothesis.configuration import set_hypothesis_home_dir
    from hypothesis.errors import Flaky, Found, NoSuchExample, Unsatisfiable

__all__ = [
    "Flaky",
    "Found",
    "HealthCheck",
    "NoSuchExample",
    "Phase",
    "Unsatisfiable",
    "find",
    "kept_nowhere",
    "settings",
    "st",
]


@contextmanager
def kept_nowhere() -> Iterator[None]:
    """Inside, Hypothesis keeps its notes in a temporary folder, and not in `.hypothesis` in the current one."""
    with TemporaryDirectory() as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)
