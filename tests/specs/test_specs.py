"""Every shipped spec against the formula it states, written in `formulas.py` a second time as one dense einsum."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from formulas import VOLUMES
from formulas_recent import METHODS, small_params
from torch import Tensor, nn

import tnpeft
from tnpeft.cli.arguments import parse_layer
from tnpeft.draw import is_current

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "specs"

Factors = tuple[int, ...]

# The preferred factors that tenvoo_* and quanta must use, as far as the layers below need them.
TENVOO = {12: (4, 3, 1), 24: (4, 3, 2), 32: (4, 4, 2), 48: (8, 3, 2), 1: (1, 1, 1), 64: (8, 4, 2), 10: (5, 2, 1)}


def halves(number: int) -> Factors:
    """(small, large) with product `number`, as near as can be."""
    small = next(divisor for divisor in range(math.isqrt(number), 0, -1) if number % divisor == 0)
    return small, number // small


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


def canonical(layer: nn.Module) -> Tensor:
    """The base weight as (out, in // groups, kernel positions), the inverse of `stored`."""
    weight = layer.weight.detach().double()
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        weight = torch.cat([block.transpose(0, 1) for block in weight.chunk(layer.groups, dim=0)], dim=0)
    return weight.reshape(*weight.shape[:2], -1)


def randomise(adapter: tnpeft.Adapter, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for core in adapter.cores.values():
            if core.is_floating_point():  # the places that maps read stay
                core.copy_(torch.randn(core.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(("name", "layer"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_network_weight_is_the_formula(name: str, layer: nn.Module):
    spec = tnpeft.load_spec(name)
    adapter = tnpeft.compile(spec, copy.deepcopy(layer).double(), **small_params(name, spec.params))
    randomise(adapter)
    shape = canonical_shape(layer)
    dense = METHODS[name][0](dict(adapter.cores), canonical(layer), shape)
    if dense.numel() == math.prod(shape):
        dense = dense.reshape(shape)
    else:  # padded channels are cropped
        dense = dense[: shape[0], : shape[1]].reshape(shape)
    # Sums of large terms may cancel in single entries: the bound is relative to the largest one.
    atol = 1e-12 * dense.abs().max().item()
    torch.testing.assert_close(adapter.network_weight(), stored(dense, layer), rtol=1e-12, atol=atol)


@pytest.mark.parametrize(("name", "layer"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_update_starts_at_zero_and_every_trained_core_moves(name: str, layer: nn.Module):
    layer, spec = copy.deepcopy(layer).double(), tnpeft.load_spec(name)
    adapter = tnpeft.compile(spec, layer, **small_params(name, spec.params))
    assert not adapter.delta_weight().any()
    target = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = {key: value.detach().clone() for key, value in adapter.named_parameters()}
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    for step in range(3):  # what multiplies the zeros moves in the second step
        optimiser.zero_grad()
        (adapter.delta_weight() * target).sum().backward()
        optimiser.step()
        assert step or adapter.delta_weight().any()
    assert [key for key, value in adapter.named_parameters() if torch.equal(value, first[key])] == []


@pytest.mark.parametrize("name", tnpeft.list_specs())
def test_the_count_is_worked_out_right(name: str):
    text = (SPECS / f"{name}.yaml").read_text()
    (line,) = re.findall(r"^# Count: (.*)$", text, re.MULTILINE)
    layer, number, arithmetic = re.fullmatch(r"(\S+) has ([\d,]+) parameters = ([\d +*()]+)", line).groups()
    count = tnpeft.load_spec(name).bind(parse_layer(layer)).num_parameters
    assert count == int(number.replace(",", "")) == eval(arithmetic)


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
        assert "dW" in re.split(r"^tnpeft: [12]$", (SPECS / f"{name}.yaml").read_text(), flags=re.MULTILINE)[0], name


def test_file_names_are_the_specs_names():
    assert {path.stem for path in SPECS.glob("*.yaml")} == set(tnpeft.list_specs())
    assert all(tnpeft.load_spec(name).name == name for name in tnpeft.list_specs())
    assert {path.stem for path in SPECS.glob("recipes/*.yaml")} == set(tnpeft.list_recipes())
    assert all(tnpeft.load_recipe(name).name == name for name in tnpeft.list_recipes())


@pytest.mark.parametrize("name", tnpeft.list_specs())
def test_every_spec_has_a_current_picture(name: str):
    """`make catalogue` draws them again."""
    assert is_current(SPECS / "pictures" / f"{name}.svg", tnpeft.load_spec(name))


def test_every_picture_is_of_a_shipped_spec():
    assert {path.name for path in (SPECS / "pictures").iterdir()} == {f"{name}.svg" for name in tnpeft.list_specs()}
