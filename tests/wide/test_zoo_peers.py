"""The formulas of specs with maps against HF PEFT and LyCORIS: the same stored tensors give the same update."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import lycoris.modules.boft
import lycoris.modules.diag_oft
import lycoris.modules.tlora
import peft
import peft.tuners.boft.layer
import pytest
import torch
from formulas_recent import METHODS
from torch import Tensor, nn

import tnpeft

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' own

Cores = dict[str, Tensor]


class Peer(NamedTuple):
    """How a method is built there, and how its tensors are called here.

    `cores(layer)` are all cores of the spec from a layer of theirs. Where `subtracts` is set they add what the cores
    make less what the first cores made, else what the cores make. `numbers` are the formula's keywords, `params` the
    spec's; `anew` are trained cores whose first values are not theirs.
    """

    config: Callable[[], Any]
    cores: Callable[[Any], Cores]
    scale: float = 1.0
    subtracts: bool = False
    size: tuple[int, int] = (24, 32)
    numbers: Mapping[str, Any] = MappingProxyType({})
    params: Mapping[str, Any] = MappingProxyType({})
    anew: tuple[str, ...] = ()


def of(values: Any) -> Tensor:
    """The tensor of the only adapter in one of PEFT's dictionaries."""
    value = values["default"]
    return (value.weight if isinstance(value, nn.Module) else value).detach()


def named(**names: str) -> Callable[[Any], Cores]:
    """Core → the name of PEFT's dictionary that has its tensor."""
    return lambda layer: {core: of(getattr(layer, name)) for core, name in names.items()}


def _boft(layer: Any) -> Cores:
    return {"X": of(layer.boft_R)[0], "s": of(layer.boft_s)}


def _boft_2(layer: Any) -> Cores:
    first, second = of(layer.boft_R)
    return {"X_1": first, "X_2": second, "s": of(layer.boft_s)}


def _psoft(layer: Any) -> Cores:
    turn, down, up = layer.psoft_R["default"], of(layer._psoft_A_cache), of(layer._psoft_B_cache)
    up = up * layer.scaling["default"]
    # Singular vectors have a sign each, which R does not cancel: they are taken as torch found them there.
    cut = {"U": up / up.norm(dim=0), "S": up.norm(dim=0), "V": down}
    return {**cut, "angles": turn.weight.detach(), "b": turn.vector_b.detach(), "a": turn.vector_a.detach()}


def _places(indices: Tensor, columns: int) -> Tensor:
    return indices[0].long() * columns + indices[1].long()


def _shira(layer: Any) -> Cores:
    return {"values": of(layer.shira_weight), "places": _places(layer.shira_indices["default"], layer.in_features)}


def _supertuning(layer: Any) -> Cores:
    return {"values": of(layer.supertuning_values), "places": of(layer.supertuning_indices).long()}


def _supra(layer: Any) -> Cores:
    return {**_supertuning(layer), "down": of(layer.supertuning_lora_A), "up": of(layer.supertuning_lora_B)}


def _unilora(layer: Any) -> Cores:
    theta, norm = of(layer.unilora_theta_d), torch.zeros(len(of(layer.unilora_theta_d)))
    index = {"index_a": of(layer.unilora_indices_A), "index_b": of(layer.unilora_indices_B)}
    norm[index["index_a"]] = of(layer.unilora_scales_A)
    norm[index["index_b"]] = of(layer.unilora_scales_B)
    return {"theta": theta, "norm": norm, **index}


def _waveft(layer: Any) -> Cores:
    return {
        "spectrum": of(layer.waveft_spectrum),
        "places": _places(layer.waveft_indices["default"], layer.in_features),
    }


def _frod(layer: Any) -> Cores:
    at = {"V": of(layer.frod_V), "U": of(layer.frod_U), "places": _places(of(layer.frod_s_indices), layer.in_features)}
    return {**at, "l": of(layer.frod_lambda_l), "s": of(layer.frod_lambda_s_values)}


