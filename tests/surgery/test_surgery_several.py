"""Several adapters over one base: each is what it would be alone; all are switched, merged and taken off by name."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from allocation import Allocations
from small import CHAIN, attach, bits, net, net_input, refused, same_bits, train
from torch import Tensor, nn

import tnpeft
from tnpeft import Spec
from tnpeft.execution import AdaptedLayer
from tnpeft.surgery import (
    activate,
    adapters_of,
    detach,
    disabled,
    merge,
    names_of,
    plain_modules,
    scales_of,
    statistics_of,
    trained_of,
    unmerge,
)

X = net_input()
MODES = ("auto", "dense", "hybrid", "factored")


def two(names: tuple[str, str] = ("a", "b")) -> nn.Module:
    """A net with two trained adapters, the second of which acts; their layers and what else they train overlap."""
    model = net()
    attach(model, name=names[0])
    train(model, X)
    attach(model, tnpeft.load_spec("lora"), names[1], ("first", "head.2"), ("norm.weight", "head.2.bias"))
    train(model, X)
    return model


class Volumes(nn.Module):
    """Convolutions of one small volume, whose gradients adapted layers make by other kernels than torch's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv3d(4, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 8, 3, padding=1)
        self.third = nn.Conv3d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("mode", MODES)
def test_training_one_does_not_depend_on_where_others_stand(mode):
    alone, model = Volumes(), Volumes()
    x = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    tnpeft.attach(model, "tenvoo_l", match="second|third", name="ppmi", r=2)
    for each in (alone, model):
        tnpeft.attach(each, "lora", match="first|second", train={"bias": "adapted"}, mode=mode, name="adni")
    assert train(alone, x, steps=3) == train(model, x, steps=3)
    assert torch.equal(alone(x), model(x))
    found, expected = (dict(tnpeft.Handle(each, "adni").named_parameters()) for each in (model, alone))
    assert same_bits(found, expected)


def test_sums_do_not_depend_on_the_order_of_names():
    model = two()
    activate(model, {"a": 0.3, "b": 0.7})
    expected = model(X)
    activate(model, {"b": 0.7, "a": 0.3})
    assert torch.equal(model(X), expected)
    assert list(scales_of(model)) == ["a", "b"]


@pytest.mark.parametrize("merged", [False, True])
def test_a_switch_under_inference_mode_leaves_a_model_that_trains(merged):
    model, other = two(), two()
    for each, context in ((model, torch.inference_mode()), (other, torch.no_grad())):
        with context:
            activate(each, {"a": 1.0, "b": 0.5})
            each(X)
            if merged:
                detach(each, merge=True, name="b")
    assert train(model, X) == train(other, X)
    assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())


def test_adapters_are_in_the_mode_of_their_layers():
    for training in (False, True):
        model = net().train(training)
        for name in ("a", "b"):
            attach(model, name=name)
        assert {module.training for module in model.modules()} == {training}


def test_scales_of_zero_and_below():
    model = two()
    base = net()(X)
    activate(model, {"a": 0.0, "b": 0})
    assert torch.equal(model(X), base)
    assert scales_of(model) == {"a": 0.0, "b": 0.0}
    activate(model, {"a": 1.0, "b": 0.0})
    only_a = model(X)
    activate(model, "a")
    assert torch.equal(model(X), only_a)
    activate(model, {"a": -1.0})
    there = {name: layer.weight for name, layer in layers(model).items()}
    activate(model, "a")
    for name, layer in layers(model).items():
        torch.testing.assert_close(there[name] + layer.weight, 2 * layer.base.weight)


