"""What stands beside tnpeft here is what its numbers were measured with."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

QUANTISERS = ("bitsandbytes", "hqq", "torchao")


def test_no_framework_has_brought_another_torch():
    pinned = "2.13.0"
    assert torch.__version__.partition("+")[0] == pinned
    assert version("torch").partition("+")[0] == pinned


@pytest.mark.parametrize("name", [*QUANTISERS, "timm", "opacus", "dynamic-network-architectures"])
def test_what_the_tests_need_is_there(name: str):
    assert version(name)


def test_torchvision_stays_away():
    assert find_spec("torchvision") is None  # its operators come with a torch of their own