def _road(layer: Any) -> Cores:
    return {"theta": of(layer.road_theta), "alpha": of(layer.road_alpha), "one": torch.ones(1)}


def _peanut_2(layer: Any) -> Cores:
    wings = {"E": layer.peanut_encoders["default"], "D": layer.peanut_decoders["default"]}
    inner = {f"{wing}{at + 1}": part.weight.detach() for wing, parts in wings.items() for at, part in enumerate(parts)}
    return {"A": of(layer.peanut_A), "B": of(layer.peanut_B), **inner}


def _adamss(layer: Any) -> Cores:
    clusters = layer.seg_result["default"]
    cluster = torch.zeros(layer.out_features, dtype=torch.long)
    weights = torch.zeros(layer.out_features, 2)
    for at, number in enumerate(layer.train_subspace_index["default"]):
        cluster[clusters[number]] = at
        weights[clusters[number]] = layer.adamss_B["default"][at].detach()
    down = torch.stack([part.detach() for part in layer.adamss_A["default"]])
    return {"V": layer.adamss_newB["default"], "A": down, "B": weights, "cluster": cluster}


def _miss_bat(layer: Any) -> Cores:
    return {"M": of(layer.miss_block), "every": torch.ones(layer.in_features // 8)}


ON: dict[str, Any] = {"target_modules": ["0"]}
PEERS: dict[str, Peer] = {
    "oft": Peer(lambda: peft.OFTConfig(oft_block_size=8, **ON), named(R="oft_R"), subtracts=True, params={"b": 8}),
    "oft_cayley": Peer(
        lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, **ON),
        named(R="oft_R"),
        subtracts=True,
        params={"b": 8},
    ),
    "boft": Peer(lambda: peft.BOFTConfig(boft_block_size=4, **ON), _boft, subtracts=True, params={"b": 4}),
    "boft_2": Peer(
        lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **ON),
        _boft_2,
        subtracts=True,
        params={"b": 4},
    ),
    "hra": Peer(lambda: peft.HRAConfig(r=4, **ON), named(u="hra_u"), params={"rank": 4}),
    "hra_gs": Peer(lambda: peft.HRAConfig(r=4, apply_GS=True, **ON), named(u="hra_u"), params={"rank": 4}, anew=("u",)),
    "psoft": Peer(
        lambda: peft.PsoftConfig(r=8, psoft_svd="full", use_cayley_neumann=False, **ON),
        _psoft,
        subtracts=True,
        params={"r": 8},
    ),
    "c3a": Peer(
        lambda: peft.C3AConfig(block_size=8, init_weights=True, **ON),
        named(kernel="c3a_kernel"),
        1 / 24,
        params={"b": 8},
    ),
    "shira": Peer(lambda: peft.ShiraConfig(r=2, **ON), _shira, params={"r": 2}),
    "supertuning": Peer(lambda: peft.SupertuningConfig(sparsity=0.9, **ON), _supertuning, params={"sparsity": 0.9}),
    "supra": Peer(
        lambda: peft.SupertuningConfig(sparsity=0.9, r=4, lora_alpha=8, **ON),
        _supra,
        numbers={"scale": 2.0},
        params={"sparsity": 0.9, "r": 4, "alpha": 8},
    ),
    "unilora": Peer(lambda: peft.UniLoraConfig(r=3, theta_d_length=20, **ON), _unilora, params={"r": 3, "d": 20}),
    "vblora": Peer(
        lambda: peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=8, **ON),
        named(logits_a="vblora_logits_A", logits_b="vblora_logits_B", bank="vblora_vector_bank"),
        params={"r": 3, "vectors": 9, "length": 8},
    ),
    "waveft": Peer(lambda: peft.WaveFTConfig(n_frequency=60, **ON), _waveft, 25.0, size=(13, 7), params={"waves": 60}),
    "waveft db2": Peer(
        lambda: peft.WaveFTConfig(n_frequency=60, wavelet_family="db2", **ON), _waveft, 25.0, numbers={"family": "db2"}
    ),
    "delora": Peer(
        lambda: peft.DeloraConfig(r=4, **ON),
        named(A="delora_A", B="delora_B", lambda_="delora_lambda"),
        1 / 4,
        params={"r": 4},
    ),
    "deft": Peer(
        lambda: peft.DeftConfig(r=4, decomposition_method="relu", **ON),
        named(P="deft_P", R="deft_R"),
        params={"rank": 4},
    ),
    "para": Peer(
        lambda: peft.DeftConfig(r=4, decomposition_method="qr", para=True, **ON), named(P="deft_P"), params={"rank": 4}
    ),
    "frod": Peer(lambda: peft.FrodConfig(**ON), _frod, subtracts=True, anew=("l",)),
    "gralora": Peer(
        lambda: peft.GraloraConfig(r=8, gralora_k=4, alpha=16, hybrid_r=0, **ON),
        named(A="gralora_A", B="gralora_B"),
        2.0,
        params={"r": 8, "blocks": 4, "alpha": 16},
    ),
    "road": Peer(
        lambda: peft.RoadConfig(variant="road_1", group_size=8, **ON),
        _road,
        subtracts=True,
        numbers={"group": 8},
        params={"group": 8},
    ),
    "road_2": Peer(
        lambda: peft.RoadConfig(variant="road_2", group_size=8, **ON),
        _road,
        subtracts=True,
        numbers={"group": 8},
        params={"group": 8},
    ),
    "peanut": Peer(
        lambda: peft.PeanutConfig(r=6, depth=0, act_fn="relu", scaling=3.0, **ON),
        named(A="peanut_A", B="peanut_B"),
        3.0,
        params={"r": 6, "alpha": 3},
    ),
    "peanut_2": Peer(
        lambda: peft.PeanutConfig(r=6, depth=2, act_fn="relu", scaling=3.0, **ON),
        _peanut_2,
        3.0,
        params={"r": 6, "alpha": 3},
    ),
    "adamss": Peer(
        lambda: peft.AdamssConfig(r=10, num_subspaces=3, subspace_rank=2, **ON),
        _adamss,
        params={"r": 10, "clusters": 3, "s": 2},
        anew=("A",),
    ),
    "miss_bat": Peer(lambda: peft.MissConfig(r=8, init_weights="bat", **ON), _miss_bat, params={"r": 8}),
}


