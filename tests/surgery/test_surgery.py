"""The life of adapters on a model: attach, train, switch, merge, detach."""

from __future__ import annotations

import copy

import pytest
import torch
from small import TARGETS, TRAINED, attach, bits, chain, copies, net, net_input, same_bits, train
from torch import nn

from tnpeft.execution import AdaptedLayer, compile
from tnpeft.network import load_spec
from tnpeft.surgery import (
    activate,
    adapters_of,
    detach,
    disabled,
    install,
    merge,
    names_of,
    plain_modules,
    plain_parameters,
    record_of,
    statistics_of,
    trained_of,
    unmerge,
)

SPECS = [chain(), chain(frozen=True), load_spec("lora")]
X = net_input()


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trainable(model: nn.Module) -> list[str]:
    return [name for name, flag in flags(model).items() if flag]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=["chain", "frozen core", "lora"])
def test_an_adapted_model_is_its_base_until_the_first_step_and_disabled_ever_after(spec, dtype):
    model, x = net().to(dtype), X.to(dtype)
    base, weights = model(x), bits(model)
    pointers = {name: parameter.data_ptr() for name, parameter in plain_parameters(model).items()}
    attach(model, spec)
    assert torch.equal(model(x), base)
    train(model, x, rate=2.0)  # bf16 weights lose most of a smaller update
    trained = model(x)
    assert not torch.equal(trained, base)
    with disabled(model):
        assert torch.equal(model(x), base)
        with pytest.raises(ZeroDivisionError), disabled(model):
            1 // 0  # noqa: B018 - a mistake inside ends the inner context alone
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), trained)
    detach(model)
    assert same_bits(bits(model), weights)
    assert torch.equal(model(x), base)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers


def test_detach_gives_the_very_objects_back():
    model = net()
    model.norm.weight.requires_grad_(False)
    before, objects = (classes(model), flags(model)), dict(model.named_parameters())
    modules = dict(model.named_modules())
    state = model.__dict__.keys()
    attach(model)
    train(model, X)
    detach(model)
    assert (classes(model), flags(model)) == before
    assert all(objects[name] is parameter for name, parameter in model.named_parameters())
    assert all(modules[name] is module for name, module in model.named_modules())
    assert model.__dict__.keys() == state
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in net().named_buffers()]


def test_only_cores_and_what_was_asked_for_train():
    model = net()
    attach(model)
    cores = [f"{layer}.adapters.default.core_{core}" for layer in TARGETS for core in ("left", "middle", "right")]
    assert sorted(trainable(model)) == sorted([*cores, *copies("default")])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in trainable(model)}
    model.eval()
    train(model, X, steps=3)
    now = model.state_dict()
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert not any(
        torch.equal(parameter, torch.zeros_like(parameter)) for parameter in trained_of(model, "default").values()
    )
    assert list(trained_of(model, "default")) == list(TRAINED)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_hundred_toggles_leave_every_bit():
    model = net()
    base = model(X)
    attach(model)
    train(model, X)
    expected, weights = model(X), bits(model)
    asked = flags(model)
    for turn in range(100):
        merge(model)
        model.train(turn % 2 == 0).eval()
        if turn % 25 == 0:
            assert torch.equal(model(X), expected)
            with disabled(model):
                assert torch.equal(model(X), base)
            assert trainable(model) == []
        unmerge(model)
        if turn % 25 == 0:
            assert same_bits(bits(model), weights)
    assert torch.equal(model(X), expected)
    assert same_bits(bits(model), weights)
    assert flags(model) == asked
    detach(model)
    assert torch.equal(model(X), base)


def test_merging_twice_changes_nothing_and_neither_does_unmerging_twice():
    model = net()
    attach(model)
    train(model, X)
    expected = model(X)
    for _ in range(2):
        merge(model)
        assert torch.equal(model(X), expected)
        assert all(layer.merged for layer in model.modules() if isinstance(layer, AdaptedLayer))
    for _ in range(2):
        unmerge(model)
        assert torch.equal(model(X), expected)
    train(model, X)
    assert not torch.equal(model(X), expected)