def same_values(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same bits; in which order they stand tells only which switch came last."""
    return same_bits(dict(sorted(left.items())), dict(sorted(right.items())))


def layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def test_switching_copies_nothing_and_allocates_nothing():
    model = two()
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters() if name.endswith("base.weight")}
    with Allocations() as counted:
        for scales in ("a", "b", {}, {"a": 1.0}, {"b": 1.0}):
            activate(model, scales)
        assert counted.peak == 0
        activate(model, {"a": 1.0, "b": 0.5})  # `norm.weight` is of both, `head.2.bias` at 0.5
        statistics = sum(tensor.nbytes for tensor in statistics_of(model, "a").values())
        assert counted.alive == statistics + model.norm.weight.nbytes + model.head[2].bias.nbytes
        activate(model, "a")
        assert counted.alive == 0
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters() if name in places} == places


def test_a_second_adapter_takes_what_it_trains_and_no_more():
    model = net()
    attach(model, name="a")
    with Allocations() as counted:
        attach(model, name="b")
    own = [tensor for adapter in adapters_of(model, "b").values() for tensor in adapter.state_dict().values()]
    own += [*trained_of(model, "b").values(), *statistics_of(model, "b").values()]
    assert counted.alive == sum(tensor.nbytes for tensor in own)


@pytest.fixture
def made(monkeypatch) -> Counter[str]:
    """How often calls are planned, and programs built for them."""
    counts: Counter[str] = Counter()
    from tnpeft.execution import dispatch

    def spy(name: str) -> None:
        original = getattr(dispatch, name)

        def counted(*arguments):
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(dispatch, name, counted)

    for name in ("plan", "feasible_plans", "best_plan", "build_chain", "build_clusters", "build_cluster_merge"):
        spy(name)
    return counts


@pytest.mark.parametrize("mode", MODES[:1] + MODES[2:])
def test_a_switch_plans_nothing(mode, made):
    model = Volumes()
    for name, spec in (("a", "lora"), ("b", "tenvoo_l")):
        tnpeft.attach(model, spec, match="first|second", name=name, mode=mode, r=2)
        train(model, x := torch.randn(1, 4, 6, 6, 6))
    assert made["build_chain" if mode != "auto" else "best_plan"] == 4
    made.clear()
    for scales in ("a", "b", {"a": 1.0, "b": 0.5}, "a", {}, "b"):
        activate(model, scales)
        train(model, x, steps=1) if scales else model(x)
    assert not made


@pytest.mark.slow
def test_a_compiled_model_has_one_graph_for_each_set_of_scales():
    model, graphs = two(), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    for number, scales in enumerate(("a", "b", {"a": 1.0, "b": 0.5}), start=1):
        activate(model, scales)
        torch.testing.assert_close(compiled(X), model(X))
        assert len(graphs) == number
    for scales in ("a", {"a": 1.0, "b": 0.5}, "b", "a"):
        activate(model, scales)
        torch.testing.assert_close(compiled(X), model(X))
    assert len(graphs) == 3


def test_optimisers_keep_their_parameters_through_every_switch():
    model = net()
    optimisers, wanted = {}, {}
    for name in ("a", "b"):
        attach(model, name=name)
        wanted[name] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimisers[name] = torch.optim.AdamW(wanted[name], 1e-2)
    for name in ("a", "b", "a", "b"):
        activate(model, {"a": 0.5, "b": 0.5})
        activate(model, name)
        assert {*map(id, wanted[name])} == {id(p) for p in model.parameters() if p.requires_grad}
        before, others = [p.clone() for p in wanted[name]], [p.clone() for n in wanted if n != name for p in wanted[n]]
        optimisers[name].zero_grad()
        (model(X) - 1).square().mean().backward()
        optimisers[name].step()
        assert not any(torch.equal(*pair) for pair in zip(before, wanted[name], strict=True))
        now = [p for n in wanted if n != name for p in wanted[n]]
        assert all(torch.equal(*pair) for pair in zip(others, now, strict=True))


def test_gradients_of_several_may_be_gathered_before_a_step():
    model = net()
    gathered = []
    for name in ("a", "b"):
        attach(model, name=name)
        (model(X) - 1).square().mean().backward()
        gathered += [parameter for parameter in model.parameters() if parameter.requires_grad]
    activate(model, {})
    assert all(parameter.grad is not None for parameter in gathered)


# What could mix them up.


ODD = ("a", "a__x", "original", "keys", "type", "0", "base", "merged")


class Odd(nn.Linear):
    """A layer whose parameters' names could run into those of adapters."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.x__bias = nn.Parameter(torch.zeros(4))


def test_names_that_look_alike_share_nothing(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Odd(), nn.Linear(4, 4))
    start = {"0.bias": model[0].bias.clone(), "0.x__bias": model[0].x__bias.clone()}
    for number, name in enumerate(ODD):
        tnpeft.attach(model, "lora", match="1", train={"also": ["bias$"]}, name=name)
        with torch.no_grad():
            for copy_ in trained_of(model, name).values():
                copy_.fill_(number + 1)
        tnpeft.save(model, tmp_path / name, name)
    assert names_of(model) == ODD
    for number, name in enumerate(ODD):
        activate(model, name)
        assert (model[0].bias == number + 1).all()
        assert (model[0].x__bias == number + 1).all()
        with disabled(model):
            assert torch.equal(model[0].bias, start["0.bias"])
    for name in ODD:
        detach(model, name=name)
    assert same_bits({key: model.state_dict()[key] for key in start}, start)
    for number, name in enumerate(ODD):
        tnpeft.load(model, tmp_path / name)
        assert (model[0].x__bias == number + 1).all()


def test_a_state_dict_knows_no_switch():
    model = two()
    there = copy.deepcopy(model)
    for scales in ({"a": 1.0}, {"a": 0.5, "b": 2.0}, {}):
        activate(there, scales)
        assert list(there.state_dict()) == list(model.state_dict())
        here = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in here.parameters():
                parameter.add_(1)
        here.load_state_dict(there.state_dict())
        assert same_values(bits(here), bits(there))
        activate(here, scales)
        assert torch.equal(here(X), there(X))


def test_two_adapters_of_one_spec_share_no_core():
    spec = Spec.from_yaml(CHAIN.replace("middle: a b", "middle: {legs: a b, shared: model}"))
    model = net()
    held = []
    for name in ("a", "b"):
        tnpeft.attach(model, spec, match=["first", "wide", "head.0"], name=name)
        held.append({id(adapter.cores["middle"]) for adapter in adapters_of(model, name).values()})
        train(model, X)
    assert [len(own) for own in held] == [1, 1]
    assert held[0] != held[1]
    activate(model, {"a": 1.0, "b": 1.0})
    both = copy.deepcopy(model)(X)
    assert torch.equal(both, model(X))
    detach(model, name="a")
    train(model, X)
    held[1] = {id(adapter.cores["middle"]) for adapter in adapters_of(model, "b").values()}
    assert len(held[1]) == 1


def test_timed_choices_belong_to_their_adapter(tmp_path):
    model = Volumes()
    x = torch.randn(1, 4, 6, 6, 6)
    for name, tuned in (("a", True), ("b", False)):
        tnpeft.attach(model, "lora", match="second", name=name, autotune=tuned)
        train(model, x)
    found = {name: dict(adapters_of(model, name)["second"].choices) for name in ("a", "b")}
    assert found["b"] == {}
    assert len(found["a"]) == 1
    for name in ("a", "b"):
        tnpeft.save(model, tmp_path / name, name)
        fresh = Volumes()
        tnpeft.load(fresh, tmp_path / name)
        assert adapters_of(fresh, name)["second"].choices == found[name]


@pytest.mark.parametrize("spec", ["dora", "pissa"])
def test_cores_made_of_the_weight_are_made_of_the_base_s_own(spec):
    expected, model = net(), net()
    tnpeft.attach(expected, spec, match="head.0", name="b")
    tnpeft.attach(model, "lora", match="up", train={"also": [r"head\.0\.weight"]}, name="a")
    train(model, X, rate=1.0)
    tnpeft.attach(model, spec, match="head.0", name="b")
    own, others = (adapters_of(each, "b")["head.0"].state_dict() for each in (model, expected))
    assert same_bits(own, others)
    assert torch.equal(model(X), net()(X))


@pytest.mark.parametrize("spec", ["dora", "hira", "ia3", "glora", "pissa"])
def test_updates_made_of_the_weight_add_up_with_a_layer_that_trains_as_a_whole(spec):
    model = net().double()
    own = model.head[0].weight.detach().clone()
    tnpeft.attach(model, "lora", match="up", train={"also": [r"head\.0\.weight"]}, name="a")
    train(model, X.double(), rate=1.0)
    tnpeft.attach(model, spec, match="head.0", name="b")
    train(model, X.double(), rate=1.0)
    changes = []
    for scales in ({"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": -0.5, "b": 2.0}):
        activate(model, scales)
        changes.append(model.head[0].weight.detach() - own)
    a, b, both, scaled = changes
    assert min(a.abs().max(), b.abs().max()) > 1e-3
    torch.testing.assert_close(both, a + b)
    torch.testing.assert_close(scaled, 2 * b - a / 2)
    merge(model)
    torch.testing.assert_close(model.head[0].weight - own, scaled)


# Merging one for a time.


def test_merge_by_name_lets_one_act_until_unmerge():
    model = two()
    outputs = {}
    for name in ("a", "b"):
        activate(model, name)
        outputs[name] = model(X)
    activate(model, {"a": 1.0, "b": 0.5})
    both, values = model(X), bits(model)
    for _ in range(2):
        merge(model, name="a")
    assert scales_of(model) == {"a": 1.0}
    assert torch.equal(model(X), outputs["a"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unmerge(model)
    assert scales_of(model) == {"a": 1.0, "b": 0.5}
    assert torch.equal(model(X), both)
    assert same_values(bits(model), values)


def test_merge_by_name_takes_the_scale_at_which_it_acts():
    model = two()
    activate(model, {"a": 0.25})
    expected = model(X)
    activate(model, {"b": 2.0, "a": 0.25})
    merge(model, "a")
    assert scales_of(model) == {"a": 0.25}
    assert torch.equal(model(X), expected)
    unmerge(model)
    activate(model, {})
    merge(model, "a")
    assert scales_of(model) == {"a": 1.0}
    detach(model, name="b")
    unmerge(model)
    assert scales_of(model) == {}
    assert torch.equal(model(X), net()(X))


def test_what_merge_by_name_refuses():
    model = two(("adni", "ppmi"))
    assert refused(model, lambda: merge(model, name="andi")) == (
        "adapter name: expected one of 'adni', 'ppmi', found 'andi'. Did you mean `adni`?"
    )
    assert refused(model, lambda: merge(model, name=["adni"])) == (
        "adapter name: expected one of 'adni', 'ppmi', found ['adni']. Did you mean `adni`?"
    )
    merge(model, name="adni")
    merged = "model: expected an unmerged model, found a merged one. Call `tnpeft.unmerge(model)` first."
    for act in (
        lambda: merge(model, name="ppmi"),
        lambda: detach(model, merge=True, name="adni"),
        lambda: detach(model, merge=True, name="ppmi"),
    ):
        assert refused(model, act) == merged
    assert refused(model, lambda: detach(model, name="adni")) == (
        "model: expected 'adni' unmerged, found a merged model. Call `tnpeft.unmerge(model)` first."
    )
    with disabled(model):
        for act in (
            lambda: merge(model, name="adni"),
            lambda: detach(model, name="ppmi"),
            lambda: detach(model, merge=True, name="ppmi"),
        ):
            assert refused(model, act) == (
                "model: expected enabled adapters, found adapters disabled by `tnpeft.disabled`. "
                "Leave the `disabled` context first."
            )


@pytest.mark.parametrize("act", [merge, lambda model: merge(model, "a"), lambda model: detach(model, merge=True)])
@pytest.mark.parametrize("act_on", ["all", "one"])
def test_a_merge_that_fails_merges_nothing(act, act_on, monkeypatch):
    model = two()
    expected, values, scales = model(X), bits(model), scales_of(model)
    calls = []

    def fails(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        original(layer)

    original = AdaptedLayer.merge
    monkeypatch.setattr(AdaptedLayer, "merge", fails)
    with pytest.raises(torch.OutOfMemoryError):
        act(model) if act_on == "all" else detach(model, merge=True, name="a")
    assert not any(layer.merged for layer in layers(model).values())
    assert scales_of(model) == scales
    assert torch.equal(model(X), expected)
    assert same_values(bits(model), values)
    train(model, X)
    assert not torch.equal(model(X), expected)


# Merging one for good.


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_one_becomes_part_of_the_base_and_the_others_stand_on_top(scale):
    model = two()
    objects = dict(plain_modules(model)["first"].named_parameters())
    weight = model.first.base.weight.clone()
    cores = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".b.core_" in key}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    activate(model, {"a": scale})
    only_a = model(X)
    activate(model, {"a": scale, "b": 1.0})
    both = model(X)
    detach(model, merge=True, name="a")
    assert names_of(model) == ("b",)
    assert scales_of(model) == {"b": 1.0}
    torch.testing.assert_close(model(X), both)
    with disabled(model):
        assert torch.equal(model(X), only_a)
    activate(model, {})
    assert torch.equal(model(X), only_a)
    assert type(model.wide) is nn.Conv3d
    assert model.first.base.weight is not objects["weight"]
    assert torch.equal(objects["weight"], weight)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in cores.items())
    activate(model, "b")
    before = model(X)
    (before - 1).square().mean().backward()
    optimiser.step()
    assert not torch.equal(model(X), before)
    detach(model)
    assert torch.equal(model(X), only_a)
    assert list(model.state_dict()) == list(net().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_one_that_does_not_act_is_merged_at_scale_1():
    for name in ("b", None):
        model = two()
        activate(model, "a")
        only_a = model(X)
        activate(model, "b")
        expected = model(X)
        if name is None:
            detach(model, name="b")
        detach(model, merge=True, name="a")
        if name is None:
            assert torch.equal(model(X), only_a)
            assert not layers(model)
        else:
            assert not torch.equal(model(X), expected)
            activate(model, {})
            assert torch.equal(model(X), only_a)


def test_files_of_the_others_load_on_the_new_base(tmp_path):
    model = two()
    activate(model, "a")
    detach(model, merge=True, name="a")
    activate(model, "b")
    tnpeft.save(model, tmp_path / "b")
    base = copy.deepcopy(model)
    detach(base)
    tnpeft.load(base, tmp_path / "b")
    assert torch.equal(base(X), model(X))


@pytest.mark.parametrize(("spec", "name"), [("hira", "hira"), ("dora", "dora")])
def test_updates_made_of_the_weight_refuse_another_weight(spec, name):
    model = net()
    attach(model, name="adni")
    attach(model, tnpeft.load_spec(spec), "ppmi", targets=("wide", "head.0"), trained=())
    text = (
        "layer 'wide': merging 'adni' for good: expected no other adapter that depends on the weight, "
        f"found 'ppmi', whose update ({name}) is made of it. Detach 'ppmi' first, or merge for a time: "
        "`tnpeft.merge(model, name='adni')`."
    )
    assert refused(model, lambda: detach(model, merge=True, name="adni")) == text
    train(model, X)
    activate(model, {"ppmi": 1.0})
    expected = model(X)
    detach(model, merge=True, name="ppmi")  # its own update is what it was
    activate(model, {})
    assert torch.equal(model(X), expected)


def test_layers_that_another_adapter_trains_as_a_whole_keep_their_weight():
    model = net()
    attach(model, name="ppmi", targets=("up",), trained=("head.0.weight",))
    attach(model, tnpeft.load_spec("ia3"), name="ia3", targets=("head.0",), trained=())
    assert refused(model, lambda: detach(model, merge=True, name="ia3")) == (
        "layer 'head.0': merging 'ia3' for good: expected no other adapter that depends on the weight, "
        "found 'ppmi', which trains it as a whole. Detach 'ppmi' first, or merge for a time: "
        "`tnpeft.merge(model, name='ia3')`."
    )
    assert refused(model, lambda: detach(model, merge=True, name="ppmi")) == (
        "layer 'head.0': merging 'ppmi' for good: expected no other adapter that depends on the weight, "
        "found 'ia3', whose update (ia3) is made of it. Detach 'ia3' first, or merge for a time: "
        "`tnpeft.merge(model, name='ppmi')`."
    )
    attach(model, name="adni", targets=("first",), trained=())
    detach(model, merge=True, name="adni")
    assert names_of(model) == ("ppmi", "ia3")


@pytest.mark.parametrize("keep", [False, True])
def test_a_layer_is_merged_beside_one_that_trains_it_as_a_whole_and_does_not_act(keep: bool):
    model = net()
    base = plain_modules(model)["head.0"].weight.detach().clone()
    attach(model, name="whole", targets=("up",), trained=("head.0.weight",))
    train(model, X)
    attach(model, tnpeft.load_spec("lora"), name="low", targets=("head.0",), trained=())
    train(model, X)
    expected = model(X)
    merged = base + adapters_of(model, "low")["head.0"].delta_weight()
    if keep:
        detach(model, merge=True)
    else:
        merge(model)
    torch.testing.assert_close(plain_modules(model)["head.0"].weight if keep else model.head[0].weight, merged)
    torch.testing.assert_close(model(X), expected)
    if not keep:
        with disabled(model):
            assert torch.equal(model.head[0].weight, base)
        torch.testing.assert_close(model(X), expected)
        unmerge(model)
        assert torch.equal(model(X), expected)
