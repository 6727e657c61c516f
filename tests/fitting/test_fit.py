"""`tnpeft.fit`: optima that are known, updates that a spec can make, and what no fit may do."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from formulas_recent import METHODS, small_params
from hypothesis import given, settings
from hypothesis import strategies as st
from small import bits, layers, same_bits
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import BindError, SpecError
from tnpeft.fitting import start
from tnpeft.fitting.mapped import linear_cores
from tnpeft.network import Spec

LAYERS = (
    nn.Linear(12, 20),
    nn.Conv1d(9, 8, 3),
    nn.Conv2d(6, 9, (3, 2), groups=3),
    nn.Conv3d(4, 7, (1, 2, 3)),
    nn.ConvTranspose1d(12, 8, 3, groups=4),
    nn.ConvTranspose2d(5, 4, (2, 3)),
    nn.ConvTranspose3d(4, 6, (2, 1, 3), groups=2),
)
# Each is out x rest of one rank, however it is written.
LORA_SHAPED = ("lora", "rslora", "pissa", "adalora")


def update(layer: nn.Module, seed: int = 0) -> Tensor:
    return torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(900 + seed), dtype=torch.float64)


def unfolded(layer: nn.Module, delta: Tensor) -> Tensor:
    """out x rest, group by group: stored[g*a + i, o] = canonical[g*b + o, i]."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return delta.flatten(1)
    return torch.cat([block.transpose(0, 1).flatten(1) for block in delta.chunk(layer.groups)])


def tail(matrix: Tensor, rank: int) -> float:
    """The relative error of the best matrix of a rank."""
    singular = torch.linalg.svdvals(matrix)
    return float(singular[rank:].norm() / singular.norm())


