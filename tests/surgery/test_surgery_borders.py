"""What other code does to an adapted model from outside: writes, assignments, hooks, reparametrisations, odd inputs."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import fusion, prune

import tnpeft

MODES = ("dense", "factored", "hybrid")
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
KEPT = (
    "layer '0': `weight`: expected to stay what it is while adapters are attached, found something that would compute "
    "it, as weight_norm, spectral_norm and pruning do. Take the adapters off first, with "
    "`tnpeft.detach(model, merge=True)` to keep what they learned."
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 8))


def adapted(spec: str = "lora", mode: str = "dense", seed: int = 5, name: str = "default") -> nn.Sequential:
    """Away from its start, biases and norms too."""
    return moved(attached(net(), spec, mode, seed, name), seed)


def attached(
    model: nn.Sequential, spec: str = "lora", mode: str = "dense", seed: int = 5, name: str = "default"
) -> nn.Sequential:
    train: dict[str, Any] = {"bias": "adapted", "norm": True}
    tnpeft.attach(model, spec, match="0|3", mode=mode, train=train, seed=seed, name=name)
    return model


def moved(model: nn.Sequential, seed: int = 5) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def refused(action: Any, error: type[Exception] = tnpeft.TnpeftError) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["quanta", "pissa", "vera", "lora"])
def test_values_written_through_a_state_dict_act(spec: str, mode: str):
    """As those who keep averages or the best weights write them; frozen copies are others then."""
    model, other = adapted(spec, mode), adapted(spec, mode, seed=77)
    for _ in range(2):
        model(X)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(other.state_dict()[key])
    assert torch.equal(model(X), other(X))


def test_a_merged_model_that_is_disabled_stays_the_base_whatever_is_loaded_or_cast():
    model, base = adapted(), net()
    tnpeft.merge(model)
    merged = model(X)
    with tnpeft.disabled(model):
        for change in (
            lambda: model.load_state_dict(model.state_dict()),
            lambda: model.load_state_dict(net().state_dict(), strict=False),
            lambda: model[0].reset_parameters(),
        ):
            change()
            assert torch.equal(model(X), base(X))
        assert torch.equal(model.double()(X.double()), base.double()(X.double()))
    model.float()
    with torch.no_grad():
        assert not torch.equal(model(X), base.float()(X))
    other = adapted()
    tnpeft.merge(other)
    with tnpeft.disabled(other):
        other.load_state_dict(other.state_dict())
        tnpeft.detach(other, merge=True)
    assert torch.equal(other(X), merged)


def test_a_merged_adapter_gives_another_nothing():
    state = {key: tensor.clone() for key, tensor in merged_state("a").items()}
    model = moved(attached(adapted(name="a", seed=1), name="b"), 2)
    mine = {key: tensor.clone() for key, tensor in model.state_dict().items() if "b:" in key or ".b." in key}
    model.load_state_dict(state, strict=False)
    assert mine
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in mine.items())
    alone = adapted(name="b", seed=2)
    before = {key: tensor.clone() for key, tensor in alone.state_dict().items() if "b:" in key}
    found = alone.load_state_dict(state, strict=False)
    assert {key for key in found.unexpected_keys if "_tnpeft_of_a:" in key}
    assert all(torch.equal(alone.state_dict()[key], tensor) for key, tensor in before.items())


def merged_state(name: str) -> dict[str, Tensor]:
    model = adapted(name=name, seed=9)
    tnpeft.merge(model)
    return model.state_dict()


# models from meta


def on_meta(spec: str = "lora", mode: str = "dense") -> nn.Sequential:
    with torch.device("meta"):
        model = net()
    return attached(model, spec, mode)


def garbage(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7.0)


@pytest.mark.parametrize("spec", ["lora", "quanta", "dora", "pissa"])
def test_from_meta_a_model_follows_the_advice_to_its_base(spec: str):
    model = on_meta(spec)
    garbage(model)
    model.load_state_dict(net().state_dict(), strict=False)
    assert refused(lambda: model(X)) == (
        "layer '0': cores: expected initial or loaded values, found memory without values (they were made on the meta "
        "device). Call `reset_parameters` of the adapted layer, or load the adapter, before the first forward."
    )
    for layer in (model[0], model[3]):
        layer.reset_parameters()
    torch.testing.assert_close(model(X), net()(X), rtol=0, atol=0 if spec != "pissa" else 1e-6)


def test_from_meta_copies_without_values_are_refused():
    model = on_meta()
    garbage(model)
    for layer in (model[0], model[3]):
        layer.reset_parameters()
    assert refused(lambda: model(X)) == (
        "the trained `weight` of a LayerNorm: expected values, found memory without values (it was made on the meta "
        "device). Load the adapter, or the base's state dict, before the first forward; or attach once the model has "
        "values."
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ["lora", "quanta", "dora"])
def test_a_base_that_is_assigned_to_a_model_on_meta(spec: str, mode: str):
    model = on_meta(spec, mode)
    model.load_state_dict(net().state_dict(), strict=False, assign=True)
    assert refused(lambda: model(X)) == (
        "layer '0': cores: expected initial or loaded values, found none (they are on the meta device, and the layer "
        "is not). Call `reset_parameters` of the adapted layer, or load the adapter, before the first forward."
    )
    with tnpeft.accumulating(model):
        assert "layer '0': cores: expected initial or loaded values" in refused(lambda: model(X))
    for layer in (model[0], model[3]):
        layer.reset_parameters()
    assert torch.equal(model(X), net()(X))
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("spec", ["lora", "quanta", "dora", "pissa", "vera"])
def test_models_that_are_stacked_run_on_a_skeleton_without_values(spec: str):
    """As torch's tutorial on ensembles has it."""
    models = [adapted(spec, seed=seed) for seed in (1, 2, 3)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def one(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (X,))

    expected = torch.stack([model(X) for model in models])
    torch.testing.assert_close(vmap(one)(parameters, buffers), expected, rtol=1e-5, atol=1e-6)


def test_the_default_device_has_no_part_in_attaching():
    model = net()
    with torch.device("meta"):
        tnpeft.attach(model, "fourierft", match="0")
    assert torch.equal(model(X), net()(X))


# assignments


def test_a_weight_that_is_assigned_is_the_base_s_and_is_warned_of():
    model = adapted()
    weight = nn.Parameter(model[0].weight.detach())
    with pytest.warns(tnpeft.TnpeftWarning) as caught:
        model[0].weight = weight
    assert [str(one.message) for one in caught] == [
        "layer '0': an assignment to `weight`: expected one without adapters, or the base's new weight, found one "
        "where adapters act, whose updates stay on top. If it was made of `layer.weight`, which is W + ΔW, make it of "
        "`layer.base.weight`, or merge first."
    ]
    assert caught[0].filename == __file__
    assert model[0].base.weight is weight
    model[0].weight = weight  # what stands there: nothing to say
    assert refused(lambda: setattr(model[0], "weight", weight.detach()), TypeError) == (
        "cannot assign 'torch.Tensor' as parameter 'weight' (torch.nn.Parameter or None expected)"
    )


def test_a_merged_layer_takes_no_other_weight():
    model = adapted()
    tnpeft.merge(model)
    expected = model(X)
    assert refused(lambda: setattr(model[0], "weight", nn.Parameter(torch.zeros(12, 8)))) == (
        "layer '0': an assignment to `weight`: expected a layer that is not merged, found a merged one. Call "
        "`tnpeft.unmerge` before, or keep the merged weights with `tnpeft.detach(model, merge=True)`."
    )
    assert torch.equal(model(X), expected)


def test_fusing_with_a_norm_is_right_once_merged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    tnpeft.attach(model, "lora", match="0")
    moved(model)
    with pytest.warns(tnpeft.TnpeftWarning, match="an assignment to `weight`"):
        fusion.fuse_conv_bn_eval(model[0], model[1])
    tnpeft.detach(model, merge=True)
    fused = fusion.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)