def value(peer: Peer, name: str, cores: Cores, weight: Tensor) -> Tensor:
    """The formula in float64."""
    wide = {core: tensor.double() if tensor.is_floating_point() else tensor for core, tensor in cores.items()}
    formula = METHODS[name.partition(" ")[0]][0]
    formula = getattr(formula, "func", formula)
    dense = formula(
        wide,
        weight.double().flatten(2) if weight.ndim > 2 else weight.double()[..., None],
        tuple(weight.shape),
        **peer.numbers,
    )
    return peer.scale * dense.reshape(weight.shape)


def randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def peft_update(base: nn.Module, config: Any, cores: Callable[[Any], Cores]) -> tuple[Cores, Cores, Tensor, Tensor]:
    """First and random cores, and what PEFT's merged layer and PEFT's forward pass add to the weight."""
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    layer = model.base_model.model[0]
    first = copy.deepcopy(cores(layer))
    randomise(model.parameters())
    now = copy.deepcopy(cores(layer))
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        called = model(torch.eye(base.in_features)).T if isinstance(base, nn.Linear) else None
        merged = copy.deepcopy(model).merge_and_unload()[0].weight.detach()
    weight = base.weight.detach()
    return first, now, merged - weight, merged - weight if called is None else called - weight


FILES = [name for name in PEERS if " " not in name]


