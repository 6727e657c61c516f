"""PEFT's folders of the tuners that are rows of a table, both ways: each row with what PEFT makes, saves and loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import peft.tuners.boft.layer
import pytest
import torch
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AdapterFileError
from tnpeft.io.foreign.tuner_table import TUNERS

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("torch_blocks")]

ON: dict[str, Any] = {"target_modules": ["0", "2"]}


class Case(NamedTuple):
    """A config of PEFT's, how it goes on, and the attached adapter that is written: its params beside the spec's."""

    config: Callable[[], Any]
    params: Mapping[str, Any] = MappingProxyType({})
    sizes: tuple[int, int, int] = (24, 32, 16)
    starts: bool = True  # whether PEFT starts at the base model, as an adapter that is attached here does


CASES: dict[str, Case] = {
    "oft": Case(lambda: peft.OFTConfig(oft_block_size=8, **ON), {"b": 8}),
    "oft_cayley": Case(lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **ON), {"b": 4}),
    "ia3": Case(lambda: peft.IA3Config(feedforward_modules=[], **ON)),
    "ia3_input": Case(lambda: peft.IA3Config(feedforward_modules=["0", "2"], **ON)),
    "adalora": Case(lambda: peft.AdaLoraConfig(init_r=4, total_step=10, lora_alpha=12, **ON), {"r": 4, "alpha": 3}),
    "vera": Case(lambda: peft.VeraConfig(r=4, **ON), {"r": 4}, (24, 24, 24)),
    "hra": Case(lambda: peft.HRAConfig(r=4, **ON), {"rank": 4}),
}


@pytest.fixture
def torch_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """BOFT's several factors without its CUDA extension, whose one function is torch's block_diag of a batch."""

    class Blocks:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(peft.tuners.boft.layer, "_FBD_CUDA", object())
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", Blocks)


def base(sizes: tuple[int, int, int], bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    first, second, third = sizes
    layers = (nn.Linear(first, second, bias=bias), nn.Tanh(), nn.Linear(second, third, bias=bias), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(third, 5)).eval()


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def saved(plain: nn.Module, config: Any, folder: Path) -> Any:
    """A random adapter of PEFT's on a copy of a model, which is saved too."""
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    move(theirs)
    theirs.eval().save_pretrained(folder)
    return theirs


def inputs(model: nn.Module) -> Tensor:
    return torch.randn(6, model[0].in_features, generator=torch.Generator().manual_seed(5))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def loaded(plain: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()


@pytest.mark.parametrize("row", TUNERS, ids=lambda row: row.spec)
def test_what_peft_saved_is_read_and_written_back(row: Any, tmp_path: Path):
    """Parametrised over the table: a row without a case fails."""
    case = CASES[row.spec]
    plain = base(case.sizes)
    theirs = saved(plain, case.config(), tmp_path / "theirs")
    x = inputs(plain)
    expected = theirs(x)
    assert not torch.allclose(expected, plain(x), atol=1e-3)
    ours = copy.deepcopy(plain)
    handle = tnpeft.load_foreign(ours, tmp_path / "theirs")
    assert {adapter.network.spec.name for adapter in handle.adapters.values()} == {row.spec}
    same(ours(x), expected)
    tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    again = loaded(plain, tmp_path / "ours")
    same(again(x), expected)
    state, written = (peft.get_peft_model_state_dict(model) for model in (theirs, again))
    assert state.keys() == written.keys()
    for key in state:
        torch.testing.assert_close(written[key], state[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.starts])
def test_what_is_attached_and_trained_here_is_written(name: str, tmp_path: Path):
    case = CASES[name]
    plain = base(case.sizes, bias=name != "ia3")
    ours = copy.deepcopy(plain)
    tnpeft.attach(ours, name, match=["0", "2"], **case.params)
    move(ours)
    x = inputs(plain)
    tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    same(loaded(plain, tmp_path / "ours")(x), ours(x))
    back = copy.deepcopy(plain)
    tnpeft.load_foreign(back, tmp_path / "ours")
    same(back(x), ours(x))


OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "coft": ("oft", {"coft": True}, "`coft`: expected False, found True."),
    "block_share": ("oft", {"block_share": True}, "`block_share`: expected False, found True."),
    "terms": ("oft", {"num_cayley_neumann_terms": 2}, "`num_cayley_neumann_terms`: expected 5, or another"),
    "no number": ("adalora", {"lora_alpha": "8"}, "`lora_alpha` of the PEFT config: expected a finite number"),
    "projection": ("vera", {"save_projection": False}, "`save_projection`: expected True, found False."),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_other_forms_are_refused_by_name(name: str, tmp_path: Path):
    spec, change, text = OPTIONS[name]
    plain = base(CASES[spec].sizes)
    saved(plain, CASES[spec].config(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterFileError) as caught:
        tnpeft.load_foreign(plain, tmp_path)
    assert text in str(caught.value)
    assert not hasattr(plain[0], "adapters") or not plain[0].adapters
