"""The families of docs/specs_from_python.md against HF PEFT: the same stored tensors give the same update."""

from __future__ import annotations

import copy
from typing import Any

import peft
import peft.tuners.boft.layer
import pytest
import torch
from pages import PAGES, run
from torch import Tensor, nn

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own


class Blocks:
    """BOFT's CUDA extension has one function: torch's block_diag of a batch."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def with_peft(base: nn.Module, config: Any) -> tuple[Any, Tensor]:
    """A layer of theirs whose tensors have moved, and its weight's update."""
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    layer = copy.deepcopy(model.base_model.model[0])
    merged = model.merge_and_unload()[0].weight.detach()
    return layer, merged - base.weight.detach()


def compared(base: nn.Module, spec: tnpeft.Spec, cores: dict[str, Tensor], expected: Tensor, **params: float) -> None:
    adapter = tnpeft.attach(nn.Sequential(base), spec, match="0", **params).adapters["0"]
    with torch.no_grad():
        for name, core in adapter.trained.items():
            core.copy_(cores[name].reshape(core.shape))
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    return run(next(page for page in PAGES if page.stem == "specs_from_python"))


@pytest.mark.parametrize("m", [3, 4])
def test_boft(families: dict[str, Any], m: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", object())
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", Blocks)
    torch.manual_seed(0)
    base = nn.Linear(64, 24, bias=False)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=m, target_modules=["0"])
    layer, expected = with_peft(base, config)
    factors = layer.boft_R["default"].detach()
    cores = {f"X{j}": factors[j] for j in range(m)} | {"s": layer.boft_s["default"].detach()}
    compared(base, families["boft"](m), cores, expected)


@pytest.mark.parametrize("depth", [1, 3])
def test_peanut(families: dict[str, Any], depth: int):
    torch.manual_seed(0)
    base = nn.Linear(24, 32, bias=False)
    config = peft.PeanutConfig(r=6, depth=depth, act_fn="relu", scaling=3.0, target_modules=["0"])
    layer, expected = with_peft(base, config)
    wings = {"E": layer.peanut_encoders["default"], "D": layer.peanut_decoders["default"]}
    cores = {f"{wing}{at + 1}": part.weight.detach() for wing, parts in wings.items() for at, part in enumerate(parts)}
    cores |= {name: getattr(layer, f"peanut_{name}")["default"].weight.detach() for name in "AB"}
    compared(base, families["peanut"](depth), cores, expected, r=6, alpha=3)
