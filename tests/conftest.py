"""What every test shares: one thread per process, Ctrl-C as usual, and Hypothesis runs that can be repeated."""

from __future__ import annotations

import gc
import os
import signal
import threading

# Before torch is imported: two test processes on two cores must not fight for threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import find, settings
from hypothesis import strategies as st

# A shell has interrupts ignored by what it starts in the background, and by the processes that tests start from there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)  # pytest --hypothesis-profile=explore
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What stands now stays to the end: the collector need not walk through millions of objects after every test."""
    find(st.none(), lambda _: True)  # Hypothesis asks who holds its generator, and would not see what is frozen
    gc.collect()
    gc.freeze()


@pytest.fixture
def settled() -> None:
    """What stands before a test that collects is neither walked through by it nor found by `gc.get_objects`."""
    gc.collect()
    gc.freeze()
