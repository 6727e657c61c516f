"""Numbers of other implementations: weight updates, parameter counts and initial spreads.

A small part is committed; the rest is read from ../shared/golden where that exists (`golden.py`).
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden import DATA, GOLDEN, SKIPPED, Case, committed_cases, shared_cases
from torch import nn

import tnpeft
from tnpeft.cli.models import build_model

TOLERANCE = 2e-6
COMMITTED = committed_cases()
SHARED = shared_cases()
CONVOLUTION = r"resnets\.\d+\.conv[12]\.conv$"
LINEAR = r"attentions\.\d+\.attn\.to_[qv]$|^time_embed\.2$|resnets\.\d+\.time_emb_proj$"

# Method of counts.json → our specs for convolutions and for linear layers.
SPECS = {
    "lora": ("lora", "lora"),
    "lokr": ("lokr_both", "lokr_both"),
    "loha": ("loha", "loha"),
    "tenvoo-l": ("tenvoo_l", "quanta"),
    "tenvoo-q": ("tenvoo_q", "quanta"),
}
# Trained parameters on the paper's model, biases (23,168) and norms (38,464) included; its Table 1 rounds them.
TOTALS = {
    "lora_ddpm": 824_192,
    "loha_ddpm": 824_192,
    "lokr_ddpm": 787_104,
    "tenvoo_l_ddpm": 601_024,
    "tenvoo_q_ddpm": 603_904,
}
BIASES_AND_NORMS = 23_168 + 38_464


def make(case: Case, *, prefix: str = "") -> tnpeft.Adapter:
    """Our adapter for a case, holding the case's cores."""
    spec = tnpeft.Spec.from_yaml(case.spec) if "\n" in case.spec else tnpeft.load_spec(case.spec)
    adapter = tnpeft.compile(spec, case.layer(), **case.params)
    cores = case.fit([tuple(core.shape) for core in adapter.cores.values()], prefix)
    with torch.no_grad():
        for ours, reference in zip(adapter.cores.values(), cores, strict=True):
            ours.copy_(reference)
    return adapter


def check_update(case: Case) -> None:
    adapter = make(case)
    with torch.no_grad():
        case.check(adapter.network.scale * adapter.network_weight(), TOLERANCE)
        if adapter.network.start == "zero":
            case.check(adapter.delta_weight(), TOLERANCE)


@pytest.mark.parametrize("case", COMMITTED.values(), ids=COMMITTED)
def test_committed_updates(case: Case):
    check_update(case)


@pytest.mark.golden
@pytest.mark.parametrize(
    "case", SHARED.values() or [pytest.param(None, marks=pytest.mark.skip(SKIPPED))], ids=SHARED or None
)
def test_shared_updates(case: Case):
    check_update(case)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["tenvoo-l/conv32-32-k3-r4", "tenvoo-q/conv32-32-k3-r4"])
def test_shared_layer_with_a_frozen_copy(name: str):
    """y = conv(x, W0 - T(frozen) + T(live)), the whole adapted layer."""
    if name not in SHARED:
        pytest.skip(SKIPPED)
    case = SHARED[name]
    assert "frozen.0" in case.tensors
    frozen, live = make(case, prefix="frozen."), make(case)
    with torch.no_grad():
        update = live.network_weight() - frozen.network_weight()
        weight = case.tensors["W0"].double() + update
        y = nn.functional.conv3d(case.tensors["x"].double(), weight, case.tensors["bias"].double())
    assert (y - case.tensors["y"]).norm() <= TOLERANCE * case.tensors["y"].norm()
    layer = case.layer()
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.copy_(case.tensors["W0"])
        layer.bias.copy_(case.tensors["bias"])
    tnpeft.attach(model, case.spec, match="0", **case.params)
    state = model.state_dict()
    for core, old, new in zip(live.cores, frozen.cores.values(), live.cores.values(), strict=True):
        (start,) = (key for key in state if key.endswith(f"start_{core}"))
        state[start] = old.detach()
        state[start.removesuffix(f"start_{core}") + f"core_{core}"] = new.detach()
    model.load_state_dict(state)
    with torch.no_grad():
        y = model(case.tensors["x"].double())
    assert (y - case.tensors["y"]).norm() <= TOLERANCE * case.tensors["y"].norm()


@pytest.fixture(scope="module")
def paper_model() -> nn.Module:
    pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    model = build_model("monai:ddpm-paper")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 166.67
    return model


@pytest.mark.golden
@pytest.mark.parametrize("method", SPECS)
def test_counts_of_every_layer(paper_model: nn.Module, method: str):
    if not GOLDEN.is_dir():
        pytest.skip(SKIPPED)
    counts = json.loads((GOLDEN / "counts.json").read_text())[method]
    convolution, linear = (tnpeft.load_spec(name) for name in SPECS[method])
    modules = dict(paper_model.named_modules())
    for rank, layers in counts.items():
        known: dict[str, int] = {}  # the model repeats its shapes
        for name, count in layers.items():
            module = modules[name]
            spec = linear if isinstance(module, nn.Linear) else convolution
            key = str(module)
            if key not in known:
                known[key] = spec.bind(module, r=int(rank)).num_parameters
            assert known[key] == count, (rank, name)


