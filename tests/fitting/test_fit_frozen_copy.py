"""`fit` and `extract` with `start: frozen_copy`: the copy that the update is counted from is theirs to choose."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small import bits, net, net_input, quick_if, same_bits
from torch import Tensor, nn

import tnpeft
from tnpeft.fitting import fit_adapter
from tnpeft.network import Spec, load_spec
from tnpeft.surgery import adapters_of

COPIES = [name for name in tnpeft.list_specs() if load_spec(name).start == "frozen_copy"]
LAYERS = (
    nn.Linear(24, 32),
    nn.Linear(16, 16),
    nn.Conv3d(6, 4, 3),
    nn.Conv3d(4, 6, (1, 2, 3)),
    nn.Conv2d(6, 9, (3, 2), groups=3),
    nn.ConvTranspose2d(5, 4, (2, 3)),
)
ON_LAYERS = [
    pytest.param(name, layer, rank, id=f"{name}-{tnpeft.layer_of(layer)}-rank {rank}")
    for name in COPIES
    for layer, rank in zip(LAYERS, (2, None) * 3, strict=True)
    if tnpeft.layer_of(layer).kind in load_spec(name).layers
]
X = net_input()


def random_tensor(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(layer: nn.Module, rank: int | None, seed: int = 0) -> Tensor:
    """As small as fine-tuning makes it; unfolded as it is stored, it has this rank, or any."""
    shape = layer.weight.shape
    if rank is None:
        return 1e-2 * random_tensor(shape, seed)
    product = random_tensor((shape[0], rank), seed) @ random_tensor((rank, shape[1:].numel()), seed + 1)
    return 1e-2 * product.reshape(shape)


def from_zero(name: str, place: int) -> Spec:
    """The same spec text with `start: zero` and one core, the first or the last, of zeros."""
    document = yaml.safe_load(load_spec(name).text)
    core = list(document["cores"])[place]
    fields = document["cores"][core]
    document["cores"][core] = {"legs": fields["legs"] if isinstance(fields, dict) else fields, "init": "zeros"}
    return Spec.from_yaml(yaml.safe_dump({**document, "start": "zero"}, sort_keys=False))


def is_plain(name: object) -> bool:
    """Whether all cores of a spec are its own: with maps, or the base weight as a core, zeros make another method."""
    spec = load_spec(str(name))
    return not spec.derivations and all(core.origin != "weight" for core in spec.cores)


@pytest.fixture(autouse=True)
def _weights():
    for number, layer in enumerate(LAYERS):
        with torch.no_grad():
            layer.weight.copy_(random_tensor(layer.weight.shape, 50 + number) / layer.weight[0].numel() ** 0.5)


@pytest.fixture
def _few_starts(monkeypatch: pytest.MonkeyPatch):
    """Small layers get the few starts of large ones, to save time."""
    monkeypatch.setattr(sys.modules["tnpeft.fitting.fit"], "MANY", 3)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_starts")
@pytest.mark.parametrize(("name", "layer", "rank"), [case for case in ON_LAYERS if is_plain(case.values[0])])
def test_what_the_same_graph_captures_from_zero(name: str, layer: nn.Module, rank: int | None):
    delta = update(layer, rank)
    fitted = tnpeft.fit(name, delta, layer, r=2, iterations=6)
    zero = max(tnpeft.fit(from_zero(name, place), delta, layer, r=2, iterations=6).captured for place in (0, -1))
    assert fitted.captured > zero - 0.02
    made = fitted.adapter.delta_weight().detach().double()
    assert float((made - delta).norm() / delta.norm()) == pytest.approx(fitted.error, abs=2e-3)


@pytest.mark.parametrize("name", ["quanta", "pissa"])
def test_an_update_of_rank_2(name: str):
    """From the start as it was drawn QuanTA reaches 17 %."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 128)
    fitted = tnpeft.fit(name, update(layer, 2), layer)
    assert fitted.captured > 0.999
    assert fitted.frozen_copy == "zeros"
    assert not any(core.any() for core in fitted.adapter.start.values())


