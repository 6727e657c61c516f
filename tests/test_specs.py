"""Every shipped spec against the formula it states, written here a second time as one dense einsum."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tnpeft

ROOT = Path(__file__).parent.parent
SPECS = ROOT / "specs"

Cores = dict[str, Tensor]
Factors = tuple[int, ...]

# The preferred factors that tenvoo_* and quanta must use, as far as the layers below need them.
TENVOO = {12: (4, 3, 1), 24: (4, 3, 2), 32: (4, 4, 2), 48: (8, 3, 2), 1: (1, 1, 1), 64: (8, 4, 2), 10: (5, 2, 1)}


def halves(number: int) -> Factors:
    """(small, large) with product `number`, as near as can be."""
    small = next(divisor for divisor in range(math.isqrt(number), 0, -1) if number % divisor == 0)
    return small, number // small


def dense_lora(c: Cores, shape: Factors) -> Tensor:
    return torch.einsum("or,rik->oik", c["up"], c["down"].flatten(2) if c["down"].ndim > 2 else c["down"][..., None])


def dense_lora_conv2d(c: Cores, shape: Factors) -> Tensor:
    return torch.einsum("owr,rih->oihw", c["up"], c["down"])


def dense_locon_tucker(c: Cores, shape: Factors) -> Tensor:
    return torch.einsum("or,rsk,si->oik", c["up"], c["mid"].flatten(2), c["down"])


def dense_loha(c: Cores, shape: Factors) -> Tensor:
    one = c["up_1"] @ c["down_1"].flatten(1)
    two = c["up_2"] @ c["down_2"].flatten(1)
    return one * two


def dense_loha_tucker(c: Cores, shape: Factors) -> Tensor:
    one = torch.einsum("pqk,po,qi->oik", c["mid_1"].flatten(2), c["up_1"], c["down_1"])
    two = torch.einsum("stk,so,ti->oik", c["mid_2"].flatten(2), c["up_2"], c["down_2"])
    return one * two


def kron(small: Tensor, large: Tensor, shape: Factors) -> Tensor:
    """(oa, ia) and (ob, ib, K) → (oa ob, ia ib, K)."""
    kernel = math.prod(shape[2:])
    pieces = [torch.kron(small, large.reshape(large.shape[0], -1, kernel)[..., k]) for k in range(kernel)]
    return torch.stack(pieces, dim=-1)


def dense_lokr(c: Cores, shape: Factors) -> Tensor:
    return kron(c["small"], c["up"] @ c["down"].flatten(1), shape)


def dense_lokr_both(c: Cores, shape: Factors) -> Tensor:
    return kron(c["small_up"] @ c["small_down"], c["up"] @ c["down"].flatten(1), shape)


def dense_krona(c: Cores, shape: Factors) -> Tensor:
    return kron(c["small"], c["large"], shape)


def dense_quanta(c: Cores, shape: Factors) -> Tensor:
    return torch.einsum("efbc,diaf,ghde->ghiabc", *c.values())


def dense_tenvoo_l(c: Cores, shape: Factors) -> Tensor:
    axes = "bade,cefg,xghi,yijk,zklm,Cmno,BopA,fdqh,lrpn,jqr->ABCabcxyz"
    return torch.einsum(axes, *c.values())


def dense_tenvoo_q(c: Cores, shape: Factors) -> Tensor:
    axes = "bade,cefg,xghi,yij,zjlm,Cmop,BpqA,oqrs,dftr,hlst->ABCabcxyz"
    return torch.einsum(axes, *c.values())


ANY = (
    nn.Linear(12, 20),
    nn.Conv1d(12, 20, 5, groups=2),
    nn.Conv2d(6, 9, (3, 2), groups=3),
    nn.Conv3d(4, 6, (1, 2, 3)),
    nn.ConvTranspose1d(12, 20, 3, groups=4),
    nn.ConvTranspose2d(6, 4, (2, 3), groups=2),
    nn.ConvTranspose3d(4, 7, (2, 1, 3)),
)
CONVOLUTIONS = ANY[1:]
VOLUMES = (
    nn.Conv3d(32, 48, (1, 3, 2)),
    nn.Conv3d(1, 12, 3),
    nn.Conv3d(10, 24, (3, 1, 2)),
    nn.Conv3d(64, 24, 2, groups=2),
)

METHODS: dict[str, tuple[Callable[[Cores, Factors], Tensor], tuple[nn.Module, ...]]] = {
    "lora": (dense_lora, ANY),
    "lora_conv2d": (
        dense_lora_conv2d,
        (nn.Conv2d(6, 9, (3, 2)), nn.Conv2d(8, 4, 3, groups=2), nn.ConvTranspose2d(6, 4, (2, 3))),
    ),
    "locon_tucker": (dense_locon_tucker, CONVOLUTIONS),
    "loha": (dense_loha, ANY),
    "loha_tucker": (dense_loha_tucker, CONVOLUTIONS),
    "lokr": (dense_lokr, ANY),
    "lokr_both": (dense_lokr_both, ANY),
    "krona": (dense_krona, ANY),
    "quanta": (dense_quanta, (nn.Linear(32, 48), nn.Linear(32, 32), nn.Linear(10, 64))),
    "tenvoo_l": (dense_tenvoo_l, VOLUMES),
    "tenvoo_q": (dense_tenvoo_q, VOLUMES),
}
CASES = [(name, layer) for name, (_, layers) in METHODS.items() for layer in layers]


def stored(canonical: Tensor, layer: nn.Module) -> Tensor:
    """(out, in // groups, k...) → the order in which torch keeps the layer's weight."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return canonical
    blocks = canonical.chunk(layer.groups, dim=0)
    return torch.cat([block.transpose(0, 1) for block in blocks], dim=0)


def canonical_shape(layer: nn.Module) -> Factors:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def test_every_shipped_spec_has_a_formula_here():
    assert set(tnpeft.list_specs()) == set(METHODS)


@pytest.mark.parametrize(("name", "layer"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_network_weight_is_the_formula(name: str, layer: nn.Module):
    adapter = tnpeft.compile(tnpeft.load_spec(name), layer.double(), **({} if name == "krona" else {"r": 3}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for core in adapter.cores.values():
            core.copy_(torch.randn(core.shape, generator=generator, dtype=torch.float64))
    shape = canonical_shape(layer)
    dense = METHODS[name][0](dict(adapter.cores), shape).reshape(shape)
    # Sums of large terms may cancel in single entries: the bound is relative to the largest one.
    atol = 1e-12 * dense.abs().max().item()
    torch.testing.assert_close(adapter.network_weight(), stored(dense, layer), rtol=1e-12, atol=atol)


@pytest.mark.parametrize("name", ["quanta", "tenvoo_l", "tenvoo_q"])
def test_preferred_factors(name: str):
    spec = tnpeft.load_spec(name)
    for layer in METHODS[name][1]:
        sizes = spec.bind(layer, r=3).sizes
        out_channels, in_channels, *_ = canonical_shape(layer)
        assert tuple(sizes[i] for i in ("i1", "i2", "i3")) == TENVOO[in_channels]
        assert tuple(sizes[o] for o in ("o1", "o2", "o3")) == TENVOO[out_channels]


@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_tenvoo_has_the_parameters_of_equation_6(rank: int):
    for layer in VOLUMES:
        out_channels, in_channels, kd, kh, kw = canonical_shape(layer)
        (i1, i2, i3), (o1, o2, o3) = TENVOO[in_channels], TENVOO[out_channels]
        count_l = (i1 * i2 + o1 * o2) * rank**2 + (i3 + o3 + kd + kh + kw + 1) * rank**3 + 2 * rank**4
        count_q = (i1 * i2 + o1 * o2 + kh) * rank**2 + (i3 + o3 + kd + kw) * rank**3 + 3 * rank**4
        assert tnpeft.load_spec("tenvoo_l").bind(layer, r=rank).num_parameters == count_l
        assert tnpeft.load_spec("tenvoo_q").bind(layer, r=rank).num_parameters == count_q


def test_quanta_ignores_the_rank_where_input_and_output_are_alike():
    spec = tnpeft.load_spec("quanta")
    alike = {spec.bind("Linear", in_channels=256, out_channels=256, r=rank).num_parameters for rank in (1, 4, 9)}
    assert alike == {2 * (8 * 4) ** 2 + (8 * 8) ** 2}
    assert spec.bind("Linear", in_channels=128, out_channels=512, r=4).num_parameters == 16 * 16 + 16 * 32 + 128 * 16


@pytest.mark.parametrize("name", ["lokr", "lokr_both", "krona"])
@pytest.mark.parametrize("layer", [nn.Linear(12, 20), nn.Conv2d(7, 64, 3)], ids=["linear", "prime"])
def test_kronecker_factors_are_as_near_as_can_be(name: str, layer: nn.Module):
    sizes = tnpeft.load_spec(name).bind(layer).sizes
    out_channels, in_channels = canonical_shape(layer)[:2]
    assert (sizes["oa"], sizes["ob"]) == halves(out_channels)
    assert (sizes["ia"], sizes["ib"]) == halves(in_channels)


# (channels, factor) → the two factors, small first, as lycoris-lora 4.1.3 splits them.
LYCORIS = {
    (127, 8): (1, 127),
    (128, 2): (2, 64),
    (128, 16): (8, 16),
    (250, 4): (2, 125),
    (360, 16): (15, 24),
    (1024, 16): (16, 64),
    (24, 8): (3, 8),
    (16, 8): (2, 8),
    (8, 8): (1, 8),
    (24, 16): (4, 6),
}


@pytest.mark.parametrize(("channels", "factor"), LYCORIS)
def test_kronecker_factors_bounded_as_in_lycoris(channels: int, factor: int):
    sizes = tnpeft.load_spec("lokr").bind("Linear", in_channels=channels, out_channels=channels, factor=factor).sizes
    assert (sizes["oa"], sizes["ob"]) == LYCORIS[channels, factor]
    assert (sizes["ia"], sizes["ib"]) == LYCORIS[channels, factor]


def test_every_file_is_headed_by_its_formula_and_source():
    for path in (*SPECS.glob("*.yaml"), *SPECS.glob("recipes/*.yaml"), *SPECS.glob("factors/*.yaml")):
        head = path.read_text().splitlines()
        assert head[0].startswith("# "), path
    for name in tnpeft.list_specs():
        spec = tnpeft.load_spec(name)
        assert spec.title, name
        assert spec.source, name
        assert "dW" in (SPECS / f"{name}.yaml").read_text().partition("tnpeft: 1")[0], name


def test_file_names_are_the_specs_names():
    assert {path.stem for path in SPECS.glob("*.yaml")} == set(tnpeft.list_specs())
    assert all(tnpeft.load_spec(name).name == name for name in tnpeft.list_specs())
    assert {path.stem for path in SPECS.glob("recipes/*.yaml")} == set(tnpeft.list_recipes())
    assert all(tnpeft.load_recipe(name).name == name for name in tnpeft.list_recipes())