@pytest.mark.parametrize("recipe", TOTALS)
def test_totals_of_the_recipes(paper_model: nn.Module, recipe: str):
    handle = tnpeft.attach(paper_model, tnpeft.load_recipe(recipe))
    trained = sum(parameter.numel() for parameter in paper_model.parameters() if parameter.requires_grad)
    tnpeft.detach(paper_model)
    assert trained == TOTALS[recipe]
    assert handle is not None


# init.json holds, for each shape of the paper's model at r = 4, the standard deviation of the initial network weight
# (a mean over that shape's layers). An update is a product of many random cores, so it scatters from draw to draw.
SPREADS = json.loads((DATA / "init_small.json").read_text())
SEEDS = 24


def spread(spec: str, layer: nn.Module) -> float:
    """Mean over seeds of the standard deviation of T at the start."""
    with torch.no_grad():
        draws = [tnpeft.compile(spec, layer, r=4, seed=seed).network_weight().std().item() for seed in range(SEEDS)]
    return sum(draws) / SEEDS


@pytest.mark.parametrize(
    "shape", ["l/conv32-32", "l/conv64-64", "l/conv128-128", "linear128-32", "linear128-128", "linear256-256"]
)
def test_initial_spread(shape: str):
    ends = [int(number) for number in shape.removeprefix("l/").removeprefix("conv").removeprefix("linear").split("-")]
    layer = nn.Linear(*ends) if shape.startswith("linear") else nn.Conv3d(*ends, 3)
    ours = spread("quanta" if shape.startswith("linear") else "tenvoo_l", layer)
    assert math.isclose(ours, SPREADS[shape]["dw_std"], rel_tol=0.25)


def test_initial_spread_of_tenvoo_q():
    """The published kernel_h dangles, which puts r times as many terms into every sum: sqrt(r) times the spread."""
    ours = spread("tenvoo_q", nn.Conv3d(32, 32, 3))
    assert math.isclose(ours * math.sqrt(4), SPREADS["q/conv32-32"]["dw_std"], rel_tol=0.25)


# Standard deviations of the cores at the start, as measured on lycoris-lora 4.1.3 and the paper's code (their `init`
# entries), or exactly: a uniform distribution over +-1/sqrt(fan) has 1/sqrt(3 fan), one over +-sqrt(6/fan) sqrt(2/fan).
CORE_SPREADS = {
    ("lora", nn.Conv3d(64, 128, 3)): {"down": 1 / math.sqrt(3 * 64 * 27), "up": 0},
    ("lora", nn.Linear(128, 512)): {"down": 1 / math.sqrt(3 * 128), "up": 0},
    ("locon_tucker", nn.Conv3d(64, 128, 3)): {"down": 1 / math.sqrt(3 * 64), "mid": 1 / math.sqrt(3 * 4 * 27), "up": 0},
    ("loha", nn.Conv3d(64, 128, 3)): {"up_1": 0.1, "down_1": 1, "up_2": 0, "down_2": 1},
    ("loha_tucker", nn.Conv3d(64, 128, 3)): {
        "mid_1": 0.1,
        "up_1": 0.1,
        "down_1": 1,
        "mid_2": 0.1,
        "up_2": 0,
        "down_2": 1,
    },
    ("lokr", nn.Linear(128, 512)): {"small": 1 / math.sqrt(3 * 8), "up": 1 / math.sqrt(3 * 4), "down": 0},
    ("lokr_both", nn.Linear(128, 512)): {
        "small_up": 1 / math.sqrt(3 * 4),
        "small_down": 1 / math.sqrt(3 * 8),
        "up": 1 / math.sqrt(3 * 4),
        "down": 0,
    },
    ("krona", nn.Linear(128, 512)): {"small": 1 / math.sqrt(3 * 8), "large": 0},
    ("quanta", nn.Linear(128, 512)): {"gate_23": 1 / 4, "gate_13": 1 / math.sqrt(32), "gate_12": 1 / 4},
    ("tenvoo_l", nn.Conv3d(64, 64, 3)): {
        "in_12": math.sqrt(2 / 16),
        "out_12": math.sqrt(2 / 32),
        "centre": math.sqrt(2 / 8),
    },
    ("tenvoo_q", nn.Conv3d(64, 64, 3)): {
        "kernel_h": math.sqrt(2 / 16),
        "out_12": math.sqrt(2 / 32),
        "join_in": math.sqrt(2 / 16),
    },
}


@pytest.mark.parametrize(("name", "layer"), CORE_SPREADS, ids=lambda value: str(value).partition("(")[0])
def test_initial_spread_of_the_cores(name: str, layer: nn.Module):
    draws = [
        tnpeft.compile(name, layer, **({} if name == "krona" else {"r": 4}), seed=seed).cores for seed in range(16)
    ]
    for core, expected in CORE_SPREADS[name, layer].items():
        values = torch.cat([draw[core].detach().flatten() for draw in draws])
        assert math.isclose(values.std(), expected, rel_tol=0.1, abs_tol=0), core
        assert abs(values.mean()) <= 5 * expected / math.sqrt(values.numel()), core