@pytest.mark.usefixtures("_few_starts")
@pytest.mark.parametrize("name", [quick_if(name not in ("tenvoo_q", "lorma_pi", "quanta_4"), name) for name in COPIES])
def test_what_training_made_of_the_start_is_found_again(name: str):
    """Only the copy as it was drawn can make it."""
    layer = copy.deepcopy(LAYERS[2] if name.startswith("tenvoo") else LAYERS[0]).double()
    adapter = tnpeft.compile(load_spec(name), layer, name="here", seed=3)
    with torch.no_grad():
        for number, core in enumerate(adapter.cores.values()):
            if core.is_floating_point():  # places stay
                core.add_(0.02 * core.abs().mean() * random_tensor(core.shape, number))
    fitted = tnpeft.fit(name, adapter.delta_weight().detach(), layer, name="here", seed=3, iterations=8)
    assert fitted.captured > 0.99
    if load_spec(name).derivations and fitted.frozen_copy == "zeros":  # with maps a copy of zeros may do as well
        return
    assert fitted.frozen_copy == "drawn"
    assert same_bits(dict(fitted.adapter.start), dict(adapter.start))


@pytest.mark.usefixtures("_few_starts")
@pytest.mark.parametrize(
    ("spec", "match", "mode"),
    [
        *(quick_if(mode == "factored", "tenvoo_l", "wide", mode) for mode in ("dense", "factored", "hybrid")),
        ("quanta", "head.0", "factored"),
        ("pissa", "wide|up|head.0", "dense"),
    ],
)
def test_an_extracted_adapter_is_saved_loaded_merged_and_trained(spec: str, match: str, mode: str, tmp_path: Path):
    tuned = {
        name: tensor + 0.1 * random_tensor(tensor.shape, 8).float() if name.endswith("weight") else tensor
        for name, tensor in net().state_dict().items()
    }
    model = net()
    extraction = tnpeft.extract(model, tuned, spec, match=match, mode=mode, iterations=5)
    assert {row.frozen_copy for row in extraction.layers} == {"zeros"}
    assert {row["frozen_copy"] for row in extraction.as_dict()["layers"]} == {"zeros"}
    expected = net()
    modules = dict(expected.named_modules())
    with torch.no_grad():
        for name, adapter in adapters_of(model, "default").items():
            modules[name].weight.add_(adapter.network.scale * adapter.network_weight())
    torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-5)

    tnpeft.save(model, tmp_path / "a.safetensors")
    fresh = net()
    handle = tnpeft.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(X), model(X))
    assert not any(core.any() for adapter in adapters_of(fresh, "default").values() for core in adapter.start.values())
    tnpeft.merge(fresh)
    torch.testing.assert_close(fresh(X), model(X), rtol=1e-5, atol=1e-5)
    tnpeft.unmerge(fresh)

    optimiser = torch.optim.SGD(handle.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (fresh(X) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in handle.parameters())
        optimiser.step()
    assert losses == sorted(losses, reverse=True)


def test_an_adapter_that_was_called_before():
    """What was made of the drawn copy is forgotten."""
    model = nn.Sequential(nn.Linear(16, 16))
    tnpeft.attach(model, "quanta", match="0")
    adapter = model[0].adapters["default"]
    x = torch.randn(3, 16)
    with torch.no_grad():
        adapter.core_gate_12.mul_(2)
        model(x)
    delta = update(model[0].base, 2)
    fitted = fit_adapter(adapter, model[0].base.weight, delta)
    assert fitted.frozen_copy == "zeros"
    made = fitted.adapter.delta_weight().detach()
    assert float((made - delta).norm() / delta.norm()) == pytest.approx(fitted.error, abs=1e-5)
    torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].base.weight + made, model[0].base.bias))


def test_what_is_worse_than_nothing_leaves_cores_and_copy_alone():
    """An update of 1e-93 is no product of fp32 cores."""
    layer = nn.Linear(12, 20)
    fitted = tnpeft.fit("pissa", 1e-93 * update(layer, None), layer)
    assert (fitted.error, fitted.method, fitted.sweeps, fitted.captured) == (1.0, "start", 0, 0.0)
    assert fitted.frozen_copy == "drawn"
    assert not fitted.adapter.delta_weight().any()
    assert same_bits(bits(fitted.adapter), bits(tnpeft.compile("pissa", layer)))


SHARED = """
tnpeft: 1
name: shared
layers: any
params: {r: 3}
sizes: {o: out_channels, i: in_channels}
bond: r
cores: {down: {legs: a i k..., shared: model}, up: o a}
weight: o i k...
start: frozen_copy
"""


def test_a_copy_that_another_layer_holds():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tnpeft.attach(model, Spec.from_yaml(SHARED), match="0|1")
    adapter = model[1].adapters["default"]
    delta = update(model[1].base, 3)
    fitted = fit_adapter(adapter, model[1].base.weight, delta)
    assert (fitted.frozen_copy, fitted.error < 1e-5) == ("zeros", True)
    assert not model[0].adapters["default"].start_down.any()


