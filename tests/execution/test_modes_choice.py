"""Choosing an execution mode: by the cost model, by timing, and by what was chosen before."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import chain, move
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tnpeft
from tnpeft.adapters import Adapter
from tnpeft.errors import AttachError, TnpeftError
from tnpeft.execution import AdaptedLayer, autotune
from tnpeft.execution.calls import CALLS as REMEMBERED
from tnpeft.execution.calls import Calls
from tnpeft.execution.modes import summed_weight
from tnpeft.execution.site import Site
from tnpeft.network import Layer, Network
from tnpeft.planning import Call, nominal_call
from tnpeft.planning.device_model import DEVICE_MODELS
from tnpeft.schedule import feasible_plans, plan, predict

DEFAULT = "default"
TRAINING, INFERENCE = "cpu, batch 2, 5x6 -> 5x6", "cpu, batch 2, 5x6 -> 5x6, inference"


def adapted(autotune: bool = True, mode: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 1, groups=1))
    tnpeft.attach(model, chain(), match="0", mode=mode, autotune=autotune)
    move(adapter_of(model))
    return model


def layer_of(model: nn.Module) -> AdaptedLayer:
    (layer,) = (module for module in model.modules() if isinstance(module, AdaptedLayer))
    return layer


def adapter_of(model: nn.Module) -> Adapter:
    return layer_of(model).adapter(DEFAULT)


def calls_of(model: nn.Module) -> Calls:
    return layer_of(model).calls(DEFAULT)


def chosen_of(model: nn.Module) -> str | None:
    return layer_of(model).chosen(DEFAULT)


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed))


class Clock:
    """Seconds for each mode in place of running it; what was asked is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.asked: list[str] = []

        def trial(_self: object, running: object) -> float:
            self.asked.append(running.mode)
            return seconds[running.mode]

        monkeypatch.setattr(autotune._Trial, "__call__", trial)


@pytest.fixture
def hybrid_wins(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, dense=3.0, hybrid=1.0, factored=2.0)


def network() -> Network:
    return tnpeft.load_spec("lora").bind("Conv2d", in_channels=64, out_channels=128, kernel_size=3)


# The cost model


@pytest.mark.parametrize("side", [2, 8, 32])
@pytest.mark.parametrize("spec", ["lora", "tenvoo_l"])
def test_auto_takes_the_least_predicted_time_and_counts_what_is_saved(spec: str, side: int) -> None:
    bound = tnpeft.load_spec(spec).bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3)
    call = nominal_call(bound.layer, 1, (side,) * 3)
    plans = {mode: plan(bound, mode, call) for mode in ("dense", "factored", "hybrid")}
    costs = {mode: predict(found, call) for mode, found in plans.items()}
    saved = DEVICE_MODELS["cpu"].saved * 1e-9
    counted = {mode: cost.step + saved * plans[mode].saved_bytes for mode, cost in costs.items()}
    assert counted[plan(bound, "auto", call).mode] == min(counted.values())
    alone = plan(bound, "auto", call, inference=True)
    assert costs[alone.mode].forward == min(costs[mode].forward for mode in ("dense", "factored"))


def test_without_autotune_nothing_is_timed_or_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = adapted(autotune=False)
    model(image())
    adapter = adapter_of(model)
    call = nominal_call(adapter.network.layer, 2, (5, 6))
    assert calls_of(model).last.mode == plan(adapter.network, "auto", call).mode
    with torch.no_grad():
        model(image())
        assert calls_of(model).last.mode == plan(adapter.network, "auto", call, inference=True).mode
    assert adapter.choices == {}
    assert clock.asked == []


# Timing


