"""`tnpeft.tangent_space`: its rank and what it holds, against Jacobians that are written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from formulas_recent import METHODS, small_params
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import chain, move
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import BindError
from tnpeft.fitting import tangent, tangent_space_of
from tnpeft.network import Network, Spec
from tnpeft.testing import networks
from tnpeft.verify.oracle import canonical, dense_weight, stored


def random_tensor(shape: tuple[int, ...], seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rank_of(jacobian: Tensor) -> int:
    """Of columns with a norm of one, or of zero."""
    norms = jacobian.norm(dim=0)
    return int(torch.linalg.matrix_rank(jacobian[:, norms > 1e-12 * norms.max()] / norms[norms > 1e-12 * norms.max()]))


def held(jacobian: Tensor, delta: Tensor) -> float:
    """The share of delta's energy in the span of the columns, by singular vectors."""
    left, values, _ = torch.linalg.svd(jacobian, full_matrices=False)
    basis = left[:, values > 1e-10 * values[0]]
    return float((basis.T @ delta.flatten()).square().sum() / delta.square().sum())


def written_out(network: Network, cores: Mapping[str, Tensor]) -> Tensor:
    """d(T)/d(trained cores), (entries, parameters), of T as one sum after the other."""
    trained = {name: core.detach() for name, core in cores.items() if isinstance(core, nn.Parameter)}

    def value(*free: Tensor) -> Tensor:
        return dense_weight(network, {**cores, **dict(zip(trained, free, strict=True))}).flatten()

    parts = torch.autograd.functional.jacobian(value, tuple(trained.values()))
    return torch.cat([part.reshape(network.layer.numel, -1) for part in parts], 1)


QUICK = ("dora", "lokr", "lora", "oft", "shira", "svdiff")  # of each kind: terms, maps, places, the weight, a magnitude


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tnpeft.list_specs()]
)
def test_shipped_specs_against_their_formulas(name: str):
    dense, (layer, *_) = METHODS[name]
    layer = copy.deepcopy(layer).double()
    spec = tnpeft.load_spec(name)
    adapter = tnpeft.compile(spec, layer, **small_params(name, spec.params))
    weight = canonical(layer.weight.detach(), adapter.network.layer)  # (out, in, k...)
    shape = tuple(weight.shape)
    fixed = {key: core for key, core in adapter.cores.items() if key not in adapter.trained}

    def delta(free: dict[str, Tensor]) -> Tensor:
        made = dense({**fixed, **free}, weight.reshape(*shape[:2], -1), shape)
        made = made.reshape(shape) if made.numel() == math.prod(shape) else made[: shape[0], : shape[1]].reshape(shape)
        if "magnitude" in free and adapter.magnitude is not None:
            summed = weight + adapter.network.scale * made
            made = (summed.flatten(1).T / summed.flatten(1).norm(dim=1) * free["magnitude"]).T.reshape(shape)
        return stored(made, adapter.network.layer).flatten()

    parts = torch.func.jacrev(delta)({key: core.detach() for key, core in adapter.trained.items()})
    jacobian = torch.cat([part.reshape(math.prod(shape), -1) for part in parts.values()], 1)
    space = tangent_space_of(adapter, layer.weight)
    assert (space.parameters, space.entries, space.counted) == (*jacobian.shape[::-1], True)
    assert space.rank == rank_of(jacobian)
    noise = random_tensor(layer.weight.shape)
    assert space.captured(noise) == pytest.approx(held(jacobian, noise), abs=1e-6)
    inside = (jacobian @ random_tensor((jacobian.shape[1],))).reshape(layer.weight.shape)
    assert space.captured(inside) == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(networks(max_cores=4), st.booleans())
def test_random_specs_at_their_start_and_later(network: Network, moved: bool):
    assume(network.compose is None and network.layer.numel <= 200 and network.num_parameters <= 100)
    layer = network.layer
    module = nn.Module()
    module.weight = nn.Parameter(random_tensor(layer.stored_shape, 3), requires_grad=False)
    adapter = tnpeft.Adapter(network, module)
    if moved:
        move(adapter, 1.0)
    weight = canonical(module.weight.detach(), layer)
    cores = {**adapter.cores, **{c.name: weight.reshape(c.shape) for c in network.cores if c.origin == "weight"}}
    space = tangent_space_of(adapter.double(), module.weight)
    assert space.parameters == sum(core.numel() for core in adapter.parameters())
    if not adapter.trained:
        assert (space.rank, space.counted) == (0, True)
        return
    jacobian = written_out(network, {**cores, **adapter.double().cores})
    assert jacobian.isfinite().all()
    assert space.rank == (rank_of(jacobian) if jacobian.any() else 0)