MAGNITUDES = """
tnpeft: 1
name: copied
layers: any
params: {r: 3}
sizes: {o: out_channels, i: in_channels}
bond: r
cores: {down: a i k..., up: {legs: o a}}
weight: o i k...
compose: dora
start: frozen_copy
"""


@pytest.mark.parametrize("layer", LAYERS[1:5:3], ids=lambda layer: type(layer).__name__)
def test_with_magnitudes(layer: nn.Module):
    zero = MAGNITUDES.replace("frozen_copy", "zero").replace("{legs: o a}", "{legs: o a, init: zeros}")
    copied, plain = (tnpeft.fit(Spec.from_yaml(text), update(layer, None), layer) for text in (MAGNITUDES, zero))
    assert copied.captured > plain.captured - 0.02
    made = copied.adapter.delta_weight().detach().double()
    delta = update(layer, None)
    assert float((made - delta).norm() / delta.norm()) == pytest.approx(copied.error, abs=1e-4)


def test_adam_chooses_too():
    layer = LAYERS[0]
    fitted = tnpeft.fit("quanta", update(layer, 2), layer, method="adam", iterations=150)
    assert (fitted.method, fitted.sweeps, fitted.frozen_copy) == ("adam", 150, "zeros")
    assert fitted.captured > 0.5


def test_it_says_which_copy():
    layer = nn.Linear(4, 6)
    fitted = tnpeft.fit("pissa", update(layer, 1), layer, r=4)
    assert str(fitted) == (
        f"pissa on Linear(4, 6), 40 parameters: relative error {fitted.error:.3e} (100.00% of the energy) by als, "
        "sweeps 0, frozen copy of zeros"
    )
    assert str(tnpeft.fit("pissa", torch.zeros(6, 4), layer)).endswith("by start, sweeps 0, frozen copy as drawn")
    assert tnpeft.fit("lora", update(layer, 1), layer).frozen_copy is None


KRON = """
tnpeft: 1
name: copied_kron
layers: [Linear]
sizes: {oa ob: "factorize(out_features, 2)", ia ib: "factorize(in_features, 2)"}
cores: {small: oa ia, large: ob ib}
weight: (oa ob) (ia ib)
start: frozen_copy
"""


@pytest.mark.parametrize(("spec", "form"), [("pissa", "peft"), ("pissa", "lycoris"), (KRON, "lycoris")])
def test_other_libraries_take_a_fitted_adapter_as_it_is(spec: str, form: str, tmp_path: Path):
    """A copy of zeros adds nothing that they would have to hold."""

    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    model, x = layers(), torch.randn(5, 16)
    tuned = {**layers().state_dict(), "0.weight": layers()[0].weight.detach() + 0.1 * torch.randn(16, 16)}
    what = Spec.from_yaml(spec) if "\n" in spec else spec
    tnpeft.extract(model, tuned, what, match="0")
    target = tmp_path / "file.safetensors" if form == "lycoris" else tmp_path / "folder"
    tnpeft.save_foreign(model, target, form)
    again = layers()
    tnpeft.load_foreign(again, target)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    if spec == "pissa":
        assert adapters_of(again, "default")["0"].network.params["r"] == 4


def test_the_copy_that_is_asked_for():
    """A random start of few directions holds little of an update that the same graph reaches from zeros."""
    layer = nn.Conv3d(4, 6, 3)
    delta = update(layer, 2)
    fits = {
        copied: tnpeft.fit("tenvoo_l", delta, layer, method="als", iterations=20, r=2, frozen_copy=copied)
        for copied in ("zeros", "drawn", None)
    }
    assert [fitted.frozen_copy for fitted in fits.values()] == ["zeros", "drawn", "zeros"]
    assert fits["drawn"].captured < fits["zeros"].captured
    assert fits[None].captured == fits["zeros"].captured
    # From a start so large, the whole network reaches no more than its tangent space there holds.
    held = tnpeft.tangent_space("tenvoo_l", layer, r=2).captured(delta)
    assert fits["drawn"].captured == pytest.approx(held, abs=0.01)


def test_a_copy_of_another_name_is_refused():
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.fit("pissa", torch.ones(3, 4), nn.Linear(4, 3), r=1, frozen_copy="zero")
    assert (
        str(caught.value)
        == "`frozen_copy`: expected zeros or drawn, found 'zero'. Leave it out, or choose one of them."
    )
