"""Serving: outputs of the merged model to the bit, whatever is switched, written or loaded meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from opaque import Doubled, PaddedConv2d
from small import move, net, net_input, quick_if, spec_cases
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

import tnpeft
from tnpeft.program import counting
from tnpeft.schedule.costs import bytes_text
from tnpeft.surgery.adapted_model import record_on

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(12, 8), torch.randn(6, 3, 12)),
    "Conv1d": lambda: (nn.Conv1d(8, 12, 3, stride=2, bias=False), torch.randn(2, 8, 9)),
    "Conv2d": lambda: (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), torch.randn(2, 8, 5, 5)),
    "Conv3d": lambda: (nn.Conv3d(8, 8, 3, padding="same"), torch.randn(2, 8, 4, 4, 4)),
    "ConvTranspose1d": lambda: (nn.ConvTranspose1d(8, 12, 3), torch.randn(2, 8, 5)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1), torch.randn(2, 8, 3, 3)),
    "ConvTranspose3d": lambda: (nn.ConvTranspose3d(8, 8, 2, stride=2), torch.randn(1, 8, 3, 3, 3)),
}
MODES = ("dense", "factored", "hybrid", "auto")


def adapted(model: nn.Module, spec: str = "lora", names: str = "ab", match: Any = "all", **how: Any) -> nn.Module:
    """A model with adapters away from their start, all of them active."""
    scopes = {scope: r"^(\d)" for scope in tnpeft.load_spec(spec).scopes if scope != "model"}
    for number, name in enumerate(names):
        for adapter in tnpeft.attach(
            model, spec, match=match, name=name, scopes=scopes or None, **how
        ).adapters.values():
            move(adapter, seed=number)
    tnpeft.activate(model, dict.fromkeys(names, 1.0))
    return model.eval()


def small(mode: str = "auto", names: str = "ab") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 4))
    return adapted(model, names=names, mode=mode, r=2, train={"bias": "adapted"})


def merged(model: nn.Module, *x: Tensor, **more: Any) -> Tensor:
    """What a merged copy gives: plain layers with the summed weight."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        tnpeft.merge(twin)
        return twin(*x, **more)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def served(model: nn.Module, x: Tensor = X) -> Tensor:
    """The output inside: twice that of the merged model, and nothing is contracted the second time."""
    expected = merged(model, x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        with counting() as counts:
            assert torch.equal(model(x), expected)
        assert not counts
    return expected


@pytest.mark.parametrize(("spec", "kind"), spec_cases(LAYERS))
def test_outputs_are_those_of_the_merged_model(spec: str, kind: str):
    for mode in ("factored", "hybrid") if spec in ("tenvoo_l", "lora", "dora") else ("auto",):
        torch.manual_seed(0)
        layer, x = LAYERS[kind]()
        model = adapted(nn.Sequential(layer, nn.Identity()), spec, mode=mode)
        with tnpeft.serving(model) as kept:
            for scales in ({"a": 1.0}, {"a": 0.5, "b": -1.5}):
                tnpeft.activate(model, scales)
                served(model, x)
            assert kept.layers == ["0"]
            assert kept.bytes == layer.weight.numel() * 4
            assert repr(kept).startswith("1 of 1 layers, ")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_layer_of_a_model(mode: str):
    model = adapted(net(), "lora", match=["first", "up", "head.0"], mode=mode, train={"bias": "adapted", "norm": True})
    x = net_input()
    with tnpeft.serving(model) as kept:
        assert repr(kept) == "0 of 3 layers, 0 B kept"
        for scales in ({"a": 1.0}, {"b": 0.5}, {"a": 1.0, "b": 1.0}, {}):
            tnpeft.activate(model, scales)
            served(model, x)
            assert len(kept.layers) == 3 * bool(scales)
        tnpeft.activate(model, "a")
        served(model, x)
        size = sum(model.get_submodule(name).base.weight.numel() for name in kept.layers) * 4
        assert repr(kept) == f"3 of 3 layers, {bytes_text(size)} kept"
    assert repr(kept) == "0 of 3 layers, 0 B kept"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_autocast_and_inference_mode(dtype: torch.dtype):
    model = small().to(dtype)
    with tnpeft.serving(model), torch.inference_mode():
        expected = merged(model, X.to(dtype))
        for _ in range(2):
            assert torch.equal(model(X.to(dtype)), expected)
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        expected = merged(model, X)
        with tnpeft.serving(model), torch.no_grad():
            for _ in range(2):
                assert torch.equal(model(X), expected)


class Parts(nn.Module):
    """An embedding, attention that reads its parameters, and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.Parameter(torch.randn(4, 32, 16) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x)[0]
        return torch.relu(torch.einsum("bti,eoi->beto", x, self.up))


@pytest.mark.parametrize("spec", ["lora", "dora", "quanta"])
def test_adapted_parameters(spec: str):
    torch.manual_seed(0)
    model = adapted(
        Parts(),
        spec,
        match=["embed", "attention.out_proj"],
        parameters={"up": "e o i", "attention.in_proj_weight": "o i"},
    )
    tokens = torch.randint(20, (2, 5))
    with tnpeft.serving(model) as kept:
        for scales in ({"a": 1.0}, {"a": 0.5, "b": 2.0}):
            tnpeft.activate(model, scales)
            served(model, tokens)
        assert set(kept.layers) == {"embed", "attention.in_proj_weight", "attention.out_proj", "up"}
        assert kept.others == []
        with pytest.raises(tnpeft.ExecutionError) as excinfo:
            model(tokens)
        assert str(excinfo.value) == GRADIENTS.replace("layer '0'", "parameter 'up'")
        model.embed.weight.sum().backward()  # reading is no call
        assert any(core.grad is not None for core in model.parameters())


def test_what_changes_inside():
    model = small()
    with tnpeft.serving(model) as kept:
        first = served(model)
        tnpeft.activate(model, "a")
        assert not kept.layers
        assert not torch.equal(served(model), first)
        handle = tnpeft.attach(model, "lora", match=["0"], name="c")
        move(handle.adapters["0"])
        tnpeft.activate(model, {"a": 1.0, "c": 0.25})
        served(model)
        handle.detach()
        served(model)
        tnpeft.activate(model, {"a": 1.0, "b": 1.0})
        assert torch.equal(served(model), first)
        with torch.no_grad():
            with tnpeft.disabled(model):
                assert torch.equal(model(X), merged_base(model))
            with counting() as counts:  # as for guidance by the base, in each step
                assert torch.equal(model(X), first)
        assert not counts
        tnpeft.merge(model)
        assert kept.layers == kept.others == []
        with torch.no_grad():
            assert torch.equal(model(X), first)
        tnpeft.unmerge(model)
        assert torch.equal(served(model), first)
        model.double()
        assert not kept.bytes
        served(model, X.double())
        model.float()
        served(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), merged(model, X))


def merged_base(model: nn.Module) -> Tensor:
    twin = copy.deepcopy(model)
    tnpeft.detach(twin)
    return twin(X)


WRITES: dict[str, Callable[[Any], object]] = {
    "core": lambda layer: layer.adapter("a").cores["up"].add_(1),
    "base weight": lambda layer: layer.base.weight.add_(1),
    "weight of another object": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(8, 8))),
    "core of another object": lambda layer: setattr(layer.adapter("a"), "core_up", nn.Parameter(torch.ones(8, 2))),
    "draw": lambda layer: layer.reset_parameters(),
    "kept weight": lambda layer: kept_of(layer).mul_(2),
}


def kept_of(layer: Any) -> Tensor:
    """The tensor that is kept for a layer."""
    return layer.results.weights.known[layer.base].total


@pytest.mark.filterwarnings("ignore:.*an assignment to `weight`")
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_seen(write: Callable[[Any], object]):
    model = small(names="a")
    with tnpeft.serving(model):
        served(model)
        with torch.no_grad():
            write(model[0])
        served(model)


def test_loading_and_swapping_inside(tmp_path: Path):
    model, other = small(), small()
    for adapter in other.modules():
        if isinstance(adapter, tnpeft.Adapter):
            move(adapter, seed=9)
    tnpeft.save(other, tmp_path / "a.safetensors", name="a")
    with tnpeft.serving(model):
        first = served(model)
        tnpeft.hot_swap(model, tmp_path / "a.safetensors", name="a")
        assert not torch.equal(served(model), first)
        model.load_state_dict(small().state_dict())
        assert torch.equal(served(model), first)
        model.load_state_dict(other.state_dict(), assign=True)
        assert not torch.equal(served(model), first)
        tnpeft.load(model, tmp_path / "a.safetensors", name="c")
        assert tnpeft.scales_of(model) == {"c": 1.0}
        served(model)


def test_a_shared_core_is_seen_by_all_its_layers():
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "vera", "a")
    with tnpeft.serving(model) as kept:
        first = served(model)
        with torch.no_grad():
            for name, core in model[1].adapter("a").cores.items():
                if name in model[1].adapter("a").shared:
                    core.mul_(2)
        assert not torch.equal(served(model), first)
        assert len(kept.layers) == 2


OPERATIONS = (
    "activate",
    "write core",
    "write weight",
    "disable",
    "load",
    "detach",
    "attach",
    "merge",
    "nested",
    "cast",
)


@settings(deadline=None, max_examples=25)
@given(
    steps=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9)), max_size=6), mode=st.sampled_from(MODES)
)
def test_any_sequence_gives_what_a_model_without_the_context_gives(steps: list[tuple[str, int]], mode: str):
    model, twin = small(mode), small(mode)
    with tnpeft.serving(model):
        for operation, number in steps:
            for each in (model, twin):
                perform(each, operation, number)
            with torch.no_grad():
                torch.testing.assert_close(model(X), twin(X))
            served(model)


def perform(model: nn.Module, operation: str, number: int) -> None:
    names = tnpeft.names_of(model)
    layer: Any = model[(0, 2, 3)[number % 3]]
    with torch.no_grad():
        if operation == "activate":
            scales = {name: (1.0, 0.5, -2.0)[(number + place) % 3] for place, name in enumerate(names)}
            tnpeft.activate(model, dict([*scales.items()][: number % 3]))
        elif operation == "write core":
            move(layer.adapter(layer.names[0]), seed=number)
        elif operation == "write weight":
            layer.base.weight.add_(0.1 * number)
        elif operation == "disable":
            with tnpeft.disabled(model):
                model(X)
        elif operation == "load":
            values = {key: tensor + 0.01 * number for key, tensor in model.state_dict().items()}
            model.load_state_dict(values, assign=number % 2 == 0)
        elif operation == "detach" and len(names) > 1:
            tnpeft.detach(model, name=names[number % len(names)], merge=number % 2 == 0)
        elif operation == "attach":
            handle = tnpeft.attach(model, "lora", match=["0"], name=f"n{len(names)}-{number}-{hash(tuple(names))}", r=1)
            move(handle.adapters["0"], seed=number)
        elif operation == "merge":
            tnpeft.merge(model)
            model(X)
            tnpeft.unmerge(model)
        elif operation == "nested":
            with tnpeft.serving(model):
                model(X)
        elif operation == "cast":
            model.to(torch.float64).to(torch.float32)


def test_contexts_nest_and_end_after_exceptions():
    model = small()
    sites = [layer.site for layer in (model[0], model[2], model[3])]
    known: list[weakref.ref[Tensor]] = []

    def fails() -> None:
        with tnpeft.serving(model) as kept:
            with tnpeft.serving(model) as inner, torch.no_grad():
                model(X)
                assert kept.bytes == inner.bytes > 0
            assert kept.bytes > 0
            known.append(weakref.ref(kept_of(model[0])))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    gc.collect()
    assert known[0]() is None
    assert [layer.site for layer in (model[0], model[2], model[3])] == sites
    model(X).sum().backward()


def test_everything_may_be_detached_and_attached_anew_inside():
    model = small()
    with tnpeft.serving(model), torch.no_grad():
        model(X)
        tnpeft.detach(model)
        model(X)
        adapted(model, names="a", r=2)
        served(model)
    assert not record_on(model).results.weights.opened
    model(X).sum().backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_begin_without(copied: Callable[[nn.Module], nn.Module]):
    model = small()
    with tnpeft.serving(model) as kept, torch.no_grad():
        expected = model(X)
        size = len(pickle.dumps(model))
        twin = copied(model)
        assert not record_on(twin).results.weights.opened
        torch.testing.assert_close(twin(X), expected)
        assert kept.bytes > 0
    assert abs(size - len(pickle.dumps(model))) < 100
    twin(X).sum().backward()


def test_threads_use_one_set_and_the_last_one_ends_it():
    model = small()
    expected = merged(model, X)
    inside, leave, found = threading.Event(), threading.Event(), []

    def work() -> None:
        with torch.no_grad(), tnpeft.serving(model):
            inside.set()
            leave.wait()
            found.append(torch.equal(model(X), expected))

    thread = threading.Thread(target=work)
    with tnpeft.serving(model) as kept, torch.no_grad():
        thread.start()
        inside.wait()
        model(X)
        known = kept_of(model[0])
    assert kept_of(model[0]) is known
    leave.set()
    thread.join()
    assert found == [True]
    assert not kept.bytes


def test_many_threads_make_each_weight_once():
    model = small()
    expected = merged(model, X)
    found: list[bool] = []

    def work() -> None:
        with torch.no_grad():
            found.append(torch.equal(model(X), expected))

    threads = [threading.Thread(target=work) for _ in range(8)]
    with tnpeft.serving(model), counting() as counts:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 8
    assert counts["deltas"] == [1] * 6  # of two adapters on three layers


GRADIENTS = (
    "layer '0': a call inside `tnpeft.serving`: expected calls without gradients, found one that autograd records. "
    "Use `torch.no_grad()` or `torch.inference_mode()`."
)
DROPPED = (
    "layer '0': a call inside `tnpeft.serving`: expected calls that leave nothing out, found a layer in training mode, "
    "whose adapter has dropout. Call `model.eval()` first."
)


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), Doubled(8, 6)], ids=["Linear", "opaque"])
def test_gradients_are_refused(layer: nn.Module):
    model = adapted(nn.Sequential(copy.deepcopy(layer)), names="a")
    with tnpeft.serving(model):
        with pytest.raises(tnpeft.ExecutionError) as excinfo:
            model(X)
        assert str(excinfo.value) == GRADIENTS
        model.requires_grad_(False)
        with pytest.raises(tnpeft.ExecutionError) as excinfo:
            model(X.clone().requires_grad_())
        assert str(excinfo.value) == GRADIENTS
        expected = model(X)  # nothing is recorded
        with torch.no_grad():
            assert torch.equal(model(X.clone().requires_grad_()), expected)
    assert not expected.requires_grad


def test_a_trained_bias_is_refused_too():
    model = adapted(nn.Sequential(nn.Linear(8, 6)), names="a", train={"bias": "adapted"})
    for core in model[0].adapter("a").parameters():
        core.requires_grad_(False)
    with tnpeft.serving(model), pytest.raises(tnpeft.ExecutionError) as excinfo:
        model(X)
    assert str(excinfo.value) == GRADIENTS


@pytest.mark.parametrize("dropout", [{"input": 0.5}, {"bond": 0.5}], ids=["input", "bond"])
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), Doubled(8, 6)], ids=["Linear", "opaque"])
def test_dropout_is_refused_in_training_mode(layer: nn.Module, dropout: dict[str, Any]):
    model = adapted(nn.Sequential(copy.deepcopy(layer)), names="a", dropout=dropout)
    with tnpeft.serving(model), torch.no_grad():
        expected = model(X)
        model.train()
        with pytest.raises(tnpeft.ExecutionError) as excinfo:
            model(X)
        assert str(excinfo.value) == DROPPED
        model.eval()
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("layer", [Doubled(8, 6), PaddedConv2d(8, 8, 3), "weight norm"], ids=str)
def test_opaque_layers_compute_as_without(layer: Any):
    layer = parametrizations.weight_norm(nn.Linear(8, 6)) if layer == "weight norm" else copy.deepcopy(layer)
    model = adapted(nn.Sequential(layer))
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        expected = model(x)
        with tnpeft.serving(model) as kept:
            torch.testing.assert_close(model(x), expected)
            assert (kept.layers, kept.others, kept.bytes) == ([], ["0"], 0)


def test_offloaded_layers_compute_as_without():
    model = small()
    expected = merged(model, X)
    accelerate.cpu_offload(model, execution_device="cpu")
    with tnpeft.serving(model) as kept, torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(X), expected)
        assert repr(kept) == "0 of 3 layers, 0 B kept"


def test_rows_are_their_threads_own():
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)))
    names = ["a", "b", None, "a", "b"]
    with torch.no_grad(), tnpeft.rows(model, names):
        expected = model(X)
    found: list[Tensor] = []

    def other() -> None:
        with torch.no_grad():
            found.append(model(X))

    whole = merged(model, X)
    with tnpeft.serving(model), torch.no_grad():
        model(X)
        with tnpeft.rows(model, names):
            torch.testing.assert_close(model(X), expected)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            with torch.enable_grad(), pytest.raises(tnpeft.ExecutionError, match="calls without gradients"):
                model(X)
        assert torch.equal(model(X), whole)
    assert torch.equal(found[0], whole)
    with tnpeft.rows(model, names), torch.no_grad(), tnpeft.serving(model):
        torch.testing.assert_close(model(X), expected)


def test_whoever_looks_on_gets_what_is_right():
    model = small("factored")
    expected = merged(model, X)
    values = {name: tensor * 2 for name, tensor in model.named_parameters()}
    with torch.no_grad():
        doubled = torch.func.functional_call(model, values, X)
    assert not torch.allclose(doubled, expected)
    with tnpeft.serving(model), torch.no_grad():
        model(X)
        torch.testing.assert_close(make_fx(model)(X)(X), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), expected)
        torch.testing.assert_close(torch.vmap(model)(X), expected)
        torch.testing.assert_close(torch.func.functional_call(model, values, X), doubled)
        assert torch.equal(model(X), expected)
        with torch.enable_grad(), pytest.raises(tnpeft.ExecutionError, match="calls without gradients"):
            torch.func.grad(lambda x: model(x).sum())(X)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_models(fullgraph: bool):
    model = small()
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    expected = merged(model, X)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), expected)
        with tnpeft.serving(compiled):
            torch.testing.assert_close(compiled(X), expected)
            tnpeft.activate(compiled, "a")
            torch.testing.assert_close(compiled(X), merged(model, X))


def test_accumulating_goes_on_after_it():
    model = small()
    with tnpeft.accumulating(model):
        first = model(X)
        with tnpeft.serving(model), torch.no_grad():
            assert torch.equal(model(X), merged(model, X))
        model(X).sum().backward()
        torch.testing.assert_close(model(X), first)


def test_nothing_attached_is_refused():
    with (
        pytest.raises(tnpeft.AttachError, match="expected an attached adapter, found none"),
        tnpeft.serving(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("train", [quick_if(True, True), quick_if(False, False)])
def test_weights_that_train_as_a_whole_act_in_the_sum(train: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    adapted(model, names="b", match=["1"], train={"also": [r"^0\.weight$"]})
    adapted(model, names="a", match=["0"])
    copy_of = dict(model.named_parameters())["0._tnpeft_of_b:weight"]
    with torch.no_grad():
        copy_of.add_(0.5)
    with tnpeft.serving(model):
        for scales in ({"a": 1.0, "b": 0.5}, {"b": 1.0}, {"a": 1.0, "b": 1.0}):
            tnpeft.activate(model, scales)
            served(model)
        if train:
            tnpeft.activate(model, {"b": 1.0})
            with torch.no_grad():
                copy_of.mul_(2)
            served(model)


def test_the_first_volume_of_a_convolution_is_called_as_torch_calls_it():
    """Without gradients nothing is cut in two: the bits are those of a plain layer with the summed weight."""
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Conv3d(16, 16, 3, padding=1)), "tenvoo_l", "a", r=2)
    x = torch.randn(1, 16, 8, 8, 8)
    plain = copy.deepcopy(model)
    tnpeft.detach(plain, merge=True)
    with torch.no_grad(), tnpeft.serving(model):
        assert torch.equal(model(x), plain(x))
