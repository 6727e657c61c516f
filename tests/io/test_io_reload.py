"""Files onto names that are attached: values in place, or a refusal that leaves everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saved import refused
from small import TARGETS, Net, bits, move, net, net_input, quick_if, same_bits
from torch import nn

import tnpeft
from tnpeft.errors import AdapterFileError, AttachError
from tnpeft.io import load
from tnpeft.surgery import record_of

X = net_input()
# One for each sort of core: plain, frozen copy, drawn and frozen, shared and trained, a magnitude, the base weight.
SPECS = ("lora", "tt_lora", "lora_fa", "vera", "lotr", "dora", "hira", "pissa", "loha")
BESIDE = {"bias": "adapted", "norm": True}


def adapted(spec: str, seed: int, name: str = "default", model: nn.Module | None = None, **how: object) -> nn.Module:
    """The small model with an adapter whose values come from a seed, norms and their statistics too."""
    model = net() if model is None else model
    scopes = dict.fromkeys(tnpeft.load_spec(spec).scopes, "head")
    handle = tnpeft.attach(model, spec, match=[t for t in TARGETS if t.startswith("head")], name=name, train=BESIDE,
                           scopes=scopes or None, seed=seed, **how)  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model.train()(X * seed)  # running statistics of its own
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("spec", SPECS)
def test_values_are_loaded_in_place(spec: str, folder: Path):
    model, other = adapted(spec, 1), adapted(spec, 2)
    tnpeft.save(other, folder / "other")
    handle = tnpeft.Handle(model, "default")
    before = dict(handle.named_parameters())
    optimiser = torch.optim.Adam(before.values())
    model(X).sum().backward()
    optimiser.step()
    steps = {name: optimiser.state[parameter]["exp_avg"].clone() for name, parameter in before.items()}
    loaded = load(model, folder / "other")
    after = dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert all(torch.equal(optimiser.state[after[name]]["exp_avg"], step) for name, step in steps.items())
    fresh = net()
    load(fresh, folder / "other")
    assert torch.equal(model(X), fresh(X))
    torch.testing.assert_close(model(X), other(X))
    assert record_of(model, "default") == record_of(other, "default")
    tnpeft.save(model, folder / "again")
    assert (folder / "again").read_bytes() == (folder / "other").read_bytes()
    tnpeft.detach(model)
    assert torch.equal(model(X), net()(X))


def test_loading_makes_the_adapter_the_only_one_that_acts_and_swapping_does_not(folder: Path):
    model = adapted("lora", 1)
    adapted("loha", 3, name="second", model=model)
    alone = adapted("lora", 2)
    tnpeft.activate(alone, {"default": 0.5})
    tnpeft.save(alone, folder / "half")
    tnpeft.activate(model, {"default": 1.0, "second": 2.0})
    handle = tnpeft.hot_swap(model, folder / "half", "default")
    assert tnpeft.scales_of(model) == {"default": 0.5, "second": 2.0}
    expected = net()
    load(expected, folder / "half")
    adapted("loha", 3, name="second", model=expected)
    tnpeft.save(model, folder / "second", "second")
    load(expected, folder / "second")
    tnpeft.activate(expected, {"default": 0.5, "second": 2.0})
    torch.testing.assert_close(model(X), expected(X))  # biases and norms are sums of both adapters'
    tnpeft.activate(model, "second")
    handle.hot_swap(folder / "half")
    assert tnpeft.scales_of(model) == {"second": 1.0}
    load(model, folder / "half", "default")
    assert tnpeft.scales_of(model) == {"default": 0.5}
    assert torch.equal(model(X), alone(X))


def test_what_a_file_calls_its_adapter_does_not_matter_to_a_swap(folder: Path):
    model, other = adapted("lora", 1), adapted("lora", 2, name="other")
    tnpeft.save(other, folder / "other")
    assert tnpeft.hot_swap(model, folder / "other").name == "default"
    assert tnpeft.names_of(model) == ("default",)
    assert torch.equal(model(X), other(X))


@pytest.mark.parametrize("spec", ["lora", quick_if(False, "tt_lora"), quick_if(False, "dora")])
def test_a_compiled_model_is_not_compiled_again(spec: str, folder: Path):
    torch._dynamo.reset()
    model, other = adapted(spec, 1), adapted(spec, 2)
    tnpeft.save(other, folder / "other")
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        tnpeft.hot_swap(compiled, folder / "other")
        torch.testing.assert_close(compiled(X), other(X))
        load(model, folder / "other")
        torch.testing.assert_close(compiled(X), other(X))
    torch._dynamo.reset()


def test_kept_results_are_made_of_the_new_values(folder: Path):
    model, other = adapted("lora", 1), adapted("lora", 2)
    tnpeft.save(other, folder / "other")
    expected = other(X)
    with tnpeft.accumulating(model):
        model(X)
        tnpeft.hot_swap(model, folder / "other")
        assert torch.equal(model(X), expected)
    for _ in range(3):  # what layers have alike is contracted together
        model(X)
    tnpeft.hot_swap(model, folder / "other")
    assert torch.equal(model(X), expected)


def test_another_rank_spec_or_other_layers_are_refused_by_name(folder: Path):
    model = adapted("lora", 1, r=2)
    way_out = "Detach 'default' first, or load the file under another name."
    for other, said in (
        (adapted("lora", 2, r=3), "layer 'head.0': params of its adapter: expected r=2, alpha=2, found r=3, alpha=3."),
        (adapted("loha", 2, r=2), "layer 'head.0': spec of its adapter: expected 'lora', found 'loha'."),
    ):
        tnpeft.save(other, folder / "other")
        for act in (load, tnpeft.hot_swap):
            assert refused(model, folder / "other", act, AttachError) == f"FILE: {said} {way_out}"
    wide = net()
    tnpeft.attach(wide, "lora", match="wide|head", r=2)
    tnpeft.save(wide, folder / "wide")
    assert refused(model, folder / "wide", error=AttachError).splitlines() == [
        f"FILE: layers of the adapter: expected the layers that 'default' adapts, found also 'wide', 'head.2'. "
        f"{way_out}",
        f"FILE: trained beside the cores: expected what 'default' trains, found none for 'head.0.bias', 'norm.weight', "
        f"'norm.bias', 'batch_norm.weight', 'batch_norm.bias'. {way_out}",
    ]
    tnpeft.load(model, folder / "wide", name="second")
    with pytest.raises(AttachError) as caught:
        tnpeft.hot_swap(model, folder / "wide")
    assert str(caught.value) == "adapter name: expected one of 'default', 'second', found none. Pass `name=`."
    with pytest.raises(AttachError) as caught:
        tnpeft.hot_swap(model, folder / "wide", "secnd")
    assert str(caught.value) == (
        "adapter name: expected one of 'default', 'second', found 'secnd'. Did you mean `second`?"
    )


def test_merged_disabled_and_plain_models_are_refused(folder: Path):
    model = adapted("lora", 1)
    tnpeft.save(model, folder / "a")
    with tnpeft.disabled(model):
        assert refused(model, folder / "a", tnpeft.hot_swap, AttachError) == (
            "FILE: model: expected enabled adapters, found adapters disabled by `tnpeft.disabled`. "
            "Leave the `disabled` context first."
        )
    tnpeft.merge(model)
    for act in (load, tnpeft.hot_swap):
        assert refused(model, folder / "a", act, AttachError) == (
            "FILE: model: expected an unmerged model, found a merged one. Call `tnpeft.unmerge(model)` first."
        )
    tnpeft.detach(model)
    with pytest.raises(AttachError, match="expected an attached adapter, found none"):
        tnpeft.hot_swap(model, folder / "a")


def test_files_that_are_none_change_nothing(folder: Path):
    model = adapted("lora", 1)
    (folder / "junk").write_bytes(b"junk" * 9)
    before = bits(model)
    for act in (load, tnpeft.hot_swap):
        with pytest.raises(AdapterFileError):
            act(model, folder / "junk")
    assert same_bits(bits(model), before)


def test_cores_that_would_lose_digits_or_are_on_meta_are_refused(folder: Path):
    wide, narrow = adapted("lora", 1).double().float(), adapted("lora", 2)  # cores stay wide
    tnpeft.save(wide, folder / "wide")
    tnpeft.save(narrow, folder / "narrow")
    way_out = "Detach 'default' first, or load the file under another name."
    assert refused(narrow, folder / "wide", tnpeft.hot_swap, AttachError) == (
        f"FILE: layer 'head.0': core 'down': expected float32, found float64. {way_out}"
    )
    tnpeft.hot_swap(wide, folder / "narrow")
    torch.testing.assert_close(wide(X), narrow(X))
    with torch.device("meta"):
        empty = Net()
    tnpeft.attach(empty, "lora", match=["head.0"], train=BESIDE)
    empty.load_state_dict(net().state_dict(), strict=False, assign=True)
    with pytest.raises(AttachError) as caught:
        tnpeft.hot_swap(empty, folder / "narrow")
    assert str(caught.value) == (
        f"{folder / 'narrow'}: layer 'head.0': core 'down': expected one with all of its values, "
        f"found none (it is on the meta device). {way_out}"
    )


def test_a_peft_folder_is_loaded_in_place(folder: Path):
    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    x, ours = torch.randn(3, 8), layers()
    handle = tnpeft.attach(ours, "lora", match="0", r=2)
    move(handle.adapters["0"])
    tnpeft.save_foreign(ours, folder / "one", "peft")
    expected = ours(x)
    model = layers()
    cores = [*tnpeft.load_foreign(model, folder / "one").parameters()]
    with torch.no_grad():
        for core in cores:
            core.zero_()
    again = tnpeft.load_foreign(model, folder / "one")
    assert all(one is other for one, other in zip(cores, again.parameters(), strict=True))
    torch.testing.assert_close(model(x), expected)


def test_values_of_a_parameter_the_other_way_round_are_refused(folder: Path):
    def square(axes: str) -> nn.Module:
        torch.manual_seed(0)
        owner = nn.RNN(4, 4)
        tnpeft.attach(owner, "lora", parameters={"weight_hh_l0$": axes}, r=2)
        return owner

    tnpeft.save(square("i o"), folder / "turned")
    model = square("o i")
    state = bits(model)
    with pytest.raises(AttachError) as caught:
        tnpeft.hot_swap(model, folder / "turned")
    assert str(caught.value) == (
        f"{folder / 'turned'}: layer 'weight_hh_l0': the layer its adapter is for: expected Linear(4, 4), found "
        "Linear(4, 4, turned). Detach 'default' first."
    )
    assert same_bits(bits(model), state)