def test_the_quickest_mode_is_taken_and_remembered(hybrid_wins: Clock) -> None:
    model = adapted()
    adapter = adapter_of(model)
    for _ in range(2):
        model(image())
    assert adapter.choices == {TRAINING: "hybrid"}
    assert calls_of(model).last.mode == chosen_of(model) == "hybrid"
    # A first run of each, one round, and dense and factored are hopeless.
    assert hybrid_wins.asked == ["dense", "hybrid", "factored"] * 2
    assert "runs={default: hybrid}" in repr(model)
    report = tnpeft.Handle(model, DEFAULT).report()
    assert (report.layers[0].mode, report.layers[0].chosen, report.layers[0].runs) == ("auto", "hybrid", "auto: hybrid")
    assert "auto: hybrid" in str(report)


def test_close_modes_take_turns_and_their_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, dense=1.1, hybrid=1.0, factored=1.2)
    monkeypatch.setattr(autotune, "SECONDS", math.inf)
    model = adapted()
    model(image())
    assert clock.asked == ["dense", "hybrid", "factored"] * (1 + autotune.ROUNDS)
    assert adapter_of(model).choices == {TRAINING: "hybrid"}
    monkeypatch.setattr(autotune, "SECONDS", 0.0)
    model(image()[:1])
    assert len(clock.asked) == 3 * (1 + autotune.ROUNDS) + 3 * (1 + autotune.ENOUGH)


def test_calls_of_many_sizes_are_forgotten_but_not_what_was_chosen(hybrid_wins: Clock) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    tnpeft.attach(model, chain(), match="0", mode="auto", autotune=True)
    adapter = adapter_of(model)
    model(torch.randn(1, 6))
    first = calls_of(model).last
    for rows in range(2, REMEMBERED + 3):
        model(torch.randn(rows, 6))
        model(torch.randn(2, 6))  # used all the time
    assert len(calls_of(model).known) == REMEMBERED
    assert [shape[0] for shape, *_ in calls_of(model).known] == [*range(4, REMEMBERED + 3), 2]
    asked, choices = list(hybrid_wins.asked), dict(adapter.choices)
    assert choices == {f"cpu, {rows} rows": "hybrid" for rows in range(1, REMEMBERED + 3)}
    model(torch.randn(1, 6))
    # Planned anew, not timed, and by the same programs, which is how groups know their calls.
    assert calls_of(model).last == first
    assert calls_of(model).last.clusters is first.clusters
    assert (hybrid_wins.asked, adapter.choices) == (asked, choices)


def test_calls_without_gradients_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, dense=2.0, factored=1.0)
    model = adapted()
    with torch.no_grad():
        model(image())
    assert clock.asked == ["dense", "factored"] * 2
    for core in adapter_of(model).parameters():
        core.requires_grad_(False)
    model(image())
    with torch.inference_mode():
        model(image())
    assert adapter_of(model).choices == {INFERENCE: "factored"}


def test_modes_for_which_there_is_no_memory_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(site: Site, acting: object, running: object, x: Tensor) -> Tensor:
        if running.mode == "hybrid":
            return site.call_base(site.base, x, summed_weight(site, site.base.weight, False))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(autotune, "run", run)
    model = adapted()
    model(image())
    assert adapter_of(model).choices == {TRAINING: "hybrid"}


CALLS: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (lambda: nn.Linear(6, 4), (2, 3, 6), "cpu, 6 rows"),
    (lambda: nn.Linear(6, 4), (6,), "cpu, 1 rows"),
    (lambda: nn.Conv1d(6, 4, 3, 2), (6, 9), "cpu, batch 1, 9 -> 4"),
    (lambda: nn.ConvTranspose2d(6, 4, 3, 2), (5, 6, 4, 3), "cpu, batch 5, 4x3 -> 9x7"),
    (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (1, 6, 4, 3), "cpu, batch 1, 6x5 -> 4x3"),
]


@pytest.mark.parametrize(("make", "shape", "name"), CALLS, ids=[name for *_, name in CALLS])
def test_choices_name_the_call_in_words(make, shape, name, hybrid_wins: Clock) -> None:
    model = nn.Sequential(make())
    tnpeft.attach(model, chain(), match="0", mode="auto", autotune=True)
    model(torch.randn(shape))
    assert adapter_of(model).choices == {name: "hybrid"}