@pytest.mark.parametrize("first_merge", [False, True])
def test_detach_with_merge_keeps_the_update_and_leaves_the_old_weights_untouched(first_merge):
    model = net()
    objects, before = dict(model.named_parameters()), bits(model)
    attach(model)
    train(model, X)
    expected = model(X)
    if first_merge:
        merge(model)
    detach(model, merge=True)
    assert torch.equal(model(X), expected)
    assert classes(model) == classes(net())
    assert list(model.state_dict()) == list(before)
    assert flags(model) == flags(net())
    assert all(torch.equal(objects[name], before[name]) for name in objects)
    changed = [name for name, parameter in model.named_parameters() if parameter is not objects[name]]
    assert sorted(changed) == sorted([*TRAINED, *(f"{layer}.weight" for layer in TARGETS)])
    fresh = net(seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), expected)
    train(model, X)


def test_named_adapters_switch_and_add_up():
    model = net()
    base = model(X)
    attach(model, name="a")
    train(model, X)
    only_a = model(X)
    attach(model, load_spec("lora"), "b", targets=("first", "head.2"), trained=("norm.weight", "head.2.bias"))
    assert torch.equal(model(X), base)
    assert names_of(model) == ("a", "b")
    beside = copies("b", ("norm.weight", "head.2.bias"))
    assert all(".b." in name or name in beside for name in trainable(model))
    train(model, X)
    only_b = model(X)
    activate(model, {"a": 1.0})
    assert torch.equal(model(X), only_a)
    assert not any(".b." in name for name in trainable(model))
    activate(model, "b")
    assert torch.equal(model(X), only_b)
    activate(model, {})
    assert torch.equal(model(X), base)
    assert trainable(model) == []
    activate(model, {"a": 1.0, "b": 0.5})
    assert torch.equal(model(X), summed_by_hand(model, {"a": 1.0, "b": 0.5})(X))
    assert not any(name.startswith("norm.weight") for name in trainable(model))
    both = model(X)
    merge(model)
    assert torch.equal(model(X), both)
    with disabled(model):
        assert torch.equal(model(X), base)
    unmerge(model)
    activate(model, {"a": -2})
    assert torch.equal(model(X), summed_by_hand(model, {"a": -2.0})(X))
    detach(model, name="a")
    assert names_of(model) == ("b",)
    assert type(model.up) is nn.ConvTranspose3d
    assert torch.equal(model(X), base)
    activate(model, {"b": 1.0})
    assert torch.equal(model(X), only_b)
    detach(model, name="b")
    assert torch.equal(model(X), base)
    assert flags(model) == flags(net())
    assert list(model.state_dict()) == list(net().state_dict())


def summed_by_hand(model: nn.Module, scales: dict[str, float]) -> nn.Module:
    """A plain model with the weights and trained parameters that the scales ask for."""
    plain = net()
    originals, found = dict(net().named_parameters()), dict(plain.named_parameters())
    with torch.no_grad():
        for name in found:
            trained = {key: trained_of(model, key) for key in scales}
            change = sum(
                scale * (trained[key][name] - originals[name]) for key, scale in scales.items() if name in trained[key]
            )
            found[name].add_(change)
        for layer in dict(plain.named_modules()):
            deltas = [(adapters_of(model, key).get(layer), scale) for key, scale in scales.items()]
            deltas = [(adapter.delta_weight(), scale) for adapter, scale in deltas if adapter is not None]
            if deltas:
                found[f"{layer}.weight"].add_(sum(scale * delta for delta, scale in deltas))
        for key, buffer in plain.named_buffers():
            change = sum(scale * (statistics_of(model, name)[key] - buffer) for name, scale in scales.items())
            buffer.add_(change.to(buffer.dtype)) if buffer.is_floating_point() else None
    return plain


def test_running_statistics_belong_to_the_adapter():
    model = net()
    base, statistics = model(X), copy.deepcopy(model.batch_norm.state_dict())
    attach(model, trained=())
    model.train()
    train(model, X)
    model.eval()
    assert model.batch_norm.num_batches_tracked == 2
    trained = model(X)
    with disabled(model):
        assert torch.equal(model(X), base)
        assert model.batch_norm.num_batches_tracked == 0
    assert torch.equal(model(X), trained)
    attach(model, name="b")
    assert torch.equal(model(X), base)
    activate(model, "default")
    assert torch.equal(model(X), trained)
    activate(model, {"default": 3.0})
    assert (model.batch_norm.running_var >= 0).all()
    detach(model)
    assert all(torch.equal(statistics[name], tensor) for name, tensor in model.batch_norm.state_dict().items())