def of_rank(adapter: tnpeft.Adapter, seed: int = 31) -> None:
    """Random cores, other ones than any start of a fit; magnitudes near their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, core in adapter.trained.items():
            drawn = torch.randn(core.shape, generator=generator, dtype=torch.float64)
            core.copy_(core * (1 + drawn.abs() / 3) if name == "magnitude" else drawn / math.sqrt(max(core.shape)))


def true_error(fitted: tnpeft.Fit, delta: Tensor) -> float:
    made = fitted.adapter.delta_weight().detach().double()
    return float((made - delta).norm() / delta.norm())


def params_of(name: str, size: int = 2) -> dict[str, int]:
    known = tnpeft.load_spec(name).params
    return {param: size for param in ("r", "inner", "minis", "bases", "u", "waves") if param in known}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("rank", [1, 3, "full"])
def test_lora_reaches_the_optimum(layer: nn.Module, rank: int | str):
    layer = copy.deepcopy(layer).double()
    delta = update(layer)
    matrix = unfolded(layer, delta)
    rank = min(matrix.shape) if rank == "full" else rank
    fitted = tnpeft.fit("lora", delta, layer, r=rank, alpha=5)
    assert fitted.error == pytest.approx(tail(matrix, rank), rel=1e-4, abs=1e-12)
    assert fitted.error == pytest.approx(true_error(fitted, delta), abs=1e-12)
    assert fitted.adapter.network.scale == 5 / rank


@pytest.mark.parametrize("name", LORA_SHAPED)
@pytest.mark.parametrize("layer", LAYERS[:3], ids=lambda layer: type(layer).__name__)
def test_whatever_is_shaped_like_lora_reaches_the_optimum(name: str, layer: nn.Module):
    layer = copy.deepcopy(layer).double()
    delta = update(layer)
    best = tail(unfolded(layer, delta), 2)
    if name == "pissa":  # where its frozen copy is kept, it takes away what that makes
        matrix = unfolded(layer, delta + tnpeft.compile(tnpeft.load_spec(name), layer, r=2).network_weight().detach())
        best = min(best, tail(matrix, 2) * float(matrix.norm() / delta.norm()))
    assert tnpeft.fit(name, delta, layer, r=2).error == pytest.approx(best, rel=1e-4)


def test_a_convolution_cut_between_its_kernel_axes():
    layer = nn.Conv2d(6, 9, (3, 2)).double()
    delta = update(layer)
    matrix = delta.permute(0, 3, 2, 1).reshape(18, 18)  # (o w) x (h i)
    assert tnpeft.fit("lora_conv2d", delta, layer, r=3).error == pytest.approx(tail(matrix, 3), rel=1e-4)


def test_small_loras_along_the_diagonal_reach_the_optimum_of_each():
    layer = nn.Linear(12, 20).double()
    delta = update(layer)
    fitted = tnpeft.fit("melora", delta, layer, r=2, minis=2)
    blocks = [delta[:10, :6], delta[10:, 6:]]
    kept = sum(float(torch.linalg.svdvals(block)[:2].square().sum()) for block in blocks)
    assert fitted.captured == pytest.approx(kept / float(delta.square().sum()), rel=1e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-6])
def test_spectra_that_are_nearly_degenerate(gap: float):
    left, right = (torch.linalg.qr(update(nn.Linear(16, 16), seed))[0] for seed in (1, 2))
    delta = left @ torch.diag(torch.tensor([1.0] * 4 + [1.0 - gap] * 6 + [1e-9] * 6, dtype=torch.float64)) @ right
    fitted = tnpeft.fit("lora", delta, nn.Linear(16, 16).double(), r=4)
    assert fitted.error == pytest.approx(tail(delta, 4), rel=1e-4)


@pytest.mark.parametrize("layer", [nn.Linear(12, 40), nn.Linear(40, 12)], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [2, 12, 20])
def test_a_large_matrix_takes_another_way_to_its_singular_vectors(
    layer: nn.Module, rank: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(start, "DENSE_SVD", 0)
    layer = copy.deepcopy(layer).double()
    fitted = tnpeft.fit("lora", update(layer), layer, r=rank)
    assert fitted.error == pytest.approx(tail(update(layer), rank), rel=1e-4, abs=1e-12)


# What random starts find of an update that the spec itself made; where a hyperedge or a ring leaves local minima, the
# layers are small and so many starts are tried.
TREES = (
    *("lora", "locon_tucker", "lokr", "lokr_both", "lokr_tucker", "krona", "tt_lora", "mpo", "tucker5", "pissa"),
    *("hierarchical_tucker", "monarch", "kradapter", "miss", "ia3", "ia3_input", "lora_xs", "adalora", "lora_fa"),
    *("lotr", "fact_tt", "fact_tk", "lorta", "metatt", "loretta_rep", "tinylora", "nola", "svft", "full", "melora"),
    *("fourierft", "lora_conv2d", "rslora"),
)
HARDER = ("cp", "hira", "vera", "randlora", "tensor_ring", "quanta", "loha", "glora")


@pytest.mark.parametrize("name", [*TREES, *HARDER])
def test_an_update_of_the_spec_itself_is_found_again(name: str):
    layer = copy.deepcopy(METHODS[name][1][1 if name == "glora" else 0]).double()
    adapter = tnpeft.compile(tnpeft.load_spec(name), layer, **params_of(name))
    of_rank(adapter)
    delta = adapter.delta_weight().detach()
    fitted = tnpeft.fit(name, delta, layer, **params_of(name))
    assert fitted.error < 1e-6
    assert true_error(fitted, delta) < 1e-6


def test_a_long_valley_is_left_near_its_bottom():
    """Magnitudes and cores are solved for in turn, and crawl."""
    layer = nn.Conv2d(6, 9, (3, 2), groups=3).double()
    adapter = tnpeft.compile(tnpeft.load_spec("dora"), layer, r=2)
    of_rank(adapter)
    assert tnpeft.fit("dora", adapter.delta_weight().detach(), layer, r=2).error < 1e-4


LONG = ("boft_lycoris", "tenvoo_l", "tenvoo_q")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in tnpeft.list_specs()]
)
def test_no_fit_is_worse_than_none(name: str):
    """In fp32, on an update as small as fine-tuning makes; its error is that of the cores as they are stored."""
    torch.manual_seed(7)
    layer = copy.deepcopy(METHODS[name][1][1])
    delta = 1e-3 * update(layer)
    params = small_params(name, dict(tnpeft.load_spec(name).params))
    network = tnpeft.load_spec(name).bind(layer, **params)
    method: Any = "als" if linear_cores(network) else "auto"  # there is none behind maps that are not linear
    fitted = tnpeft.fit(name, delta, layer, method=method, iterations=1, **params)
    assert fitted.error <= 1
    assert list(fitted.history) == sorted(fitted.history, reverse=True)
    assert fitted.sweeps == len(fitted.history) - 1
    assert fitted.error == pytest.approx(true_error(fitted, delta), abs=2e-3)  # delta_weight adds up in fp32


def test_a_change_far_below_the_rounding_of_the_start():
    """PiSSA's cores as drawn are as large as the weight: in fp32 they cannot make an update of its 1e-9, others can."""
    layer = nn.Linear(12, 20)
    fitted = tnpeft.fit("pissa", 1e-9 * update(layer), layer, r=4)
    assert fitted.error == pytest.approx(tail(update(layer), 4), rel=1e-4)
    assert true_error(fitted, 1e-9 * update(layer)) == pytest.approx(fitted.error, rel=1e-4)