def test_a_layer_that_cannot_be_factored_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2))
    tnpeft.attach(model, chain(), match="0", mode="auto", autotune=True)
    model(torch.randn(1, 4, 3, 3))
    assert adapter_of(model).choices == {"cpu, batch 1, 3x3 -> 3x3": "dense"}
    assert clock.asked == []


# What timing leaves alone


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("start", ["frozen_copy", "zero"])
def test_timing_leaves_everything_as_it_was(start: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    other = copy.deepcopy(model)
    for one, mode in ((model, "auto"), (other, "dense")):
        tnpeft.attach(one, chain(start), match=".", mode=mode, autotune=mode == "auto")
    calls: list[str] = []
    handles = [core.register_hook(lambda _: calls.append("core")) for core in model.parameters() if core.requires_grad]
    model[1].register_forward_hook(lambda *_: calls.append("layer"))
    x, y = image().requires_grad_(), image().requires_grad_()
    x.register_hook(lambda _: calls.append("x"))
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = torch.is_autocast_cache_enabled()
        found, expected = model(x), other(y)
        assert torch.is_autocast_cache_enabled() == before
    assert calls == ["layer"]
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(len(module.choices) == 1 for module in model.modules() if isinstance(module, Adapter))
    found.square().sum().backward()
    expected.square().sum().backward()
    assert sorted(calls) == ["core"] * len(handles) + ["layer", "x"]
    tolerance = {"rtol": 0.1, "atol": 0.1} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(x.grad, y.grad, **tolerance)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if one.grad is not None and not autocast:
            torch.testing.assert_close(one.grad, two.grad, **tolerance)


def test_shared_cores_and_several_adapters_are_timed() -> None:
    text = chain().text.replace("left:   o a", "left: {legs: o a, shared: model}")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match=".", mode="auto", autotune=True)
    tnpeft.attach(model, chain(), match=".", name="other", mode="auto", autotune=True)
    tnpeft.activate(model, "default")
    model(torch.randn(2, 4)).sum().backward()
    for layer in model:
        assert list(layer.adapter("default").choices) == ["cpu, 2 rows"]
        assert layer.adapter("other").choices == {}
    assert all(core.grad is not None for core in tnpeft.Handle(model, "default").parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_take_what_is_known_or_the_cost_model(reentrant: bool, monkeypatch) -> None:
    Clock(monkeypatch, dense=3.0, hybrid=1.0, factored=2.0)
    model = adapted()
    x = image().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    if reentrant:  # which looks like inference, and then like training
        assert set(adapter_of(model).choices) == {TRAINING, INFERENCE}
        return
    assert adapter_of(model).choices == {}
    taken = calls_of(model).last.mode
    # Forward and again for the backward pass must be the same, so that a call outside of it changes nothing.
    out = checkpoint(model, x, use_reentrant=False)
    model(x)
    out.sum().backward()
    assert adapter_of(model).choices == {}
    assert calls_of(model).last.mode == taken
    known = adapted()
    known(x)
    checkpoint(known, x, use_reentrant=False).sum().backward()
    assert adapter_of(known).choices == {TRAINING: "hybrid"}
    assert chosen_of(known) == "hybrid"


def test_nothing_is_timed_where_it_would_be_recorded(hybrid_wins: Clock) -> None:
    assert autotune.can_be_timed(image())
    assert not autotune.can_be_timed(image().to("meta"))
    with torch._subclasses.FakeTensorMode() as mode:
        assert not autotune.can_be_timed(image())
    assert not autotune.can_be_timed(mode.from_tensor(image()))
    with FlopCounterMode(display=False):
        assert not autotune.can_be_timed(image())
    assert not torch.func.vmap(lambda row: torch.tensor(autotune.can_be_timed(row)))(image()).any()
    model = adapted()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image()), model(image()))
    torch._dynamo.reset()
    assert hybrid_wins.asked.count("hybrid") == 2  # by the model that is not compiled


# Choices made before


