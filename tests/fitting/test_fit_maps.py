"""Fits of specs with derived cores, index cores and references: linear ones by least squares, the others by descent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AttachError, BindError
from tnpeft.fitting.mapped import linear_cores

SMALL: dict[str, dict[str, float]] = {
    "adamss": {"r": 2, "clusters": 2},
    "shira": {"r": 1},
    "supertuning": {"sparsity": 0.5},
    "gralora": {"r": 2},
    "rosa": {"r": 1, "density": 0.1},
    "lorma_pi": {"r": 1},
    "c3a": {"b": 4},
    "deft": {"rank": 2},
    "delora": {"r": 2},
    "oft_cayley": {"b": 4},
    "hra": {"rank": 2},
    "psoft": {"r": 3},
    "ether": {},
    "unilora": {"r": 1, "d": 8},
}


def moved(spec: str, layer: nn.Module, seed: int = 31) -> Tensor:
    """An update that the spec itself makes, a way from its start."""
    adapter = tnpeft.compile(tnpeft.load_spec(spec), layer, **SMALL[spec])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for core in adapter.trained.values():
            core.add_(0.3 * torch.randn(core.shape, generator=generator, dtype=torch.float64))
    return adapter.delta_weight().detach()


def layer_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(8, 8).double()


SLOW = ("deft", "psoft", "delora", "rosa")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL]
)
def test_an_update_of_the_spec_itself_is_found_again(name: str):
    layer = layer_of()
    delta = moved(name, layer)
    fitted = tnpeft.fit(name, delta, layer, **SMALL[name])
    assert fitted.error < 1e-6
    found = fitted.adapter.delta_weight().detach()
    assert float((found - delta).norm() / delta.norm()) < 1e-6
    # What does not train stays as it was drawn: singular vectors and places.
    fresh = tnpeft.compile(tnpeft.load_spec(name), layer, **SMALL[name])
    for core in fresh.network.cores:
        if core.frozen and core.origin != "weight":
            assert torch.equal(fitted.adapter.cores[core.name], fresh.cores[core.name])


@pytest.mark.slow
def test_every_start_of_a_small_target_is_followed_to_its_end():
    """Far from the identity Neumann's series has several valleys; a few steps from the best start end in 0.73."""
    layer, generator = layer_of(), torch.Generator().manual_seed(32)
    adapter = tnpeft.compile("oft", layer, b=8)
    with torch.no_grad():
        adapter.cores["R"].add_(0.3 * torch.randn(1, 28, generator=generator, dtype=torch.float64))
    assert tnpeft.fit("oft", adapter.delta_weight().detach(), layer, b=8).error < 1e-5


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("rosa", {"down", "up", "values"}),
        ("deft", {"R"}),
        ("oft", set()),
        ("psoft", {"b", "a"}),
        ("tensorguide", {"head_up", "head_down"}),
        ("lorma_pi", {"A", "B"}),
    ],
)
def test_which_cores_least_squares_find(name: str, linear: set[str]):
    """Those behind a map that is not linear, and those that stand twice in a term, are none of them."""
    small = {key: value for key, value in {"b": 4, "r": 2}.items() if key in tnpeft.load_spec(name).params}
    network = tnpeft.load_spec(name).bind("Linear", in_channels=8, out_channels=8, **small)
    assert set(linear_cores(network)) == linear


def test_entries_at_places_are_those_of_the_update():
    """Least squares of a scattered core: the update where it reaches, nothing elsewhere."""
    layer = layer_of()
    delta = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fitted = tnpeft.fit("supertuning", delta, layer, sparsity=0.75)
    places = fitted.adapter.cores["places"]
    assert places.dtype == torch.int64
    torch.testing.assert_close(fitted.adapter.cores["values"].detach(), delta.flatten()[places])


