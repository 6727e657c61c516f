"""Adapted parameters are merged, switched, copied, cast, loaded and taken off as adapted layers are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import tnpeft
from tests.beside_layers import PARAMETERS, TOKENS, Block, Model, attached, close, expected, model, summed, train
from tnpeft.errors import AttachError, ExecutionError, TnpeftWarning
from tnpeft.surgery import plain_state_dict


def test_the_plain_models_names_classes_and_flags() -> None:
    adapted, base = model(), model()
    adapted.blocks[1].shift.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    tnpeft.attach(adapted, "lora", parameters=PARAMETERS)
    keys = list(base.state_dict())
    assert [key for key in adapted.state_dict() if "._tnpeft_on_" not in key] == keys
    assert list(plain_state_dict(adapted)) == keys
    assert isinstance(adapted.blocks[0], Block)
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == {
        f"blocks.{number}._tnpeft_on_{key}.adapters.default.core_{core}"
        for number in (0, 1)
        for key in ("square", "experts")
        for core in ("down", "up")
    }
    tnpeft.detach(adapted)
    assert type(adapted.blocks[0]) is Block
    assert list(adapted.state_dict()) == keys
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == flags
    assert torch.equal(adapted(TOKENS), base(TOKENS))


@pytest.mark.parametrize("spec", ["lora", "loha", "dora", "hira"])
def test_merge_and_back_to_the_bit(spec: str) -> None:
    adapted, base, _ = attached(spec)
    output = adapted(TOKENS)
    tnpeft.merge(adapted)
    close(adapted(TOKENS), output)
    assert type(adapted.blocks[0]) is Block  # nothing is computed when it is read
    with tnpeft.disabled(adapted):
        assert torch.equal(adapted.blocks[0].square, base.blocks[0].square)
    close(adapted(TOKENS), output)
    tnpeft.unmerge(adapted)
    assert torch.equal(adapted(TOKENS), output)
    with tnpeft.disabled(adapted):
        assert adapted.blocks[0].square is adapted.blocks[0]._parameters["square"]
    tnpeft.detach(adapted, merge=True)
    close(adapted(TOKENS), output)
    assert list(adapted.state_dict()) == list(base.state_dict())


def test_several_adapters_at_their_scales() -> None:
    adapted, base, first = attached()
    second = tnpeft.attach(adapted, "loha", parameters={"experts$": "e o i"}, name="second")
    train(second)
    tnpeft.activate(adapted, {"default": 0.5, "second": -2.0})
    close(adapted(TOKENS), expected(base, {first: 0.5, second: -2.0}, TOKENS))
    output = adapted(TOKENS)
    tnpeft.detach(adapted, merge=True, name="second")
    close(adapted(TOKENS), output)
    tnpeft.detach(adapted, name="default")
    assert type(adapted.blocks[0]) is Block


def test_an_adapter_that_reads_the_weight_is_in_the_way_of_merging_another_for_good() -> None:
    adapted, _, _ = attached()
    tnpeft.attach(adapted, "hira", parameters={r"\.square$": "i o"}, name="second")
    with pytest.raises(AttachError) as caught:
        tnpeft.detach(adapted, merge=True, name="default")
    assert str(caught.value) == (
        "layer 'blocks.0.square': merging 'default' for good: expected no other adapter that depends on the weight, "
        "found 'second', whose update (hira) is made of it. Detach 'second' first, or merge for a time: "
        "`tnpeft.merge(model, name='default')`."
    )


def test_one_orientation_for_all_adapters_of_a_parameter() -> None:
    adapted, _, _ = attached()
    keys = list(adapted.state_dict())
    with pytest.raises(AttachError) as caught:
        tnpeft.attach(adapted, "loha", parameters={r"0\.square$": "o i"}, name="second")
    assert str(caught.value) == (
        "parameter 'blocks.0.square': its orientation: expected `i o`, as other adapters have it, found `o i`. Give it "
        "the same way round, or detach the other adapters first."
    )
    assert list(adapted.state_dict()) == keys


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(merged: bool, again: Callable[[Model], Model]) -> None:
    adapted, base, _ = attached()
    if merged:
        tnpeft.merge(adapted)
    output = adapted(TOKENS)
    twin = again(adapted)
    assert torch.equal(twin(TOKENS), output)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.zero_()
    assert torch.equal(twin(TOKENS), output)
    tnpeft.unmerge(twin)
    tnpeft.detach(twin)
    assert torch.equal(twin(TOKENS), base(TOKENS))
    with tnpeft.disabled(adapted):
        shown = again(adapted)
    tnpeft.detach(shown)
    assert list(shown.state_dict()) == list(base.state_dict())
    shown(TOKENS)


def test_whole_models_are_saved_by_torch() -> None:
    adapted, _, _ = attached()
    file = io.BytesIO()
    torch.save(adapted, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(TOKENS), adapted(TOKENS))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(merged: bool, assign: bool) -> None:
    adapted, _, handle = attached()
    state = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    output = adapted(TOKENS)
    other, _, _ = attached()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    if merged:
        tnpeft.merge(other)
    missed = other.load_state_dict(state, strict=False, assign=assign)
    assert not missed.unexpected_keys
    assert all("_tnpeft_original" in key for key in missed.missing_keys)
    close(other(TOKENS), output)
    # The plain model's checkpoint, into an adapted one.
    fresh = {key: torch.randn_like(tensor) for key, tensor in model().state_dict().items()}
    if merged:
        tnpeft.merge(adapted)
    missed = adapted.load_state_dict(fresh, strict=False)
    assert not missed.unexpected_keys
    base = model()
    base.load_state_dict(fresh)
    close(adapted(TOKENS), expected(base, handle, TOKENS))


def test_a_merged_models_state_dict_is_loaded_by_one_that_is_not() -> None:
    adapted, _, _ = attached()
    tnpeft.merge(adapted)
    state, output = adapted.state_dict(), adapted(TOKENS)
    for other, _, _ in (attached(), attached()):
        other.load_state_dict(state)
        close(other(TOKENS), output)


def test_casts_keep_cores_wide_and_sums_exact() -> None:
    adapted, base, handle = attached()
    weight = base.blocks[0].square.detach().bfloat16()
    wanted = (weight.float() + handle.adapters["blocks.0.square"].delta_weight()).bfloat16()
    merged = copy.deepcopy(adapted)
    tnpeft.merge(merged)
    for each in (adapted, merged):
        each.to(torch.bfloat16)
        assert torch.equal(each.blocks[0].square, wanted)
    tnpeft.unmerge(merged)
    assert torch.equal(merged.blocks[0].square, wanted)
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.float32}
    wide, base, handle = attached()
    wide.double()
    close(wide(TOKENS), expected(base, handle, TOKENS), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_start_is_exact_in_any_type(dtype: torch.dtype) -> None:
    adapted, base = model().to(dtype), model().to(dtype)
    tnpeft.attach(adapted, "tt_lora", match=["embed"], parameters=PARAMETERS, mode="dense")
    assert torch.equal(adapted(TOKENS), base(TOKENS))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted(TOKENS), base(TOKENS))


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens))

    tied, tokens = Tied(), torch.arange(9)
    handle = tnpeft.attach(tied, "lora", match=["table"])
    train(handle)
    base = tied.head.weight.detach()
    wanted = (base + handle.adapters["table"].delta_weight()) @ base.T
    torch.testing.assert_close(tied(tokens), wanted)
    with pytest.warns(TnpeftWarning, match="the merged weight 'table.weight': expected a tensor of its own"):
        tnpeft.merge(tied)
    torch.testing.assert_close(tied(tokens), wanted)
    tnpeft.detach(tied)
    assert tied.head.weight is tied.table.weight


def test_an_owner_with_two_names_is_adapted_once() -> None:
    block = Block()
    twice = nn.Sequential(block, block)
    x = torch.randn(2, 8)
    handle = tnpeft.attach(twice, "lora", parameters={r"\.square$": "i o"})
    assert list(handle.adapters) == ["0.square"]
    train(handle)
    close(twice(x), torch.func.functional_call(copy.deepcopy(twice[0]).double(), {}, (twice[0](x).double(),)))
    tnpeft.detach(twice)
    assert type(block) is Block


def test_trained_as_a_whole_or_adapted() -> None:
    adapted, _, _ = attached()
    with pytest.raises(AttachError) as caught:
        tnpeft.attach(adapted, "lora", match="blocks.1.line", train={"also": [r"0\.square$"]}, name="second")
    assert str(caught.value) == (
        "parameter 'blocks.0.square': training: expected a parameter that is not adapted, found the weight of "
        "'blocks.0.square'. Train the layer as a whole or adapt it, not both."
    )


def test_models_on_meta_wait_for_their_values() -> None:
    with torch.device("meta"):
        waiting = Model()
    handle = tnpeft.attach(waiting, "lora", parameters=PARAMETERS)
    assert handle.report().cores == 2 * (8 * (8 + 8) // 2 * 1 + 3 * 4 * (6 + 8)) or handle.report().cores > 0
    waiting.to_empty(device="cpu")
    waiting.load_state_dict(model().state_dict(), strict=False)
    with pytest.raises(ExecutionError, match="cores: expected initial or loaded values"):
        waiting(TOKENS)
    other, _, _ = attached()
    tnpeft.detach(other)


def test_a_parameter_that_is_replaced_is_the_base_from_then_on() -> None:
    adapted, base, handle = attached()
    fresh = torch.randn(8, 8)
    adapted.blocks[0].square = nn.Parameter(fresh)
    base.load_state_dict({"blocks.0.square": fresh}, strict=False)
    close(adapted(TOKENS), expected(base, handle, TOKENS))
    state = summed(base, {handle: 1.0})
    close(adapted.blocks[0].square, state["blocks.0.square"])


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, delattr])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_parameter_is_not_taken_away(norm: Callable[[nn.Module, str], object]) -> None:
    owner = nn.MultiheadAttention(8, 2)
    net = nn.Sequential(owner)
    tnpeft.attach(net, "lora", parameters="in_proj_weight$", r=2)
    with pytest.raises(ExecutionError, match=r"`in_proj_weight` of a MultiheadAttention: expected to stay what it is"):
        norm(owner, "in_proj_weight")


class Halved(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2


@pytest.mark.parametrize("first", [False, True])
def test_parametrizations_of_what_stands_beside_it(first: bool) -> None:
    """Torch gives the owner a class of its own, before or after it is attached to, and takes that off again."""
    net = nn.Sequential(Block())
    block = net[0]
    x = torch.randn(2, 8)
    with torch.no_grad():
        block.shift.fill_(2.0)
    if first:
        parametrize.register_parametrization(block, "shift", Halved())
    handle = tnpeft.attach(net, "lora", parameters={"square$": "i o"})
    train(handle)
    before = net(x)
    if not first:
        parametrize.register_parametrization(block, "shift", Halved())
        torch.testing.assert_close(net(x), before - 1)
    halved = net(x)
    with tnpeft.disabled(net):
        plain = net(x)
    twin = copy.deepcopy(net)
    tnpeft.merge(net)
    torch.testing.assert_close(net(x), halved)
    tnpeft.unmerge(net)
    assert torch.equal(net(x), halved)
    assert torch.equal(twin(x), halved)
    parametrize.remove_parametrizations(block, "shift")
    assert torch.equal(net(x), halved)
    assert torch.equal(twin(x), halved)
    tnpeft.detach(net)
    assert torch.equal(net(x), plain)
    assert type(block) is Block
    tnpeft.detach(twin)
    assert torch.equal(twin(x), plain)
    parametrize.remove_parametrizations(twin[0], "shift")
    assert type(twin[0]) is Block


def test_what_cannot_take_the_place_of_an_adapted_parameter() -> None:
    adapted, _, _ = attached()
    block, before = adapted.blocks[0], adapted(TOKENS)
    taken = "`square` of a Block: expected to stay what it is while adapters are attached"
    other = (
        "an assignment to `square` of a Block: expected the shape (8, 8), which adapters stand on, found (7, 8). "
        "Take the adapters off first, with `tnpeft.detach(model, merge=True)` to keep what they learned."
    )
    for value, message in ((None, taken), (nn.Parameter(torch.zeros(7, 8)), other)):
        for put in (setattr, type(block).register_parameter):
            with pytest.raises(ExecutionError) as caught:
                put(block, "square", value)
            assert str(caught.value).startswith(message)
    with pytest.raises(TypeError, match=r"cannot assign 'torch.Tensor' as parameter 'square'"):
        block.square = torch.zeros(8, 8)
    with pytest.raises(ExecutionError, match=taken):
        prune.l1_unstructured(block, "square", 0.5)
    assert torch.equal(adapted(TOKENS), before)


def test_a_parameter_that_trains_beside_is_not_taken_away() -> None:
    adapted, _, _ = attached(train={"also": [r"0\.shift$"]})
    state = adapted.state_dict().keys()
    with pytest.raises(ExecutionError, match="`shift` of a Block: expected to stay what it is"):
        parametrize.register_parametrization(adapted.blocks[0], "shift", Halved())
    assert adapted.state_dict().keys() == state
    adapted(TOKENS)


class Mixed(nn.Linear):
    """A layer with a weight more than its own, which is adapted beside it."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.mix


