"""What tests beside other libraries share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def torch_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """BOFT's several factors without its CUDA extension, whose one function is torch's block_diag of a batch."""

    class Blocks:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    layer = pytest.importorskip("peft.tuners.boft.layer")
    monkeypatch.setattr(layer, "_FBD_CUDA", object())
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)