def test_als_needs_a_core_that_the_update_is_linear_in():
    with pytest.raises(BindError) as caught:
        tnpeft.fit("oft", torch.ones(8, 8), layer_of(), method="als", b=4)
    assert str(caught.value) == (
        "`method`, for spec 'oft': expected auto or adam: least squares find cores that the update is linear in, found "
        "'als', and 'R' behind a map that is not linear, or twice in a term. Leave it out."
    )
    assert tnpeft.fit("psoft", torch.ones(8, 8), layer_of(), method="als", iterations=2, r=3).method == "als"


@pytest.mark.parametrize(
    ("name", "reader"), [("supertuning", "core 'places'"), ("oft", "core 'W'"), ("psoft", "core 'U'")]
)
def test_what_needs_the_base_weight(name: str, reader: str):
    with pytest.raises(BindError, match=f"layer, for {reader} of '{name}': expected the base weight's values"):
        tnpeft.fit(name, torch.ones(32, 32), "Linear", in_channels=32, out_channels=32)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))


@pytest.mark.parametrize(
    ("name", "larger", "smaller"), [("hra", {"rank": 4}, {"rank": 2}), ("oft", {"b": 4}, {"b": 2})]
)
def test_truncating(name: str, larger: dict[str, Any], smaller: dict[str, Any]):
    model = model_of()
    handle = tnpeft.attach(model, name, match="all", **larger)
    with torch.no_grad():
        for core in handle.parameters():
            core.add_(0.3 * torch.randn(core.shape, generator=torch.Generator().manual_seed(3)))
    before = {layer: adapter.delta_weight().detach() for layer, adapter in handle.adapters.items()}
    result = handle.truncate(**smaller, iterations=20)
    assert result.after < result.before
    for row in result.layers:
        after = handle.adapters[row.name].delta_weight().detach()
        error = float((after - before[row.name]).norm() / before[row.name].norm())
        assert error == pytest.approx(row.error, abs=1e-3)


def test_the_largest_entries_that_stay_are_the_first_ones():
    """A smaller core of places by size is a part of the larger one: what is kept is the update there."""
    model = model_of()
    handle = tnpeft.attach(model, "supertuning", match="all", sparsity=0.5)
    with torch.no_grad():
        for core in handle.parameters():
            core.copy_(torch.randn(core.shape, generator=torch.Generator().manual_seed(3)))
    before = {layer: adapter.cores["values"].detach().clone() for layer, adapter in handle.adapters.items()}
    handle.truncate(sparsity=0.75)
    for layer, adapter in handle.adapters.items():
        values = adapter.cores["values"].detach()
        torch.testing.assert_close(values, before[layer][: len(values)])


def test_drawn_places_of_another_size_are_refused():
    handle = tnpeft.attach(model_of(), "paca", match="all", r=4)
    with pytest.raises(AttachError, match="core 'places': expected one that trains, or keeps its size"):
        handle.truncate(r=2)


def test_extracting():
    model, tuned = model_of(), model_of()
    handle = tnpeft.attach(tuned, "gralora", match="all", r=2)
    with torch.no_grad():
        for core in handle.parameters():
            core.copy_(torch.randn(core.shape, generator=torch.Generator().manual_seed(3)))
    tnpeft.detach(tuned, merge=True)
    assert tnpeft.extract(model, tuned.state_dict(), "gralora", match="all", r=2).captured > 1 - 1e-6
    with pytest.raises(AttachError, match="spec 'unilora', core 'theta': expected cores that each belong to one layer"):
        tnpeft.extract(model_of(), tuned.state_dict(), "unilora", match="all")


def test_a_budget_above_what_a_spec_can_use():
    """Ranks beyond a layer's own add nothing: the smallest that trains the most is told."""
    found = tnpeft.budget("deft", model_of(), 10_000, match="all", param="rank")
    assert (found.value, found.total) == (12, 12 * (12 + 8) + 8 * (8 + 12))
    found = tnpeft.budget("c3a", model_of(), 10_000, match="all", param="b")
    assert (found.value, found.total) == (1, 2 * 96)
