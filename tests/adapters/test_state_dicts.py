"""State dicts of adapted models: the plain model's names and values, whatever the adapters beside them do."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from small import bits, net, net_input, same_bits, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tnpeft
from tnpeft.surgery import base_tensors

X = net_input()
ADAPTED = ["first", "wide", "up", "head.0"]
PLAIN_TRAIN = {"bias": "adapted", "norm": True}
SPECS = [("lora", {}), ("lora", PLAIN_TRAIN), ("dora", PLAIN_TRAIN), ("loha", {})]


def adapted(spec: str = "lora", extra: dict[str, object] | None = None) -> nn.Module:
    """A model that trained a little."""
    model = net()
    tnpeft.attach(model, spec, match=ADAPTED, r=2, train=extra if extra is not None else PLAIN_TRAIN)
    train(model, X)
    return model.eval()


def two() -> nn.Module:
    """A model with a sum of two adapters acting, both of which train biases and norms."""
    model = adapted()
    tnpeft.attach(model, "loha", match=["first"], r=2, train=PLAIN_TRAIN, name="second")
    train(model, X)
    tnpeft.activate(model, {"default": 0.5, "second": 2.0})
    return model.eval()


def merged() -> nn.Module:
    model = adapted()
    tnpeft.merge(model)
    return model


def merged_sum() -> nn.Module:
    model = two()
    tnpeft.merge(model)
    return model


LIVES: list[Callable[[], nn.Module]] = [adapted, two, merged, merged_sum]


def other_base() -> nn.Module:
    torch.manual_seed(5)
    model = net()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape))
    return model.eval()


@pytest.mark.parametrize(("spec", "extra"), SPECS)
def test_the_base_stands_under_its_own_names(spec: str, extra: dict[str, object]):
    base = net().eval()
    model = adapted(spec, extra)
    state = model.state_dict()
    plain = base.state_dict()
    assert [key for key in state if key in plain] == list(plain)
    assert all(torch.equal(state[key], plain[key]) for key in plain)
    assert all(".adapters.default." in key or "._tnpeft_of_default:" in key for key in state if key not in plain)
    assert same_bits(dict(tnpeft.plain_state_dict(model)), dict(plain))
    fresh = net()
    keys = fresh.load_state_dict(state, strict=False)
    assert keys.missing_keys == []
    assert keys.unexpected_keys == [key for key in state if key not in plain]
    assert torch.equal(fresh.eval()(X), base(X))


@pytest.mark.parametrize("make", LIVES)
def test_names_of_parameters_and_buffers_are_those_of_the_state_dict(make: Callable[[], nn.Module]):
    model = make()
    state = model.state_dict(keep_vars=True)
    for name, tensor in model.named_parameters():
        assert state[name] is tensor
    persistent = {name: tensor for name, tensor in model.named_buffers() if "_tnpeft_sum:" not in name}
    assert all(state[name] is tensor for name, tensor in persistent.items())


@pytest.mark.parametrize("make", LIVES)
def test_a_state_dict_goes_back_into_where_it_came_from(make: Callable[[], nn.Module]):
    model, other = make(), make()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(tensor + 1)
    other.load_state_dict(model.state_dict())
    assert same_bits(bits(other), bits(model))
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("make", [merged, merged_sum])
def test_a_merged_model_is_saved_as_what_it_computes(make: Callable[[], nn.Module]):
    model = make()
    expected = model(X)
    plain = net().eval()
    state = model.state_dict()
    keys = plain.load_state_dict(state, strict=False)
    assert keys.missing_keys == []
    assert torch.equal(plain(X), expected)
    assert same_bits(dict(tnpeft.plain_state_dict(model)), {name: state[name] for name in plain.state_dict()})
    parked = [key for key in state if "_tnpeft_original:" in key]
    assert {key.replace("_tnpeft_original:", "") for key in parked} >= {f"{name}.weight" for name in ADAPTED}
    base = net().state_dict()
    assert all(torch.equal(state[key], base[key.replace("_tnpeft_original:", "")]) for key in parked)


@pytest.mark.parametrize(("make", "unmerged"), [(merged, adapted), (merged_sum, two)])
def test_a_merged_state_dict_gives_an_unmerged_model_the_base(
    make: Callable[[], nn.Module], unmerged: Callable[[], nn.Module]
):
    state, model = make().state_dict(), unmerged()
    expected = unmerged()(X)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor + 1)
    model.load_state_dict(state)
    assert torch.equal(model(X), expected)
    with tnpeft.disabled(model):
        assert torch.equal(model(X), net().eval()(X))


@pytest.mark.parametrize("make", LIVES)
def test_a_checkpoint_of_a_base_is_the_base_of_what_is_attached(make: Callable[[], nn.Module]):
    """Never W + 2 dW: what is merged is merged anew."""
    model, base = make(), other_base()
    keys = model.load_state_dict(base.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert all("adapters" in key or "_tnpeft_of_" in key for key in keys.missing_keys)
    with tnpeft.disabled(model):
        assert torch.equal(model(X), base(X))
    tnpeft.unmerge(model)
    expected = model(X)
    tnpeft.merge(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_of_before_are_read(wrapped: bool):
    """A layer's tensors were below `base`, acting copies had the plain names and parked the base's."""
    model = adapted()
    old: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner, _, name = key.rpartition(".")
        below = f"{owner}.base" if owner in ADAPTED else owner
        if f"{owner}._tnpeft_of_default:{name}" in model.state_dict():
            old[f"{below}._tnpeft_original:{name}"] = tensor
        elif name.startswith("_tnpeft_of_default:"):
            old[f"{below}.{name.partition(':')[2]}"] = tensor
        else:
            old[f"{below}.{name}" if owner in ADAPTED else key] = tensor
    assert "first.base.weight" in old
    assert "norm._tnpeft_original:weight" in old
    fresh = adapted()
    with torch.no_grad():
        for tensor in fresh.parameters():
            tensor.add_(1)
    if wrapped:
        nn.ModuleList([fresh]).load_state_dict({f"0.{key}": tensor for key, tensor in old.items()})
    else:
        fresh.load_state_dict(old)
    assert same_bits(bits(fresh), bits(model))
    assert torch.equal(fresh(X), model(X))


def test_resuming_from_a_state_dict_gives_the_bits_of_never_having_stopped():
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        handle = tnpeft.attach(model, "lora", match=ADAPTED, r=2, train=PLAIN_TRAIN)
        return model, torch.optim.Adam(handle.parameters(), lr=0.01)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (model(X) - 1).square().mean().backward()
            optimizer.step()

    whole, optimizer = start()
    steps(whole, optimizer, 2)
    model, optimiser_state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 2)
    again, optimizer = start()
    again.load_state_dict(model)
    optimizer.load_state_dict(optimiser_state)
    steps(again, optimizer, 2)
    assert same_bits(bits(again), bits(whole))


def test_a_moving_average_by_name_is_that_of_what_trains():
    """As `ema[name] = d ema[name] + (1 - d) p`, kept in a state dict and loaded as one."""
    model = adapted()
    average = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = copy.deepcopy(model)
    train(model, X)
    decay = 0.75
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter, 1 - decay)
        for parameter, trained in zip(expected.parameters(), model.parameters(), strict=True):
            parameter.lerp_(trained, 1 - decay)
        for buffer, trained in zip(expected.buffers(), model.buffers(), strict=True):
            buffer.copy_(trained)
    average |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(average)
    assert same_bits(bits(model), bits(expected))
    assert torch.equal(model.eval()(X), expected.eval()(X))
    swapped = torch.optim.swa_utils.AveragedModel(model)
    swapped.update_parameters(model)
    assert torch.equal(swapped.eval()(X), model(X))


@pytest.mark.parametrize("make", LIVES)
def test_safetensors_saves_and_loads_the_whole_model(make: Callable[[], nn.Module], tmp_path: Path):
    model, other = make(), make()
    save_model(model, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(1)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(X), model(X))
    assert set(net().state_dict()) <= set(load_file(tmp_path / "model.safetensors"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process
@pytest.mark.parametrize("make", [adapted, two, merged])
def test_distributed_checkpoints_pair_names_of_model_and_optimiser(make: Callable[[], nn.Module], tmp_path: Path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        model.zero_grad()  # a fresh optimiser's state is made by a step that torch takes with zeros
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained or [nn.Parameter(torch.zeros(1))], lr=0.01)

    model, other = make(), make()
    optimizer, fresh = optimizer_of(model), optimizer_of(other)
    if any(parameter.requires_grad for parameter in model.parameters()):
        (model(X) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        names, states = get_state_dict(model, optimizer)
        checkpoint.save({"model": names, "optimiser": states}, checkpoint_id=tmp_path, no_dist=True)
        there, states = get_state_dict(other, fresh)
        checkpoint.load({"model": there, "optimiser": states}, checkpoint_id=tmp_path, no_dist=True)
        set_state_dict(other, fresh, model_state_dict=there, optim_state_dict=states)
        trained = zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True)
        for parameter, twin in trained:
            assert torch.equal(optimizer.state[parameter]["exp_avg"], fresh.state[twin]["exp_avg"])
    else:
        checkpoint.save({"model": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
        there = other.state_dict()
        checkpoint.load({"model": there}, checkpoint_id=tmp_path, no_dist=True)
        other.load_state_dict(there)
    assert same_bits(bits(other), bits(model))
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("make", LIVES)
@pytest.mark.parametrize(
    "trip", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_and_pickles_share_nothing_and_keep_everything(
    make: Callable[[], nn.Module], trip: Callable[[nn.Module], nn.Module]
):
    model = make()
    other = trip(model)
    assert same_bits(bits(other), bits(model))
    assert torch.equal(other(X), model(X))
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(1)
    assert not any(torch.equal(left, right) for left, right in zip(model.parameters(), other.parameters(), strict=True))
    tnpeft.detach(other)
    assert list(other.state_dict()) == list(net().state_dict())
    assert {type(module) for module in other.modules()} == {type(module) for module in net().modules()}


def test_a_recurrent_layer_is_trained_as_a_whole():
    """It keeps a list of its parameters beside their table."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4, batch_first=True), "out": nn.Linear(4, 2)})
    x = torch.randn(2, 5, 3)

    def run() -> Tensor:
        # torch multiplies a strided input in another way, and rounds otherwise, by a weight that is frozen.
        return model["out"](model["rnn"](x)[0].contiguous())

    base = run()
    handle = tnpeft.attach(model, "lora", match=["out"], r=2, train={"also": ["rnn"]})
    optimizer = torch.optim.SGD(handle.parameters(), 0.5)
    assert torch.equal(run(), base)
    run().square().mean().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    optimizer.step()
    trained = run()
    assert not torch.equal(trained, base)
    with tnpeft.disabled(model):
        assert torch.equal(run(), base)
    tnpeft.merge(model)
    torch.testing.assert_close(run(), trained)
    tnpeft.unmerge(model)
    tnpeft.detach(model, merge=True)
    torch.testing.assert_close(run(), trained)


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4))