def test_more_parameters_than_the_update_can_use():
    """Singular normal matrices: rounding must not drive the cores away."""
    layer = nn.Conv3d(4, 6, (1, 2, 3))
    fitted = tnpeft.fit("fact_tk", 1e-3 * update(layer), layer, r=16)
    assert fitted.error < 1e-6
    assert max(float(core.detach().abs().max()) for core in fitted.adapter.cores.values()) < 10


@pytest.mark.parametrize("name", ["lora", "loha", "dora"])
@pytest.mark.parametrize("method", ["auto", "als", "adam"])
def test_the_same_bits_twice_and_nothing_else_touched(name: str, method: str):
    layer = nn.Linear(3, 5)
    delta = update(layer)
    before, kept, state = bits(layer), delta.clone(), torch.get_rng_state()
    fits = [tnpeft.fit(name, delta, layer, method=method, iterations=4, r=1) for _ in range(2)]
    assert same_bits(*(bits(fitted.adapter) for fitted in fits))
    assert fits[0].history == fits[1].history
    assert same_bits(bits(layer), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())
    assert torch.equal(delta, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_adam_goes_down_and_says_so():
    layer = nn.Linear(6, 8).double()
    delta = update(layer)
    fitted = tnpeft.fit("loha", delta, layer, r=1, method="adam", iterations=250)
    assert fitted.method == "adam"
    assert fitted.sweeps == 250
    assert fitted.error == pytest.approx(true_error(fitted, delta), rel=1e-9)
    assert fitted.error == min(fitted.history)
    assert fitted.error < 1.1 * tnpeft.fit("loha", delta, layer, r=1).error


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(context: type):
    layer = nn.Linear(6, 8)
    expected = tnpeft.fit("loha", update(layer), layer, r=1, method="adam", iterations=60)
    with context():
        fitted = tnpeft.fit("loha", update(layer), layer, r=1, method="adam", iterations=60)
    assert fitted.history == expected.history
    assert all(parameter.requires_grad for parameter in fitted.adapter.parameters())


@settings(max_examples=25)
@given(layer=layers(), name=st.sampled_from(["lora", "lokr", "loha", "hira", "glora", "tensor_ring"]), data=st.data())
def test_any_layer(layer: nn.Module, name: str, data: st.DataObject):
    rank = data.draw(st.integers(1, 3), "rank")
    delta = update(layer) * 10.0 ** data.draw(st.integers(-6, 3), "size")
    fitted = tnpeft.fit(name, delta, layer.double(), r=rank, iterations=5)
    assert fitted.error <= 1
    assert fitted.error == pytest.approx(true_error(fitted, delta), abs=1e-9)
    if name == "lora":
        assert fitted.error == pytest.approx(tail(unfolded(layer, delta), rank), rel=1e-4, abs=1e-9)


def test_types_of_layer_and_update():
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)):
        layer = nn.Linear(4, 6, dtype=dtype)
        fitted = tnpeft.fit("lora", update(layer).to(dtype), layer, r=4)
        assert fitted.error < bound
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert {core.dtype for core in fitted.adapter.cores.values()} == {wanted}