# ties


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.emb(x)).tanh())  # type: ignore[no-any-return]


WORDS = torch.arange(7)[None]
UNTIED = (
    "the merged weight 'head.weight': expected a tensor of its own, found one tied to 'emb.weight', with the base's "
    "values. Saved weights of the merged model belong into a model that does not tie them (`tie_word_embeddings=False` "
    "in transformers)."
)


@pytest.mark.parametrize("merge", [tnpeft.merge, lambda model: tnpeft.detach(model, merge=True)])
def test_merging_a_tied_weight_is_warned_of(merge: Any):
    model = Tied()
    tnpeft.attach(model, "lora", match="head|body")
    moved(model)
    expected = model(WORDS)
    with pytest.warns(tnpeft.TnpeftWarning) as caught:
        merge(model)
    assert [str(one.message) for one in caught] == [UNTIED]
    assert caught[0].filename == __file__ or merge is not tnpeft.merge
    plain = Tied()
    plain.head.weight = nn.Parameter(plain.head.weight.detach().clone())
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(plain(WORDS), expected, rtol=0, atol=1e-6)


def test_a_layer_at_two_places_is_no_tie():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    tnpeft.attach(model, "lora", match="0")
    tnpeft.merge(model)  # warnings are errors


@pytest.mark.filterwarnings("ignore:the merged weight:tnpeft.TnpeftWarning")
@pytest.mark.parametrize("options", [{"match": "head|body"}, {"match": "body", "train": {"also": ["emb.weight"]}}])
def test_what_stands_beside_tied_tensors_shares_no_memory_in_a_state_dict(options: dict[str, Any]):
    model = Tied()
    tnpeft.attach(model, "lora", **options)
    moved(model)
    for prepare in (lambda: None, lambda: tnpeft.merge(model)):
        prepare()
        state = model.state_dict()
        shared: dict[int, list[str]] = {}
        for key, tensor in state.items():
            shared.setdefault(tensor.data_ptr(), []).append(key)
        assert [keys for keys in shared.values() if len(keys) > 1 and any("_tnpeft_" in key for key in keys)] == []
        own = dict(model.named_parameters(remove_duplicate=False))
        kept = model.state_dict(keep_vars=True)
        assert all(kept[key] is own[key] for key in own)
        assert all(torch.equal(state[key], kept[key]) for key in state)
        assert torch.equal(copy.deepcopy(model)(WORDS), model(WORDS))
    tnpeft.detach(model)
    assert not any(module._state_dict_hooks for module in model.modules())
    assert not any(
        key.startswith("_tnpeft") for module in model.modules() for key in module.__dict__ if "made" not in key
    )