def part(wrap: Callable[[nn.Module], nn.Module], place: str) -> nn.Module:
    model = blocks()
    parent, _, key = place.rpartition(".")
    setattr(model.get_submodule(parent), key, wrap(model.get_submodule(place)))
    return model


compile_ = functools.partial(torch.compile, backend="eager")


def twice(module: nn.Module) -> nn.Module:
    return compile_(checkpoint_wrapper(module))


@pytest.mark.parametrize("wrap", [compile_, checkpoint_wrapper, twice])
@pytest.mark.parametrize("place", ["0", "1", "0.0"])
def test_wrapped_parts_have_plain_names(wrap: Callable[[nn.Module], nn.Module], place: str):
    model = part(wrap, place)
    assert same_bits(tnpeft.plain_state_dict(model), dict(blocks().state_dict()))
    tnpeft.attach(model, "lora", match="all", r=1, train={"bias": "adapted", "norm": True})
    state = tnpeft.plain_state_dict(model)
    assert list(state) == list(blocks().state_dict())
    assert set(state) == set(base_tensors(model))  # as adapter files have them
    fresh = blocks()
    fresh.load_state_dict(state, strict=True)
    assert same_bits(dict(fresh.state_dict()), dict(blocks().state_dict()))
    tnpeft.merge(model)
    assert list(tnpeft.plain_state_dict(model)) == list(blocks().state_dict())


@pytest.mark.parametrize("wrap", [compile_, nn.DataParallel, lambda model: nn.DataParallel(compile_(model))])
def test_wrapped_models_have_plain_names(wrap: Callable[[nn.Module], nn.Module]):
    model = blocks()
    for whole in (model, model[1]):
        plain = dict(whole.state_dict())
        assert same_bits(tnpeft.plain_state_dict(wrap(whole)), plain)
    tnpeft.attach(model, "lora", match="all", r=1)
    assert list(tnpeft.plain_state_dict(wrap(model))) == list(blocks().state_dict())


def test_a_layer_that_is_called_as_a_wrapper_s_keeps_its_name():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.Sequential(Both())
    assert list(tnpeft.plain_state_dict(model)) == list(model.state_dict())