def test_a_layer_by_its_kind_a_signature_or_itself():
    layer = nn.Conv1d(4, 6, 3, device="meta")
    delta = update(layer)
    by_kind = tnpeft.fit("lora", delta, "Conv1d", in_channels=4, out_channels=6, kernel_size=3, r=2)
    others = (layer, nn.Conv1d(4, 6, 3).double(), tnpeft.layer_of(layer))
    assert {tnpeft.fit("lora", delta, other, r=2).error for other in others} == {by_kind.error}
    model = nn.Sequential(nn.Conv1d(4, 6, 3).double())
    tnpeft.attach(model, "lora", match="0")
    assert tnpeft.fit("lora", delta, model[0], r=2).error == by_kind.error


def test_an_update_of_nothing():
    layer = nn.Linear(4, 6)
    for name in ("lora", "dora", "pissa"):
        fitted = tnpeft.fit(name, torch.zeros(6, 4), layer)
        assert (fitted.error, fitted.captured, fitted.method, fitted.history) == (0.0, 1.0, "start", (0.0,))
        assert not fitted.adapter.delta_weight().any()
    zeros = nn.Linear(4, 6)
    nn.init.zeros_(zeros.weight)
    assert tnpeft.fit("hira", torch.ones(6, 4), zeros).error == 1.0  # nothing to multiply
    assert tnpeft.fit("dora", torch.ones(6, 4), zeros).error < 1e-6


def test_what_is_fitted_is_what_trains_and_merges():
    model = nn.Sequential(nn.Linear(4, 6))
    delta = update(model[0]).float()
    fitted = tnpeft.fit("dora", delta, model[0], r=4, name="0")
    tnpeft.attach(model, "dora", match="0", r=4)
    before = model[0].base.weight.detach().clone()
    model[0].adapters["default"].load_state_dict(fitted.adapter.state_dict())
    torch.testing.assert_close(model[0].weight, before + delta, rtol=1e-5, atol=1e-5)


def test_its_text():
    layer = nn.Linear(4, 6).double()
    assert str(tnpeft.fit("lora", update(layer), layer, r=4)).startswith("lora on Linear(4, 6), 40 parameters: ")
    assert str(tnpeft.fit("full", torch.zeros(6, 4), layer)) == (
        "full on Linear(4, 6), 24 parameters: relative error 0.000e+00 (100.00% of the energy) by start, sweeps 0"
    )


SUBTRACT = "Pass the tuned weight minus the base weight."
DIVERGED = "Check both weights: training may have diverged."
WRONG = [
    ([1.0], f"delta: expected a tensor, found [1.0]. {SUBTRACT}"),
    (
        torch.ones(4, 6),
        "delta: expected the shape of the layer's weight, (6, 4), found (4, 6). "
        "Pass the tuned weight minus the base weight, as the layer stores them.",
    ),
    (
        torch.ones(6, 4, dtype=torch.int32),
        "delta: expected floating-point numbers, found int32. Convert it, for example by `.float()`.",
    ),
    (
        torch.ones(6, 4, dtype=torch.complex64),
        "delta: expected floating-point numbers, found complex64. Convert it, for example by `.float()`.",
    ),
    (torch.full((6, 4), math.nan), f"delta: expected finite numbers, found nan or inf. {DIVERGED}"),
    (torch.full((6, 4), -math.inf), f"delta: expected finite numbers, found nan or inf. {DIVERGED}"),
    (
        torch.ones(6, 4, device="meta"),
        f"delta: expected finite numbers, found none (it is on the meta device). {DIVERGED}",
    ),
    (torch.ones(6, 4).to_sparse(), "delta: expected a dense tensor, found sparse_coo. Convert it by `.to_dense()`."),
    (
        torch.full((6, 4), 1e200, dtype=torch.float64),
        "delta: expected numbers whose squares float64 can add up, found 1.0e+200 at most. Scale both weights.",
    ),
]


