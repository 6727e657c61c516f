"""Adapted parameters compute what the plain model does with the summed weights, whoever calls, records or compiles."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from small import quick_if
from torch import Tensor, nn

import tnpeft
from tests.beside_layers import PARAMETERS, TOKENS, attached, close, expected, model, summed, train
from tnpeft.errors import ExecutionError
from tnpeft.execution import parameters as adapted_parameters

LINEAR = [name for name in tnpeft.list_specs() if "Linear" in tnpeft.load_spec(name).layers]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of parameters whose sums are made."""
    made: list[str] = []
    make = adapted_parameters.summed_weight

    def noted(site: Any, *rest: Any) -> Tensor:
        made.append(site.name)
        return make(site, *rest)

    monkeypatch.setattr(adapted_parameters, "summed_weight", noted)
    return made


@pytest.mark.parametrize("name", [name for name in LINEAR if name not in ("lorta", "metatt")])
def test_every_spec_starts_exactly_and_is_the_sum(name: str) -> None:
    spec = tnpeft.load_spec(name)
    adapted, base = model(), model()
    start = adapted(TOKENS)
    scopes = dict.fromkeys(spec.scopes, r"(\d)")
    handle = tnpeft.attach(adapted, spec, parameters=PARAMETERS, scopes=scopes)
    assert torch.equal(adapted(TOKENS), start)
    train(handle)
    close(adapted(TOKENS), expected(base, handle, TOKENS), 1e-3)
    assert handle.report().cores == sum(parameter.numel() for parameter in handle.parameters())


@pytest.mark.parametrize("spec", ["lora", "loha", "dora", "quanta"])
def test_gradients_are_those_of_the_sum(spec: str) -> None:
    adapted, base, handle = attached(spec)
    output = adapted(TOKENS)
    along = torch.randn_like(output)
    cores = list(handle.parameters())
    grads = torch.autograd.grad((output * along).sum(), cores)
    plain = torch.func.functional_call(copy.deepcopy(base).double(), summed(base, {handle: 1.0}), (TOKENS,))
    for grad, wanted in zip(grads, torch.autograd.grad((plain * along).sum(), cores), strict=True):
        close(grad, wanted, 1e-3)


def test_a_sum_is_made_once_in_a_forward_pass(sums: list[str]) -> None:
    adapted, _, _ = attached()
    adapted(TOKENS)
    names = ["embed", "blocks.0.square", "blocks.0.experts", "blocks.1.square", "blocks.1.experts"]
    assert sums == names  # read once for each expert, and twice at that
    adapted(TOKENS)
    assert sums == names * 2


def test_a_sum_is_made_once_in_a_call_of_its_owner(sums: list[str]) -> None:
    adapted, _, _ = attached()
    adapted.blocks[0](torch.randn(2, 8))
    assert sums == ["blocks.0.square", "blocks.0.experts"]


def test_what_was_written_meanwhile_is_seen() -> None:
    adapted, base, handle = attached()

    def write(block: Any, _inputs: Any) -> None:
        before = block.square
        with torch.no_grad():
            handle.adapters["blocks.1.square"].cores["up"].add_(1.0)
        assert not torch.equal(block.square, before)

    adapted.blocks[1].register_forward_pre_hook(write)
    output = adapted(TOKENS)
    close(output, expected(base, handle, TOKENS))


