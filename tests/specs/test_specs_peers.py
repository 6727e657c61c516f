"""Shipped specs against HF PEFT and LyCORIS: the same values in the cores give the same update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own

Pairs = dict[str, Tensor]
SIZES = [(24, 32), (32, 24), (12, 12)]


def updated(base: nn.Module, merged: nn.Module) -> Tensor:
    return merged.weight.detach() - base.weight.detach()


def fill(adapter: tnpeft.Adapter, values: Pairs) -> None:
    """Put another library's values into the cores; every core must get one."""
    cores = adapter.cores
    assert set(values) == {name for name, core in cores.items() if name not in ("repeat",)}
    with torch.no_grad():
        for name, value in values.items():
            cores[name].copy_(value.reshape(cores[name].shape))


def peft_layer(base: nn.Linear, config: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's layer with random values in all that trains, and the plain layer it merges into."""
    import peft

    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    layer = model.base_model.model[0]
    return layer, copy.deepcopy(model).merge_and_unload()[0]


def plain(values: Any) -> Tensor:
    """The tensor of the only adapter in one of PEFT's dictionaries."""
    value = values["default"]
    return (value.weight if isinstance(value, nn.Module) else value).detach()


def _lora(layer: Any) -> Pairs:
    return {"down": plain(layer.lora_A), "up": plain(layer.lora_B)}


def _loha(layer: Any) -> Pairs:
    names = {"up_1": "hada_w1_a", "down_1": "hada_w1_b", "up_2": "hada_w2_a", "down_2": "hada_w2_b"}
    return {core: plain(getattr(layer, name)) for core, name in names.items()}


def _lokr(layer: Any) -> Pairs:
    return {"small": plain(layer.lokr_w1), "up": plain(layer.lokr_w2_a), "down": plain(layer.lokr_w2_b)}


def _adalora(layer: Any) -> Pairs:
    return {"Q": plain(layer.lora_A), "E": plain(layer.lora_E), "P": plain(layer.lora_B)}


def _vera(layer: Any) -> Pairs:
    bases = {"A": plain(layer.vera_A), "B": plain(layer.vera_B)}
    return {**bases, "d": plain(layer.vera_lambda_d), "b": plain(layer.vera_lambda_b)}


def _randlora(layer: Any) -> Pairs:
    # PEFT counts A's columns by rank and basis, B's by basis and rank: another order of random numbers.
    out, n, r = plain(layer.randlora_B).shape
    bases = {"A": plain(layer.randlora_A), "B": plain(layer.randlora_B).reshape(out, r, n).transpose(1, 2)}
    return {**bases, "L": plain(layer.randlora_lambda), "G": plain(layer.randlora_gamma)}


def _hira(layer: Any) -> Pairs:
    return {"down": plain(layer.hira_A), "up": plain(layer.hira_B)}


def _ia3(layer: Any) -> Pairs:
    return {"l": plain(layer.ia3_l) - 1}


def _fourierft(layer: Any) -> Pairs:
    out_features, in_features = layer.weight.shape
    rows, columns = layer.indices["default"].double()
    turns_o = 2 * torch.pi * rows[:, None] * torch.arange(out_features) / out_features
    turns_i = 2 * torch.pi * columns[:, None] * torch.arange(in_features) / in_features
    waves = {"cos_o": turns_o.cos(), "sin_o": turns_o.sin(), "cos_i": turns_i.cos(), "sin_i": turns_i.sin()}
    return {**waves, "c": plain(layer.fourierft_spectrum)}


def _miss(layer: Any) -> Pairs:
    return {"block": plain(layer.miss_block).T}


def _tinylora(layer: Any) -> Pairs:
    u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    key = layer._tinylora_v_key["default"]
    # PEFT puts the root of S on either side of P, the paper and tnpeft S on the left.
    root = s[:2].sqrt()
    between = layer.tinylora_P["default"].double() * root[None, None, :] / root[None, :, None]
    v = layer.tinylora_v["default"][key].detach()
    return {"U": u[:, :2], "S": s[:2], "V": vh[:2], "P": between, "v": v}


def configs() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Pairs], dict[str, float]]]:
    """Spec → PEFT's configuration, how its values become cores, and the spec's params."""
    import peft

    on: dict[str, Any] = {"target_modules": ["0"]}
    four: dict[str, float] = {"r": 4, "alpha": 8}
    return {
        "lora": (lambda: peft.LoraConfig(r=4, lora_alpha=8, **on), _lora, four),
        "rslora": (lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, **on), _lora, four),
        "loha": (lambda: peft.LoHaConfig(r=4, alpha=8, **on), _loha, four),
        "lokr": (lambda: peft.LoKrConfig(r=1, alpha=2, **on), _lokr, {"r": 1, "alpha": 2}),
        "adalora": (lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=9, **on), _adalora, four),
        "vera": (lambda: peft.VeraConfig(r=8, **on), _vera, {"r": 8}),
        "randlora": (lambda: peft.RandLoraConfig(r=4, randlora_alpha=80, **on), _randlora, {"r": 4, "alpha": 80}),
        "hira": (lambda: peft.HiraConfig(r=4, **on), _hira, {"r": 4}),
        "ia3": (lambda: peft.IA3Config(feedforward_modules=[], **on), _ia3, {}),
        "ia3_input": (lambda: peft.IA3Config(feedforward_modules=["0"], **on), _ia3, {}),
        "fourierft": (
            lambda: peft.FourierFTConfig(n_frequency=50, scaling=9, **on),
            _fourierft,
            {"waves": 50, "alpha": 9},
        ),
        "miss": (lambda: peft.MissConfig(r=4, **on), _miss, {"r": 4}),
        "tinylora": (lambda: peft.TinyLoraConfig(r=2, u=5, **on), _tinylora, {"r": 2, "u": 5}),
    }