@pytest.mark.parametrize(("delta", "text"), WRONG)
def test_updates_that_are_none(delta: object, text: str):
    with pytest.raises(BindError) as excinfo:
        tnpeft.fit("lora", delta, nn.Linear(4, 6))
    assert str(excinfo.value) == text


def refused(*arguments: object, error: type[Exception] = BindError, **keywords: object) -> str:
    with pytest.raises(error) as excinfo:
        tnpeft.fit(*arguments, **keywords)
    return str(excinfo.value)


def test_arguments_that_are_none():
    layer, delta = nn.Linear(4, 6), torch.ones(6, 4)
    assert refused("lora", delta, layer, method="sgd") == (
        "`method`: expected one of auto, als, adam, found 'sgd'. Leave it out, or choose one of them."
    )
    for wrong in (0, -3, True, 2.0):
        assert refused("lora", delta, layer, iterations=wrong) == (
            f"`iterations`: expected a positive whole number, found {wrong!r}. For example `iterations=100`."
        )
    assert refused(3, delta, layer, error=SpecError) == (
        "spec: expected a name or a path, found 3. Give the name of a shipped spec, or the path of a file."
    )
    assert refused("lorra", delta, layer, error=SpecError).endswith("found neither. Did you mean `lora`?")
    assert refused("lora", delta, nn.ReLU()).startswith("unsupported layer: expected one of Linear, Conv1d,")
    assert refused("lora", delta, layer, rr=2) == (
        "params of spec 'lora': expected one of r, alpha, found `rr`. Did you mean `r`?"
    )


@pytest.mark.parametrize(
    ("name", "reader"), [("hira", "core 'W'"), ("dora", "`compose`"), ("pissa", "core 'down'"), ("lora_xs", "core 'V'")]
)
def test_what_needs_the_base_weight(name: str, reader: str):
    found = "only its signature, Linear(4, 6)"
    text = "layer, for {} of '{}': expected the base weight's values, found {}. "
    text += "Pass the layer itself, with its base weight."
    delta = torch.ones(6, 4)
    assert refused(name, delta, "Linear", in_channels=4, out_channels=6) == text.format(reader, name, found)
    meta = nn.Linear(4, 6, device="meta")
    assert refused(name, delta, meta) == text.format(reader, name, "a layer on the meta device")


PADDED = """
tnpeft: 1
name: padded
layers: any
params: {r: 3}
sizes: {o1 o2: "factorize(out_channels, 2, pad=true)", i: in_channels}
bond: r
cores: {one: {legs: o1 a, init: zeros}, two: a o2 b, three: b i k...}
terms:
  - {cores: [one, two, three], weight: (o1 o2) i k...}
start: zero
"""


def test_padded_channels_cost_nothing():
    """13 channels are made of 4 x 4 or 7 x 2: what is cropped may be anything."""
    spec = Spec.from_yaml(PADDED)
    layer = nn.Linear(5, 13).double()
    adapter = tnpeft.compile(spec, layer)
    assert math.prod(adapter.network.sizes[leg] for leg in ("o1", "o2")) > 13
    assert tnpeft.fit(spec, update(layer), layer, r=20).error < 1e-6
    fitted = tnpeft.fit(spec, update(layer), layer)
    assert fitted.error == pytest.approx(true_error(fitted, update(layer)), abs=1e-12)