def test_activation_checkpointing_makes_a_sum_once_in_each_call(sums: list[str]) -> None:
    adapted, _, handle = attached()
    cores = list(handle.parameters())
    grads = torch.autograd.grad(adapted(TOKENS).square().sum(), cores)
    adapted.checkpointing = True
    sums.clear()
    again = torch.autograd.grad(adapted(TOKENS).square().sum(), cores)
    assert len(sums) == 5 + 4  # the blocks' twice
    for grad, wanted in zip(again, grads, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_accumulating_keeps_sums() -> None:
    adapted, _, handle = attached(mode="auto")
    cores = list(handle.parameters())
    grads = torch.autograd.grad(adapted(TOKENS).square().sum(), cores)
    with tnpeft.accumulating(adapted):
        for _ in range(2):
            again = torch.autograd.grad(adapted(TOKENS).square().sum(), cores)
            for grad, wanted in zip(again, grads, strict=True):
                torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("mode", [quick_if(mode == "factored", mode) for mode in ("dense", "factored")])
def test_compiled_graphs_follow_what_acts(mode: str) -> None:
    adapted, base, _ = attached(mode=mode)
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    output = adapted(TOKENS)
    torch.testing.assert_close(compiled(TOKENS), output, rtol=1e-4, atol=1e-5)
    tnpeft.merge(adapted)
    torch.testing.assert_close(compiled(TOKENS), output, rtol=1e-4, atol=1e-5)
    tnpeft.unmerge(adapted)
    with tnpeft.disabled(adapted):
        torch.testing.assert_close(compiled(TOKENS), base(TOKENS))
    part, _, _ = attached(mode=mode)
    part.blocks[0].compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(part(TOKENS), output, rtol=1e-4, atol=1e-5)


def test_exported_and_traced_graphs() -> None:
    adapted, _, _ = attached()
    output = adapted(TOKENS)
    torch.testing.assert_close(torch.export.export(adapted, (TOKENS,)).module()(TOKENS), output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of tracing
        torch.testing.assert_close(torch.jit.trace(adapted, (TOKENS,))(TOKENS), output)


def test_merged_models_are_scripted() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.square = nn.Embedding(20, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens) @ self.square

    small = Small()
    train(tnpeft.attach(small, "lora", match=["table"], parameters={"square": "i o"}))
    output = small(TOKENS)
    tnpeft.merge(small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that scripts are deprecated
        torch.testing.assert_close(torch.jit.script(small)(TOKENS), output)


def test_a_symbolic_trace_is_refused() -> None:
    adapted, _, _ = attached()
    with pytest.raises(ExecutionError) as caught:
        torch.fx.symbolic_trace(adapted)
    assert str(caught.value) == (
        "parameter 'blocks.0.square': an adapted parameter: expected calls that read it, found "
        "`torch.fx.symbolic_trace`, whose graph would hold its values of now. Merge first (`tnpeft.merge`), or let the "
        "tracer take the module that holds it as a leaf."
    )
    tnpeft.merge(adapted)
    assert torch.equal(torch.fx.symbolic_trace(adapted)(TOKENS), adapted(TOKENS))


def test_transforms_see_cores_and_base() -> None:
    adapted, _, _ = attached()
    output = adapted(TOKENS)
    named = dict(adapted.named_parameters())
    cores = {name: tensor for name, tensor in named.items() if ".core_" in name}

    def total(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(adapted, given, (TOKENS,)).sum()

    grads = torch.func.grad(total)(cores)
    output.sum().backward()
    for name, core in cores.items():
        torch.testing.assert_close(grads[name], core.grad, rtol=1e-4, atol=1e-5)
    stacked = {name: torch.stack([core, 2 * core]) for name, core in cores.items()}
    both = torch.vmap(lambda given: torch.func.functional_call(adapted, given, (TOKENS,)))(stacked)
    torch.testing.assert_close(both[0], output, rtol=1e-4, atol=1e-5)
    square = torch.randn(8, 8)
    swapped = torch.func.functional_call(adapted, {"blocks.0.square": square}, (TOKENS,))
    adapted.load_state_dict({"blocks.0.square": square}, strict=False)
    torch.testing.assert_close(adapted(TOKENS), swapped)


def test_second_derivatives() -> None:
    adapted, _, handle = attached("loha")
    cores = list(handle.parameters())
    grads = torch.autograd.grad(adapted(TOKENS).square().sum(), cores, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), cores)
    assert all(bool(grad.isfinite().all()) for grad in second)


def test_threads_give_what_one_gives() -> None:
    adapted, _, _ = attached()
    output, found = adapted(TOKENS), []
    threads = [threading.Thread(target=lambda: found.extend(adapted(TOKENS) for _ in range(5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for each in found:
        torch.testing.assert_close(each, output)


@pytest.mark.parametrize("different", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attention_reads_the_sums_of_all_its_weights(different: bool, training: bool) -> None:
    sizes = {"kdim": 6, "vdim": 4} if different else {}
    torch.manual_seed(0)
    base = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2, batch_first=True, **sizes)}).train(training)
    adapted = copy.deepcopy(base)
    inputs = torch.randn(2, 5, 8), torch.randn(2, 3, sizes.get("kdim", 8)), torch.randn(2, 3, sizes.get("vdim", 8))
    start = adapted["attend"](*inputs)[0]
    handle = tnpeft.attach(adapted, "lora", match="out_proj", parameters="proj_weight$")
    assert len(handle.adapters) == (4 if different else 2)
    assert torch.equal(adapted["attend"](*inputs)[0], start)
    train(handle)
    state = {name.removeprefix("attend."): tensor for name, tensor in summed(base, {handle: 1.0}).items()}
    plain = copy.deepcopy(base["attend"]).double()
    wanted = torch.func.functional_call(plain, state, tuple(each.double() for each in inputs))[0]
    close(adapted["attend"](*inputs)[0], wanted)
    with torch.no_grad():  # torch's fast path, in eval
        close(adapted["attend"](*inputs)[0], wanted)
    with torch.inference_mode():
        close(adapted["attend"](*inputs)[0], wanted)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fast_path_of_a_transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    adapted = copy.deepcopy(base)
    x, absent = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    absent[1, 3:] = True
    with torch.no_grad():
        start = base(x, src_key_padding_mask=absent)
    handle = tnpeft.attach(adapted, "lora", match="all", parameters=r"in_proj_weight$", mode="dense")
    assert handle.report().notes == []
    with torch.no_grad():
        assert torch.equal(adapted(x, src_key_padding_mask=absent), start)
    train(handle)
    wanted = expected(base, handle, x, src_key_padding_mask=absent)[~absent]
    with torch.no_grad():
        close(adapted(x, src_key_padding_mask=absent)[~absent], wanted)
    close(adapted(x, src_key_padding_mask=absent)[~absent], wanted)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"rnn": kind(6, 5, 2, batch_first=True)})
    adapted, x = copy.deepcopy(base), torch.randn(2, 4, 6)
    start = adapted["rnn"](x)[0]
    handle = tnpeft.attach(adapted, "lora", parameters=["rnn.weight_ih_l0", "rnn.weight_hh_l1"])
    assert torch.equal(adapted["rnn"](x)[0], start)
    train(handle)
    state = {name.removeprefix("rnn."): tensor for name, tensor in summed(base, {handle: 1.0}).items()}
    output = adapted["rnn"](x)[0]
    close(output, torch.func.functional_call(copy.deepcopy(base["rnn"]).double(), state, (x.double(),))[0])
    assert torch.equal(copy.deepcopy(adapted)["rnn"](x)[0], output)
    tnpeft.merge(adapted)
    torch.testing.assert_close(adapted["rnn"](x)[0], output)
    tnpeft.detach(adapted)
    assert torch.equal(adapted["rnn"](x)[0], start)


def test_lists_of_parameters() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
            self.named = nn.ParameterDict({"last": torch.randn(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            for each in self.many:
                x = x @ each
            return x @ self.named["last"]

    torch.manual_seed(0)
    adapted = Lists()
    base, x = copy.deepcopy(adapted), torch.randn(3, 4)
    handle = tnpeft.attach(adapted, "lora", parameters={".": "i o"})
    assert list(handle.adapters) == ["many.0", "many.1", "named.last"]
    assert torch.equal(adapted(x), base(x))
    train(handle)
    close(adapted(x), expected(base, handle, x))
    assert len(adapted.many) == 2