# other roads


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.steps = [self.a, self.b]
        self.named = {"a": self.a}
        object.__setattr__(self, "last", self.b)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize(
    ("match", "layers", "attribute"), [("a|b", "'a', 'b'", "steps"), ("^net.b", "'net.b'", "net.steps")]
)
def test_layers_that_are_reached_outside_the_tree_are_warned_of(match: str, layers: str, attribute: str):
    model: nn.Module = Listed()
    if "." in attribute:
        model = nn.ModuleDict({"net": model})
    with pytest.warns(tnpeft.TnpeftWarning) as caught:
        tnpeft.attach(model, "lora", match=match)
    assert [str(one.message) for one in caught] == [
        f"adapted layers: expected ones that are submodules alone, found {layers} in `{attribute}` too, where calls "
        "meet no adapter. Call the layers as submodules there, for example through an `nn.ModuleList` or by their "
        "names."
    ]


def test_what_adapters_hold_is_no_other_road():
    model = adapted("pissa", name="a")  # reads the base weight
    attached(model, "pissa", name="b")


# hooks and methods of state dicts


def test_hooks_of_state_dicts_of_the_base_layer_run():
    model, seen = net(), []

    def renamed(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if f"{prefix}w" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}w")

    model[0].register_load_state_dict_pre_hook(renamed)
    model[0].register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    model[0].register_state_dict_post_hook(lambda *_: seen.append("saved"))
    model[0].register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    counts = {name: len(getattr(model[0], name)) for name in TABLES}
    attached(model)
    state = net().state_dict()
    state["0.w"] = state.pop("0.weight") + 1
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(model[0].base.weight, net()[0].weight + 1)
    model.state_dict()
    assert seen == ["loaded", "saving", "saved"]
    during = model[0].register_state_dict_post_hook(lambda *_: seen.append("more"))
    tnpeft.detach(model)
    assert {name: len(getattr(model[0], name)) for name in TABLES} == {**counts, "_state_dict_hooks": 2}
    during.remove()
    assert {name: len(getattr(model[0], name)) for name in TABLES} == counts


TABLES = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class Extra(nn.Linear):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        assert state == 3


def test_a_layer_with_a_state_of_its_own_keeps_it():
    model = nn.Sequential(Extra(3, 4))
    before = model.state_dict()
    tnpeft.attach(model, "lora", match="0")
    state = model.state_dict()
    assert state["0._extra_state"] == 3
    assert {*state} - {*before} == {"0.adapters.default.core_down", "0.adapters.default.core_up"}
    model.load_state_dict(state)
    tnpeft.detach(model)
    assert [*model.state_dict()] == [*before]


# reparametrisations


def spectral(layer: nn.Module) -> object:
    return nn.utils.parametrizations.spectral_norm(layer)


WAYS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": spectral,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune of the bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_would_compute_the_weight_is_refused_and_changes_nothing(way: str, merged: bool):
    model = adapted()
    if merged:
        tnpeft.merge(model)
    expected, keys = model(X), [*model.state_dict()]
    if way == "spectral_norm" and not merged:  # torch's own, which writes to a tensor that is computed
        refused(lambda: WAYS[way](model[0]), RuntimeError)
    else:
        assert refused(lambda: WAYS[way](model[0])) == KEPT.replace(
            "`weight`", "`bias`" if "bias" in way else "`weight`"
        )
    assert torch.equal(model(X), expected)
    assert [*model.state_dict()] == keys
    tnpeft.detach(model, merge=True)
    WAYS[way](model[0])
    model(X)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_weight_that_was_taken_away_is_missed_in_words():
    model = adapted()
    tnpeft.merge(model)
    del model[0]._parameters["weight"]
    assert refused(lambda: model(X)) == KEPT


# inputs


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_nested_and_sparse_inputs_are_those_of_a_plain_layer(mode: str):
    model = adapted(mode=mode)
    nested = model[0](torch.nested.nested_tensor([X[:2], X[2:]]))
    torch.testing.assert_close(torch.cat(nested.unbind()), model[0](X))
    torch.testing.assert_close(model[0](X.to_sparse()), model[0](X))
    assert "at least 1D" in refused(lambda: model[0](torch.tensor(1.0)), RuntimeError)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")
@pytest.mark.parametrize("spec", ["pissa", "quanta", "lora"])
def test_an_exported_program_is_read_again(spec: str):
    model, file = adapted(spec).eval(), io.BytesIO()
    torch.export.save(torch.export.export(model, (X,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(X), model(X))
