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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AdapterFileError
from tnpeft.io.foreign.tuner_rows import TUNERS

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
    "boft": Case(lambda: peft.BOFTConfig(boft_block_size=4, **ON), {"b": 4}),
    "boft_2": Case(lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **ON), {"b": 4}),
    "c3a": Case(lambda: peft.C3AConfig(block_size=8, block_size_pattern={"2": 4}, **ON), {"b": 8}),
    "shira": Case(lambda: peft.ShiraConfig(r=2, **ON), {"r": 2}),
    "delora": Case(lambda: peft.DeloraConfig(r=4, rank_pattern={"2": 3}, **ON), {"r": 4}),
    "vblora": Case(lambda: peft.VBLoRAConfig(r=3, topk=3, num_vectors=9, vector_length=8, **ON), starts=False),
    "fourierft": Case(
        lambda: peft.FourierFTConfig(n_frequency=60, n_frequency_pattern={"2": 40}, scaling=20.0, **ON), starts=False
    ),
    "gralora": Case(
        lambda: peft.GraloraConfig(r=8, gralora_k=4, alpha=12, hybrid_r=0, **ON), {"r": 8, "blocks": 4, "alpha": 9}
    ),
    "miss": Case(lambda: peft.MissConfig(r=8, **ON), {"r": 8}),
    "miss_bat": Case(lambda: peft.MissConfig(r=8, init_weights="bat", **ON), {"r": 8}),
    "randlora": Case(
        lambda: peft.RandLoraConfig(r=4, randlora_alpha=20, **ON), {"r": 4, "alpha": 6}, (16, 24, 24), starts=False
    ),
}


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
    "apply_GS": ("hra", {"apply_GS": True}, "`apply_GS`: expected False, found True."),
    "mini": (
        "miss",
        {"init_weights": "mini"},
        "`init_weights`: expected True, or another of those that are specs",
    ),
    "hybrid": ("gralora", {"hybrid_r": 2}, "`hybrid_r`: expected 0, found 2."),
    "topk alone": ("vblora", {"save_only_topk_weights": True}, "`save_only_topk_weights`: expected False, found True."),
    "bases": ("randlora", {"save_projection": False}, "`save_projection`: expected True, found False."),
    "seed": ("fourierft", {"random_loc_seed": None}, "`random_loc_seed` of the PEFT config: expected a finite number"),
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


ODD: dict[str, tuple[Callable[[], Any], tuple[int, int, int], str]] = {
    "hra": (lambda: peft.HRAConfig(r=3, **ON), (24, 32, 16), "PEFT's HRA: expected an even `r`, found 3."),
    "miss": (lambda: peft.MissConfig(r=7, **ON), (24, 32, 16), "PEFT's MISS: expected an `r` that divides 24 inputs"),
    "randlora": (lambda: peft.RandLoraConfig(r=4, **ON), (24, 32, 16), "layers of no more inputs than outputs"),
    "shares": (lambda: peft.OFTConfig(oft_block_size=8, block_share=True, **ON), (24, 32, 16), "`block_share`"),
}


def test_places_outside_of_the_weight_are_refused(tmp_path: Path):
    """A column beyond the inputs would be a place in the next row."""
    plain = base((24, 32, 16))
    saved(plain, CASES["shira"].config(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.0.shira_indices"][1, 0] = 24
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"of 0 to 23 for Linear\(24, 32\), found some of 0 to 24"):
        tnpeft.load_foreign(plain, tmp_path)


def test_ranks_that_adalora_left_are_those_of_the_tensors(tmp_path: Path):
    plain = base((24, 32, 16))
    theirs = peft.get_peft_model(copy.deepcopy(plain), CASES["adalora"].config())
    move(theirs)
    theirs.peft_config["default"].rank_pattern = {
        "0.lora_E.default": [True, False, True, True],
        "2.lora_E.default": [True, True, False, False],
    }
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(plain)
    handle = tnpeft.load_foreign(ours, tmp_path)
    assert [adapter.network.params["r"] for adapter in handle.adapters.values()] == [3, 2]
    same(ours(inputs(plain)), loaded(plain, tmp_path)(inputs(plain)))


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_spec_is_refused(name: str, tmp_path: Path):
    config, sizes, text = ODD[name]
    plain = base(sizes)
    saved(plain, config(), tmp_path)
    with pytest.raises(AdapterFileError) as caught:
        tnpeft.load_foreign(plain, tmp_path)
    assert text in str(caught.value)
    assert type(plain[0]) is nn.Linear


def test_layers_of_other_sizes_use_the_first_entries_of_what_the_model_has_once(tmp_path: Path):
    for name, config in {"vera": peft.VeraConfig(r=4, **ON), "rand": peft.RandLoraConfig(r=4, **ON)}.items():
        plain = base((12, 24, 30))
        theirs = saved(plain, config, tmp_path / name)
        ours = copy.deepcopy(plain)
        tnpeft.load_foreign(ours, tmp_path / name)
        same(ours(inputs(plain)), theirs(inputs(plain)))
        tnpeft.save_foreign(ours, tmp_path / f"{name} again", "peft")
        same(loaded(plain, tmp_path / f"{name} again")(inputs(plain)), theirs(inputs(plain)))


@pytest.mark.parametrize("inputs_of", [[], ["0"]])
def test_convolutions(inputs_of: list[str], tmp_path: Path):
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=inputs_of)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    theirs = saved(plain, config, tmp_path / "theirs")
    ours = copy.deepcopy(plain)
    tnpeft.load_foreign(ours, tmp_path / "theirs")
    same(ours(x), theirs(x))
    tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    same(loaded(plain, tmp_path / "ours")(x), theirs(x))