def pickled(model: nn.Module, _: Path) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def saved(model: nn.Module, folder: Path) -> nn.Module:
    tnpeft.save(model, folder / "adapter.safetensors")
    fresh = copy.deepcopy(model)
    tnpeft.detach(fresh)
    tnpeft.load(fresh, folder / "adapter.safetensors")
    return fresh


COPIES = {"deepcopy": lambda model, _: copy.deepcopy(model), "pickle": pickled, "file": saved}


@pytest.mark.parametrize("name", COPIES)
def test_choices_travel_and_are_not_made_again(name: str, tmp_path: Path, hybrid_wins: Clock) -> None:
    model = adapted()
    expected = model(image())
    again = COPIES[name](model, tmp_path)
    adapter = adapter_of(again)
    assert adapter.mode == "auto"
    assert adapter.choices == {TRAINING: "hybrid"}
    assert adapter.choices is not adapter_of(model).choices
    assert adapter.autotune == (name != "file")
    hybrid_wins.asked.clear()
    assert torch.equal(again(image()), expected)
    assert chosen_of(model) == "hybrid"
    assert hybrid_wins.asked == []


@pytest.mark.parametrize("mode", ["dense", "factored", "hybrid"])
def test_known_choices_overrule_the_cost_model(mode: str) -> None:
    model = adapted(autotune=False)
    adapter_of(model).choices[TRAINING] = mode
    model(image())
    assert calls_of(model).last.mode == mode


def test_a_choice_that_the_layer_has_no_plan_for_is_dense() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    bound = chain().bind(layer)
    model = nn.Sequential(layer)
    adapter = Adapter(bound, layer, mode="auto", choices={"cpu, batch 1, 3x3 -> 3x3": "factored"})
    tnpeft.surgery.install(model, DEFAULT, {"0": adapter})
    model(torch.randn(1, 4, 3, 3))
    assert calls_of(model).last.mode == "dense"


def test_choices_that_are_none() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TnpeftError) as caught:
        Adapter(chain().bind(layer), layer, choices={"cpu, 1 rows": "auto"})
    assert str(caught.value) == (
        "the mode chosen for 'cpu, 1 rows': expected one of `dense`, `factored`, `hybrid`, found `auto`. "
        "Leave it out: it is chosen again."
    )


@pytest.mark.parametrize("mode", ["dense", "factored", "hybrid", "auto"])
def test_modes_travel_in_files(mode: str, tmp_path: Path) -> None:
    model = adapted(False, mode)
    tnpeft.save(model, tmp_path / "adapter.safetensors")
    tnpeft.detach(model)
    tnpeft.load(model, tmp_path / "adapter.safetensors")
    assert adapter_of(model).mode == mode
    assert chosen_of(model) is None
    assert f"mode={mode}\n" in repr(model) or f"mode={mode})" in repr(model)


# What plans say


def test_a_factored_plan_says_what_each_link_does() -> None:
    call = nominal_call(Layer("Conv2d", 64, 128, (3, 3)), 2, (8, 8))
    found = plan(network(), "factored", call)
    assert str(found) == (
        "lora on Conv2d(64, 128, 3x3): factored, 2 links, batch 2, 8x8 -> 8x8, 721 kFLOP, largest 16.4 kelements\n"
        "  link 1: down, collects k.0 k.1: (i) 64 -> (r) 4 channels  590 kFLOP\n"
        "  link 2: up: (r) 4 -> (o) 128 channels  131 kFLOP"
    )
    assert found.flops == 2 * 2 * 64 * (64 * 4 * 9 + 4 * 128)
    assert found.largest_intermediate == max(2 * 64 * 4 * 9, 2 * 64 * 128)


def test_clusters_and_links_are_counted() -> None:
    bound = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3)
    found = plan(bound, "factored")
    assert found.flops == sum(step.flops for step in found.steps) + sum(link.flops for link in found.links)
    cores = [core for link in found.links for core in found.cores_of(link)]
    assert sorted(cores) == sorted(core.name for core in bound.cores)