@pytest.mark.parametrize("order", ["layer, parameter", "parameter, layer", "both"])
def test_a_parameter_of_a_layer_that_is_adapted_too(order: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Mixed()), torch.randn(2, 8)
    base = copy.deepcopy(net)
    ways = {"layer": {"match": "0"}, "parameter": {"parameters": {"mix$": "i o"}}}
    ways["both"] = {**ways["layer"], **ways["parameter"]}
    handles = [tnpeft.attach(net, "lora", **ways[name], name=name) for name in order.split(", ")]
    for handle in handles:
        train(handle)
    tnpeft.activate(net, {handle.name: 1.0 for handle in handles})
    adapters = {name: adapter for handle in handles for name, adapter in handle.adapters.items()}
    mix = base[0].mix + adapters["0.mix"].delta_weight()
    torch.testing.assert_close(net[0].mix, mix)
    wanted = nn.functional.linear(x, base[0].weight, base[0].bias) @ mix
    close(net(x), wanted + x @ adapters["0"].delta_weight().T)
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    assert trained == {id(core) for handle in handles for core in handle.parameters()}
    for gone, left in ((0, -1), (-1, 0)) if len(handles) == 2 else ():
        twin = copy.deepcopy(net)
        tnpeft.activate(twin, handles[left].name)
        before = twin(x)
        tnpeft.detach(twin, name=handles[gone].name)
        assert torch.equal(twin(x), before)
        assert sum("core_" in key for key in twin.state_dict()) == 2
    tnpeft.detach(net)
    assert torch.equal(net(x), base(x))
    assert list(net.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_every_named_parameter_is_what_get_parameter_gives(merged: bool) -> None:
    """transformers ties weights so."""
    adapted, _, _ = attached(train={"bias": "adapted", "also": [r"0\.shift$"]})
    if merged:
        tnpeft.merge(adapted)
    for name, parameter in adapted.named_parameters():
        assert adapted.get_parameter(name) is parameter