def test_the_paper_s_start_moves_in_few_directions():
    torch.manual_seed(0)
    space = tnpeft.tangent_space("tenvoo_l", nn.Conv3d(6, 4, 3), r=2)
    assert (space.parameters, space.entries, space.rank) == (168, 648, 102)


@pytest.mark.slow
def test_the_number_of_the_paper_s_layer():
    space = tnpeft.tangent_space("tenvoo_l", nn.Conv3d(32, 32, 3), r=4)
    assert (space.parameters, space.entries, space.rank) == (1920, 27648, 1686)
    assert f"{space.share:.1%}" == "6.1%"
    noise = [space.captured(random_tensor((32, 32, 3, 3, 3), seed)) for seed in range(2)]
    assert all(share == pytest.approx(space.share, abs=0.005) for share in noise)


def test_lora_from_zero_moves_one_core_then_both():
    layer = nn.Linear(9, 7)
    adapter = tnpeft.compile("lora", layer, r=2)
    start = tangent_space_of(adapter, layer.weight)
    assert (start.parameters, start.live, start.rank, start.entries) == (2 * (9 + 7), 2 * 7, 2 * 7, 63)
    down = adapter.cores["down"].detach().double()
    assert start.captured(random_tensor((7, 2)) @ down) == pytest.approx(1)
    assert start.captured(torch.eye(7, 9).double()) < 0.9
    move(adapter)
    assert tangent_space_of(adapter, layer.weight).rank == 2 * (9 + 7 - 2)


def test_blocks_do_not_change_what_is_counted(monkeypatch: pytest.MonkeyPatch):
    """Each output channel by itself, or all together."""
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 6, 3)
    adapter = tnpeft.compile("locon_tucker", layer, r=3)
    delta = random_tensor((6, 5, 3, 3))
    apart = tangent_space_of(adapter, layer.weight)
    assert [blocks.columns.shape for blocks in apart._blocks] == [(6, 3)]
    monkeypatch.setattr(tangent, "_slices_met", lambda jacobian, axis, live, *rest: torch.ones(1, len(live)) > 0)
    whole = tangent_space_of(adapter, layer.weight)
    assert [blocks.columns.shape for blocks in whole._blocks] == [(1, 18)]
    assert (apart.rank, apart.captured(delta)) == (whole.rank, pytest.approx(whole.captured(delta)))


def test_what_is_too_large_is_bounded(monkeypatch: pytest.MonkeyPatch):
    layer = nn.Linear(12, 10)
    adapter = tnpeft.compile("pissa", layer, r=3)
    exact = tangent_space_of(adapter, layer.weight)
    monkeypatch.setattr(tangent, "LARGEST_SIDE", 8)
    bound = tangent_space_of(adapter, layer.weight)
    assert (exact.counted, exact.rank) == (True, 3 * (12 + 10 - 3))
    assert (bound.counted, bound.rank) == (False, 3 * (12 + 10))
    delta = random_tensor((10, 12))
    assert bound.captured(delta) == pytest.approx(exact.captured(delta), abs=1e-6)
    monkeypatch.setattr(tangent, "LARGEST_WORK", 1)
    assert tangent_space_of(adapter, layer.weight).rank == 66


def test_the_adapter_and_its_model_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    text = chain().text.replace("middle: a b", "middle: {legs: a b, shared: model}")
    handle = tnpeft.attach(model, Spec.from_yaml(text), match="all")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = (
        tangent_space_of(adapter, model[int(name)].base.weight) for name, adapter in handle.adapters.items()
    )
    assert first.parameters == second.parameters == 18 + 9 + 18  # a shared core counts for each layer
    assert first.rank == second.rank == 3 * (6 + 6 - 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_delta_is_checked():
    space = tnpeft.tangent_space("lora", nn.Linear(4, 3), r=1)
    with pytest.raises(BindError) as caught:
        space.captured(torch.ones(4, 3))
    assert str(caught.value) == (
        "delta: expected the shape of the layer's weight, (3, 4), found (4, 3). "
        "Pass the tuned weight minus the base weight, as the layer stores them."
    )
    assert space.captured(torch.zeros(3, 4)) == 0.0