def test_a_hybrid_plan_contracts_the_clusters_of_its_chain() -> None:
    bound = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3)
    found = plan(bound, "hybrid")
    chain_plan, dense = found.chain, plan(bound)
    assert found.steps[: len(chain_plan.steps)] == chain_plan.steps
    assert found.steps[-1].elements == bound.layer.numel
    assert len(found.path) == len(dense.path) == len(bound.cores) - 1
    assert found.flops == sum(step.flops for step in found.steps) >= dense.flops
    first, *rest = str(found).splitlines()
    assert first.startswith("tenvoo_l on Conv3d(64, 128, 3x3x3): hybrid, 9 steps, ")
    assert rest[9].startswith("backward, tenvoo_l on Conv3d(64, 128, 3x3x3): factored, ")
    assert all(line.startswith("  link ") for line in rest[10:])


def test_sums_are_planned_term_by_term() -> None:
    spec = tnpeft.Spec.from_yaml(
        "tnpeft: 1\nname: two\nlayers: [Linear]\nsizes: {o: out_channels, i: in_channels}\nbond: 2\n"
        "cores: {a: o r, b: {legs: r i, init: zeros}, c: o s, d: {legs: s i, init: zeros}}\n"
        "terms: [{cores: [a, b], weight: o i}, {cores: [c, d], weight: o i}]\nstart: zero\n"
    )
    bound = spec.bind("Linear", in_features=6, out_features=4)
    call = Call(5)
    factored, hybrid = plan(bound, "factored", call), plan(bound, "hybrid", call)
    assert factored.flops == 2 * (2 * 5 * 2 * (6 + 4)) + 2 * 5 * 4
    assert hybrid.flops == plan(bound).flops
    assert str(factored).splitlines()[0] == (
        "term 1: two on Linear(6, 4): factored, 2 links, 5 rows, 200 FLOP, largest 20 elements"
    )
    assert [line.split(":")[0] for line in str(hybrid).splitlines() if not line.startswith(" ")] == [
        "term 1",
        "term 2",
        "backward, term 1",
        "backward, term 2",
    ]


def test_a_plan_that_fell_back_says_why() -> None:
    bound = tnpeft.load_spec("lora").bind("Conv2d", in_channels=4, out_channels=4, kernel_size=3, groups=2)
    why = "groups=2: each group has its own input"
    assert plan(bound, "factored").reason == plan(bound, "auto").reason == why
    assert str(plan(bound, "hybrid")).startswith(f"lora on Conv2d(4, 4, 3x3, groups=2): dense ({why}), 1 step, ")
    summed = tnpeft.load_spec("glora").bind("Linear", in_features=64, out_features=128)
    assert str(plan(summed, "factored")).splitlines()[0] == "dense: a core is the base weight itself"


def test_an_unknown_mode_is_refused_before_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises((AttachError, TnpeftError)):
        tnpeft.attach(model, "lora", match="0", mode="fast")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_takes_no_mode_whose_copies_are_gigabytes(device: str) -> None:
    layer = nn.Conv3d(32, 32, 3, padding=1, device="meta")
    bound = tnpeft.load_spec("lora").bind(layer, r=4)

    def modes(side: int, inference: bool = False) -> list[str]:
        call = replace(nominal_call(bound.layer, space=(side,) * 3), device=device)
        return [found.mode for found in feasible_plans(bound, call, inference)]

    assert modes(32) == ["dense", "hybrid", "factored"]
    assert modes(32, True) == ["dense", "factored"]
    assert modes(192) == modes(192, True) == ["dense"]
    large = replace(nominal_call(bound.layer, space=(192,) * 3), device=device)
    dense, hybrid = plan(bound, "dense", large), plan(bound, "hybrid", large)
    voxels = 192**3
    assert hybrid.peak_bytes - dense.peak_bytes > 2 * 4 * voxels * (32 + 32)
    assert plan(bound, "auto", large).mode == "dense"
    assert hybrid.mode == "hybrid"  # whoever asks for it by name gets it
