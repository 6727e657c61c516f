"""What verifying measures with: the float64 sums against torch's einsum, formulas, redundancy and conditioning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import tnpeft
from tnpeft.execution import compile
from tnpeft.network import Layer, Network
from tnpeft.testing import networks
from tnpeft.verify import Case, Gauge, verify
from tnpeft.verify.conditioning import conditioning_of
from tnpeft.verify.formula import formula_value
from tnpeft.verify.gauge import gauge_of
from tnpeft.verify.oracle import canonical, composed, dense_weight, entry, stored, sum_out


@settings(max_examples=60)
@given(networks(derived=False))
def test_sums_are_those_of_einsum(network: Network):
    generator = torch.Generator().manual_seed(0)
    cores = {core.name: torch.randn(core.shape, generator=generator, dtype=torch.float64) for core in network.cores}
    numbers = {leg: number for number, leg in enumerate(network.sizes)}
    total = torch.zeros(network.layer.weight_shape, dtype=torch.float64)
    for term in network.terms:
        operands: list[object] = []
        for core in network.cores:
            if core.name in term.cores:
                operands += [cores[core.name], [numbers[leg] for leg in core.legs]]
        opened = [numbers[leg] for axis in term.weight for leg in axis]
        total += term.scale * torch.einsum(*operands, opened).reshape(total.shape)
    found = dense_weight(network, cores)
    torch.testing.assert_close(canonical(found, network.layer), total)
    last = tuple(size - 1 for size in found.shape)
    torch.testing.assert_close(entry(network, cores, last), float(found[last]), rtol=1e-9, atol=1e-9)
    assert formula_value(network.formula, network) == network.num_parameters


def test_one_leg_at_a_time():
    a, b, c = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3), (3, 4, 2), (4,)))
    found = sum_out([(a, ("x", "r")), (b, ("r", "s", "x")), (c, ("s",))], ("x",))
    torch.testing.assert_close(found, torch.einsum("xr,rsx,s->x", a, b, c))


def test_grouped_transposed_weights_by_their_formula():
    layer = Layer("ConvTranspose1d", 6, 4, (5,), 2)
    weight = torch.arange(60.0).reshape(layer.weight_shape)
    made = stored(weight, layer)
    assert made.shape == nn.ConvTranspose1d(6, 4, 5, groups=2).weight.shape
    assert all(made[3 * g + i, o, 1] == weight[2 * g + o, i, 1] for g in range(2) for i in range(3) for o in range(2))
    assert torch.equal(canonical(made, layer), weight)


def test_dora_is_its_formula():
    layer = Layer("Linear", 3, 2)
    weight = torch.randn(2, 3, dtype=torch.float64)
    magnitude = torch.tensor([2.0, 5.0], dtype=torch.float64)
    found = composed(weight, magnitude, layer)
    torch.testing.assert_close(found.norm(dim=1), magnitude)
    torch.testing.assert_close(found, torch.nn.functional.normalize(weight) * magnitude[:, None])


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("o r + 2 i k... r", 5 * 2 + 2 * 3 * 6 * 2),
        ("3(o + i) r^2", 3 * 8 * 4),
        ("2r^4", 32),
        ("o (max(1, r - 1))^2 (r + 1)", 5 * 3),
        ("i (2 if r == 2 else 7)", 6),
        ("0", 0),
    ],
)
def test_formulas_are_read_as_papers_write_them(formula: str, value: int):
    network = tnpeft.load_spec("lora").bind("Conv2d", in_channels=3, out_channels=5, kernel_size=(2, 3), r=2)
    assert formula_value(formula, network) == value


HEAD = "tnpeft: 1\nname: mine\nlayers: [Linear]\nparams: {r: 2}\nsizes: {o: out_channels, i: in_channels}\nbond: r\n"
TAIL = "weight: o i\nstart: frozen_copy\n"


def redundancy(cores: str, tail: str = TAIL, **params: float) -> Gauge:
    spec = tnpeft.Spec.from_yaml(f"{HEAD}cores:\n{cores}\n{tail}")
    found = gauge_of(spec, [Case("Linear", 9, 8, params=params)])
    assert found is not None
    assert found.rank + found.gauge + found.scalings + found.redundant == found.parameters
    return found


def test_a_chain_has_the_gauge_of_its_bonds():
    found = redundancy("  a: o x\n  b: x y\n  c: y i")
    assert (found.parameters, found.rank, found.gauge, found.scalings) == (38, 2 * (8 + 9 - 2), 8, 0)
    assert str(found) == (
        "30 of 38 parameters move the update independently on Linear(9, 8); 8 are gauge (bonds, shared indices)"
    )


def test_parallel_bonds_act_as_one():
    found = redundancy("  a: o x y\n  c: x y i")
    assert (found.rank, found.gauge, found.redundant) == (4 * (8 + 9 - 4), 16, 0)


def test_a_hadamard_product_exchanges_factors_along_its_open_legs():
    found = redundancy("  a: o x\n  b: x i\n  c: o y\n  d: y i")
    # Two bonds of 4, a factor for each row, one for each column; a common factor of all is counted twice.
    assert (found.gauge, found.scalings, found.redundant) == (8 + 8 + 9 - 1, 0, 0)


def test_disconnected_parts_exchange_one_factor():
    tail = "weight: (o p) (i q)\nstart: frozen_copy\n"
    spec = tnpeft.Spec.from_yaml(
        HEAD.replace("o: out_channels", "o p: 'factorize(out_channels, 2)'").replace(
            "i: in_channels", "i q: 'factorize(in_channels, 2)'"
        )
        + f"cores:\n  a: o i\n  b: p q\n{tail}"
    )
    found = gauge_of(spec, [Case("Linear", 9, 8)])
    assert found is not None
    assert (found.gauge, found.scalings, found.redundant) == (0, 1, 0)


def test_terms_pass_a_matrix_only_together():
    terms = "terms: [{cores: [a, b], weight: o i}, {cores: [a, c], weight: o i, scale: -1}]\nstart: frozen_copy\n"
    found = redundancy("  a: o x\n  b: x i\n  c: x i", terms)
    # One GL(2) for both terms; b and c only show in their difference, which hides 2 x 9 more.
    assert (found.gauge, found.redundant) == (4, 18)
    apart = redundancy("  a: o x\n  b: x i\n  c: o y\n  d: y i", terms.replace("[a, c]", "[c, d]"))
    assert apart.gauge == 8


@pytest.mark.parametrize(
    ("cores", "cause"),
    [
        # As in the published TenVOO-Q: one leg broadcast, another dangling.
        (
            "  a: o x z\n  n: {legs: z, init: ones, frozen: true}\n  b: x i",
            "only the sum of core 'a' over its leg 'z' matters: size 1 would do",
        ),
        (
            "  a: o x\n  n: {legs: x y, init: ones, frozen: true}\n  b: y i",
            "only the sum of core 'b' over its leg 'y' matters: size 1 would do",
        ),
        (
            "  a: o x\n  n: {legs: x y, init: eye, frozen: true}\n  b: y i\n  s: {legs: x, init: zeros, frozen: true}",
            "18 of the 18 numbers in core 'b' never matter",
        ),
    ],
)
def test_causes_of_redundancy(cores: str, cause: str):
    found = redundancy(cores)
    assert found.redundant > 0
    assert cause in found.causes
    assert str(found).endswith(f"{found.redundant} are redundant")


def test_a_bond_larger_than_its_neighbours_is_named():
    found = redundancy("  a: o x\n  b: x y\n  c: y i", r=12)
    assert "leg 'x' of core 'a' has size 12, more than its other legs together (8)" in found.causes
    assert redundancy("  a: o x\n  b: x y\n  c: y i").causes == ()


def test_conditioning_is_measured_on_a_layer():
    (row,) = conditioning_of(tnpeft.load_spec("lora"), {"r": 4}, Layer("Linear", 64, 32))
    layer = Case("Linear", 64, 32).build()
    assert row.weight == pytest.approx(float(layer.weight.detach().std(correction=0)))
    assert row.network == 0.0
    # Only `up` moves, by the rate: dW = rate * sign @ down.
    down = compile("lora", layer, name="layer", r=4).cores["down"].detach()
    typical = 1e-3 * math.sqrt(float((down**2).sum(0).mean()))
    assert row.step == pytest.approx(typical, rel=0.3)
    assert row.steps["down"] == 0.0
    assert row.advice == ""


def test_conditioning_gives_the_advice_that_the_reference_init_needs():
    (row,) = conditioning_of(tnpeft.load_spec("tenvoo_l"), {})
    assert row.layer == "Conv3d(32, 32, 3x3x3)"
    assert 50 < row.network_ratio < 140
    ratio = f"std(T) is {row.network_ratio:.3g} times std(W)"
    assert row.advice.startswith(f"{ratio}, and the first step moves the weight by ")


def test_a_network_that_hardly_moves_is_named():
    spec = tnpeft.Spec.from_yaml(HEAD + "cores:\n  a: o x\n  b: x i\nscale: 1e-6\n" + TAIL)
    (row,) = conditioning_of(spec, {}, Layer("Linear", 64, 64))
    assert row.advice.endswith("use a larger init of the other cores, a larger `scale` or a larger learning rate")


# The first examples have one channel, of which an orthogonal core is a point: these are tried on more.
_POINTS = ("boft", "boft_2", "boft_lycoris", "diag_oft", "gsoft", "hra_gs", "para", "spectral_adapter_r")


@pytest.mark.slow
@pytest.mark.parametrize("name", tnpeft.list_specs())
def test_shipped_specs_are_sound(name: str):
    report = verify(name, examples=2, advice=False, layer=Layer("Linear", 16, 64) if name in _POINTS else None)
    assert report.ok, str(report)
    assert report.examples == 2


def test_numbers_that_are_single_entries_are_no_redundancy():
    """More entries than the sums in which a rank is looked for."""
    found = gauge_of(tnpeft.load_spec("shira"), [Case("Linear", 48, 96, params={"r": 2})])
    assert found is not None
    assert (found.entries, found.rank, found.redundant) == (4608, found.parameters, 0)