@pytest.mark.parametrize(("init", "scale"), [("pissa", 1), ("olora", 2)])
def test_a_start_that_peft_took_out_of_the_base_is_subtracted(init: str, scale: int, tmp_path: Path):
    """What is written is a LoRA of twice the rank, which changes no base."""
    plain = base((24, 32, 16))
    config = peft.LoraConfig(r=4, lora_alpha=4 * scale, init_lora_weights=init, rank_pattern={"2": 3}, **ON)
    theirs = saved(plain, config, tmp_path / "theirs")
    x = inputs(plain)
    expected = theirs(x)
    ours = copy.deepcopy(plain)
    handle = tnpeft.load_foreign(ours, tmp_path / "theirs")
    assert {adapter.network.spec.name for adapter in handle.adapters.values()} == {"pissa"}
    same(ours(x), expected)
    tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    same(loaded(plain, tmp_path / "ours")(x), expected)


def test_a_start_that_is_drawn_is_refused(tmp_path: Path):
    plain = base((24, 32, 16))
    saved(plain, peft.LoraConfig(r=4, init_lora_weights="pissa_niter_4", **ON), tmp_path)
    with pytest.raises(AdapterFileError, match="`init_lora_weights`: expected an init that leaves the base weights"):
        tnpeft.load_foreign(plain, tmp_path)


WRITTEN: dict[str, tuple[str, dict[str, Any], float, str]] = {
    "scale": ("oft", {"b": 8}, 0.5, "PEFT's OFT: expected an adapter at scale 1, found one at 0.5."),
    "start": ("vblora", {"length": 8}, 1.0, "PEFT's VBLORA: expected a start whose update is none"),
    "places": ("fourierft", {"waves": 20}, 1.0, "PEFT's FOURIERFT on layer '0': expected 'cos_o' as PEFT makes it"),
    "shapes": ("vera", {"r": 4}, 1.0, "PEFT's `vera_A`: expected one for the model"),
    "bias": ("ia3", {}, 1.0, "PEFT's IA3: expected a layer without bias, or with one that is multiplied"),
    "blocks": ("oft", {"b": 24}, 1.0, "PEFT's `oft_block_size`: expected one for all layers, found 24 and, on '2', 8."),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_peft_cannot_hold_is_not_written(name: str, tmp_path: Path):
    spec, params, scale, text = WRITTEN[name]
    ours = base((24, 32, 16))
    handle = tnpeft.attach(ours, spec, match=["0", "2"], **params)
    move(ours)
    handle.activate(scale)
    with pytest.raises(AdapterFileError) as caught:
        tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    assert text in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_embeddings_are_not_written(tmp_path: Path):
    ours = nn.Sequential(nn.Embedding(10, 24), nn.Linear(24, 8))
    tnpeft.attach(ours, "vera", match=["0"], r=2)
    with pytest.raises(AdapterFileError, match=r"PEFT's VERA: expected a layer that is called, found Embedding\."):
        tnpeft.save_foreign(ours, tmp_path / "ours", "peft")


@pytest.mark.parametrize("name", ["adalora", "c3a", "delora", "gralora", "ia3_input", "miss", "shira"])
def test_a_scale_is_written_where_the_update_is_a_multiple(name: str, tmp_path: Path):
    plain = base((24, 32, 16))
    ours = copy.deepcopy(plain)
    handle = tnpeft.attach(ours, name, match=["0", "2"], **CASES[name].params)
    move(ours)
    handle.activate(0.5)
    tnpeft.save_foreign(ours, tmp_path, "peft")
    same(loaded(plain, tmp_path)(inputs(plain)), ours(inputs(plain)))


def test_the_dropout_of_inputs_is_read_and_written(tmp_path: Path):
    plain = base((24, 24, 24))
    saved(plain, peft.VeraConfig(r=4, vera_dropout=0.25, **ON), tmp_path / "theirs")
    handle = tnpeft.load_foreign(plain, tmp_path / "theirs")
    assert [adapter.dropout.as_dict() for adapter in handle.adapters.values()] == [{"input": 0.25}] * 2
    tnpeft.save_foreign(plain, tmp_path / "ours", "peft")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["vera_dropout"] == 0.25