class Tied(nn.Module):
    """A bias and a norm's scale that are one tensor; one convolution reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)
        self.fc.bias = self.norm.weight
        self.encoder = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, padding=1)})
        self.decoder = nn.Sequential(self.encoder["conv"], nn.SiLU())
        self.again = self.encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.decoder(self.encoder["conv"](x))
        return self.fc(self.norm(x.transpose(1, 2)))


def test_a_layer_with_several_names_is_replaced_at_all_and_tied_parameters_stay_tied():
    model, x = Tied().eval(), torch.randn(2, 4, 5)
    base, weights = model(x), bits(model)
    record = attach(model, targets=("decoder.0", "fc"), trained=("fc.bias", "norm.weight"))
    assert record.targets == ("decoder.0", "fc")
    assert record.trained == (("norm.weight", "fc.bias"),)
    assert model.encoder["conv"] is model.decoder[0] is model.again["conv"]
    assert isinstance(model.decoder[0], AdaptedLayer)
    assert model.fc.bias is model.norm.weight
    assert torch.equal(model(x), base)
    train(model, x)
    trained = model(x)
    for copied in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
        assert copied.fc.bias is copied.norm.weight
        torch.testing.assert_close(copied(x), trained)
        with disabled(copied):
            torch.testing.assert_close(copied(x), base)
            assert copied.fc.bias is copied.norm.weight
        detach(copied)
        assert copied.fc.bias is copied.norm.weight
        assert copied.encoder["conv"] is copied.decoder[0]
        assert same_bits(bits(copied), weights)
    assert torch.equal(model(x), trained)


def test_biases_and_norms_alone_may_train():
    model = net()
    base = model(X)
    attach(model, targets=())
    assert sorted(trainable(model)) == sorted(copies("default"))
    plain = classes(net())
    assert all(issubclass(found, plain[name]) for name, found in classes(model).items())
    train(model, X)
    with disabled(model):
        assert torch.equal(model(X), base)
    detach(model)
    assert torch.equal(model(X), base)


def test_whole_layers_train_jointly_beside_adapters():
    model = net()
    base = model(X)
    attach(model, targets=("first",), trained=("head.2.weight", "head.2.bias"))
    train(model, X)
    assert trained_of(model, "default")["head.2.weight"] is model.head[2].weight
    with disabled(model):
        assert torch.equal(model(X), base)


def test_the_record_says_what_was_attached():
    model = net()
    record = attach(model, name="adni")
    assert record == record_of(model, "adni")
    assert record.targets == TARGETS
    assert record.trained == (("first.bias",), ("norm.weight",), ("norm.bias",))
    assert [names[0] for names in record.statistics] == [
        "batch_norm.running_mean",
        "batch_norm.running_var",
        "batch_norm.num_batches_tracked",
    ]
    assert list(adapters_of(model, "adni")) == list(TARGETS)
    assert list(plain_modules(model)) == list(dict(net().named_modules()))
    assert list(plain_parameters(model)) == list(dict(net().named_parameters()))


@pytest.mark.parametrize("keep", [False, True])
def test_everything_may_be_detached_inside_disabled(keep):
    model = net()
    base = model(X)
    attach(model)
    train(model, X)
    trained = model(X)
    with disabled(model):
        reference = copy.deepcopy(model)
        detach(model, merge=keep)
    assert torch.equal(model(X), trained if keep else base)
    assert torch.equal(reference(X), base)
    detach(reference)
    assert torch.equal(reference(X), base)
    assert classes(reference) == classes(net())


def test_install_takes_adapters_made_by_hand():
    model = net()
    modules = plain_modules(model)
    install(model, "x", {"first": compile("tenvoo_l", modules["first"], r=2)}, about={"note": "by hand"})
    assert record_of(model, "x").about == {"note": "by hand"}