NAMES = [
    *("lora", "rslora", "loha", "lokr", "adalora", "vera", "randlora", "hira", "ia3", "ia3_input", "fourierft", "miss"),
    "tinylora",
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_peft_makes_the_same_update(name: str, size: tuple[int, int]):
    pytest.importorskip("peft")
    if name == "randlora" and size[0] > size[1]:
        pytest.skip("PEFT puts the trained diagonal beside the smaller side, the spec beside the inputs")
    torch.manual_seed(0)
    base = nn.Linear(*size, bias=False)
    config, values, params = configs()[name]
    layer, merged = peft_layer(base, config())
    adapter = tnpeft.compile(name, base, **params)
    fill(adapter, values(layer))
    torch.testing.assert_close(adapter.delta_weight(), updated(base, merged), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dora_is_pefts(size: tuple[int, int]):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(*size, bias=False)
    layer, merged = peft_layer(base, peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"]))
    model = nn.Sequential(copy.deepcopy(base))
    tnpeft.attach(model, "dora", match="0", r=4, alpha=8)
    (adapter,) = (module for module in model.modules() if isinstance(module, tnpeft.Adapter))
    fill(adapter, _lora(layer))
    with torch.no_grad():
        adapter.magnitude.copy_(plain(layer.lora_magnitude_vector))
    tnpeft.detach(model, merge=True)
    torch.testing.assert_close(model[0].weight, merged.weight, rtol=1e-4, atol=1e-5)


def test_pissa_starts_as_pefts():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(24, 32, bias=False)
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    adapter = tnpeft.compile("pissa", base, r=4)
    expected = plain(layer.lora_B) @ plain(layer.lora_A)
    torch.testing.assert_close(adapter.network_weight(), expected, rtol=1e-4, atol=1e-5)


CONVOLUTIONS = [nn.Conv1d(8, 12, 3, bias=False), nn.Conv2d(12, 8, 3, bias=False), nn.Conv3d(6, 9, 2, bias=False)]
# spec → LyCORIS's module, its options, core → its tensor, the spec's params. LoHa's and LoKr's `get_diff_weight`
# multiplies with the scale twice (seen in 4.1.3): they are compared at scale 1.
LYCORIS: dict[str, tuple[str, dict[str, Any], dict[str, str], dict[str, float]]] = {
    "lora": ("locon.LoConModule", {}, {"down": "lora_down.weight", "up": "lora_up.weight"}, {"r": 4, "alpha": 2}),
    "locon_tucker": (
        "locon.LoConModule",
        {"use_tucker": True},
        {"down": "lora_down.weight", "mid": "lora_mid.weight", "up": "lora_up.weight"},
        {"r": 4, "alpha": 2},
    ),
    "loha": (
        "loha.LohaModule",
        {},
        {"up_1": "hada_w1_a", "down_1": "hada_w1_b", "up_2": "hada_w2_a", "down_2": "hada_w2_b"},
        {"r": 4, "alpha": 4},
    ),
    "loha_tucker": (
        "loha.LohaModule",
        {"use_tucker": True},
        {
            "mid_1": "hada_t1",
            "up_1": "hada_w1_a",
            "down_1": "hada_w1_b",
            "mid_2": "hada_t2",
            "up_2": "hada_w2_a",
            "down_2": "hada_w2_b",
        },
        {"r": 4, "alpha": 4},
    ),
    "lokr": (
        "lokr.LokrModule",
        {"lora_dim": 1},
        {"small": "lokr_w1", "up": "lokr_w2_a", "down": "lokr_w2_b"},
        {"r": 1, "alpha": 1},
    ),
    "lokr_tucker": (
        "lokr.LokrModule",
        {"lora_dim": 1, "use_tucker": True},
        {"small": "lokr_w1", "mid": "lokr_t2", "up": "lokr_w2_a", "down": "lokr_w2_b"},
        {"r": 1, "alpha": 1},
    ),
    "lokr_both": (
        "lokr.LokrModule",
        {"lora_dim": 1, "decompose_both": True},
        {"small_up": "lokr_w1_a", "small_down": "lokr_w1_b", "up": "lokr_w2_a", "down": "lokr_w2_b"},
        {"r": 1, "alpha": 1},
    ),
    "krona": ("lokr.LokrModule", {"full_matrix": True}, {"small": "lokr_w1", "large": "lokr_w2"}, {}),
    "glora": (
        "glora.GLoRAModule",
        {},
        {"a_up": "a1.weight", "a_down": "a2.weight", "b_up": "b1.weight", "b_down": "b2.weight"},
        {"r": 4, "alpha": 2},
    ),
}


def lycoris_update(base: nn.Module, name: str) -> tuple[Tensor, Pairs]:
    """LyCORIS's update of a layer with random values, and these values by core."""
    module, options, names, params = LYCORIS[name]
    modules = pytest.importorskip("lycoris.modules")
    file, _, kind = module.partition(".")
    settings = {"lora_dim": 4, "alpha": params.get("alpha", 1), **options}
    made = getattr(getattr(modules, file), kind)("layer", base, **settings)
    generator = torch.Generator().manual_seed(3)
    tensors = dict(made.named_parameters())
    with torch.no_grad():
        for key in names.values():
            tensors[key].copy_(torch.randn(tensors[key].shape, generator=generator) * 0.3)
    values = {core: tensors[key].detach() for core, key in names.items()}
    if name == "glora":  # 1 x 1 convolutions: in, rank and rank, in
        values = {core: value.flatten(1) if core != "b_down" else value for core, value in values.items()}
    return made.get_diff_weight(1.0)[0].detach().reshape(base.weight.shape), values


@pytest.mark.parametrize("base", [nn.Linear(24, 32, bias=False), *CONVOLUTIONS], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_makes_the_same_update(name: str, base: nn.Module):
    if type(base).__name__ not in tnpeft.load_spec(name).layers:
        pytest.skip("convolutions only")
    expected, values = lycoris_update(base, name)
    adapter = tnpeft.compile(name, base, **LYCORIS[name][3])
    fill(adapter, values)
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-4, atol=1e-5)