@pytest.mark.usefixtures("torch_blocks")
@pytest.mark.parametrize("name", FILES)
def test_the_spec_is_pefts(name: str):
    """The value of the same tensors, how many train, and their first values (of drawn ones the spread)."""
    peer = PEERS[name]
    torch.manual_seed(0)
    base = nn.Linear(*peer.size, bias=False)
    first, now, merged, _ = peft_update(base, peer.config(), peer.cores)
    adapter = tnpeft.compile(name, base, **peer.params)
    trained = [core for core, tensor in adapter.cores.items() if tensor.requires_grad]
    assert {core: adapter.cores[core].numel() for core in trained} == {core: now[core].numel() for core in trained}
    for core in set(trained) - set(peer.anew):
        ours, theirs = adapter.cores[core].detach().flatten(), first[core].flatten()
        if (theirs == theirs[0]).all():
            assert torch.equal(ours, theirs), core
        else:
            assert 0.7 < ours.std() / theirs.std() < 1.4, core
    weights = []
    for cores in (first, now):
        with torch.no_grad():
            for core, tensor in adapter.cores.items():
                tensor.copy_(cores[core].reshape(tensor.shape))
        weights.append(adapter.network_weight().detach())
    expected = peer.scale * (weights[1] - weights[0] if peer.subtracts else weights[1])
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.usefixtures("torch_blocks")
@pytest.mark.parametrize("name", PEERS)
def test_peft_makes_the_same_update(name: str):
    peer = PEERS[name]
    torch.manual_seed(0)
    base = nn.Linear(*peer.size, bias=False)
    first, now, merged, called = peft_update(base, peer.config(), peer.cores)
    expected = value(peer, name, now, base.weight.detach())
    if peer.subtracts:
        expected = expected - value(peer, name, first, base.weight.detach())
    scale = expected.abs().max()
    torch.testing.assert_close(merged / scale, (expected / scale).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(called / scale, (expected / scale).float(), rtol=0, atol=1e-5)


def test_hra_reflects_kernels_as_peft_does():
    torch.manual_seed(0)
    base = nn.Conv2d(6, 8, 3, bias=False)
    peer = PEERS["hra"]
    _, now, merged, _ = peft_update(base, peer.config(), peer.cores)
    torch.testing.assert_close(merged, value(peer, "hra", now, base.weight.detach()).float(), rtol=0, atol=1e-5)


LYCORIS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[Any], Cores], tuple[nn.Module, ...]]] = {
    "diag_oft": (
        lambda base: lycoris.modules.diag_oft.DiagOFTModule("layer", base, lora_dim=4),
        lambda made: {"X": made.oft_blocks.detach()},
        (nn.Linear(24, 32, bias=False), nn.Conv2d(6, 12, 3, bias=False), nn.Conv3d(4, 8, 2, bias=False)),
    ),
    "boft_lycoris": (
        lambda base: lycoris.modules.boft.ButterflyOFTModule("layer", base, lora_dim=base.weight.shape[0] // 32),
        lambda made: {f"X_{at}": factor.detach() for at, factor in enumerate(made.oft_blocks)},
        (nn.Linear(24, 64, bias=False), nn.Conv2d(6, 128, 3, bias=False)),
    ),
    "tlora": (
        lambda base: lycoris.modules.tlora.TLoraModule("layer", base, lora_dim=4, alpha=4),
        lambda made: {
            "P": made.p_layer.weight.detach(),
            "lambda_": made.lambda_layer.detach().flatten(),
            "Q": made.q_layer.weight.detach(),
        },
        (nn.Linear(24, 32, bias=False),),
    ),
}


@pytest.mark.parametrize(
    ("name", "base"),
    [(name, base) for name, (_, _, layers) in LYCORIS.items() for base in layers],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_lycoris_makes_the_same_update(name: str, base: nn.Module):
    build, cores, _ = LYCORIS[name]
    torch.manual_seed(0)
    made = build(copy.deepcopy(base))
    first = copy.deepcopy(cores(made))
    randomise(made.parameters())
    peer, weight = Peer(lambda: None, cores), base.weight.detach()
    expected = value(peer, name, cores(made), weight) - value(peer, name, first, weight)
    found = made.get_diff_weight(1.0)[0].detach().reshape(weight.shape)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5 * float(expected.abs().max()))
