"""What stands beside tnpeft here is what its numbers were measured with."""

from __future__ import annotations

from importlib.metadata import version

import torch


def test_no_framework_has_brought_another_torch():
    pinned = "2.13.0"
    assert torch.__version__.partition("+")[0] == pinned
    assert version("torch").partition("+")[0] == pinned
