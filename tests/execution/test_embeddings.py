"""Embeddings: exact lookups of W + dW, by rows where these are few, in every mode and with every spec."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional

import tnpeft
from tests.beside_layers import train
from tnpeft.errors import AttachError, ExecutionError
from tnpeft.execution import parameters as adapted_parameters

ROWS, OUT = 50, 12
TOKENS = torch.tensor([[0, 3, 7, 49], [3, 3, 12, 0]])
LINEAR = [name for name in tnpeft.list_specs() if "Linear" in tnpeft.load_spec(name).layers]


def model(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(ROWS, OUT, **options), nn.Linear(OUT, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LINEAR)
def test_rows_are_those_of_the_sum(name: str) -> None:
    spec = tnpeft.load_spec(name)
    for mode in ("factored", "dense") if name in ("lora", "loha", "quanta", "dora") else ("factored",):
        adapted, base = model(padding_idx=3), model(padding_idx=3)
        start = adapted(TOKENS)
        handle = tnpeft.attach(adapted, spec, match=["0"], mode=mode, scopes=dict.fromkeys(spec.scopes, r"(\d)"))
        assert torch.equal(adapted(TOKENS), start)
        train(handle)
        weight = base[0].weight.detach() + handle.adapters["0"].delta_weight()
        wanted = base[1](functional.embedding(TOKENS, weight, padding_idx=3))
        output = adapted(TOKENS)
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
        cores, along = list(handle.parameters()), torch.randn_like(output)
        grads, others = (torch.autograd.grad((each * along).sum(), cores) for each in (output, wanted))
        for grad, other in zip(grads, others, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4)


def test_few_rows_never_make_the_whole_update(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[object] = []
    make = adapted_parameters.summed_weight
    monkeypatch.setattr(adapted_parameters, "summed_weight", lambda *given: whole.append(1) or make(*given))
    adapted = model()
    tnpeft.attach(adapted, "lora", match=["0"])
    adapted(TOKENS)
    assert not whole
    adapted(torch.arange(ROWS))
    assert len(whole) == 1  # as many rows as there are
    adapted[0].weight  # noqa: B018 - whoever reads it gets the whole sum
    assert len(whole) == 2


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_of_any_shape_and_weights_of_any_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = nn.Sequential(nn.Embedding(ROWS, OUT, dtype=dtype))
    base = copy.deepcopy(table)
    handle = tnpeft.attach(table, "loha", match="0", mode="factored")
    tokens = torch.randint(ROWS, shape, dtype=torch.int32)
    assert torch.equal(table(tokens), base(tokens))
    train(handle)
    weight = table[0].weight
    found = table(tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, functional.embedding(tokens, weight), rtol=1e-2 if dtype.itemsize < 4 else 1e-4, atol=1e-5
    )


def test_gradients_are_scaled_by_frequency() -> None:
    table = nn.Sequential(nn.Embedding(ROWS, OUT, scale_grad_by_freq=True))
    base = copy.deepcopy(table)
    handle = tnpeft.attach(table, "lora", match="0", mode="factored")
    train(handle)
    weight = base[0].weight.detach() + handle.adapters["0"].delta_weight()
    wanted = functional.embedding(TOKENS, weight, scale_grad_by_freq=True)
    cores = list(handle.parameters())
    grads, others = (torch.autograd.grad(each.square().sum(), cores) for each in (table(TOKENS), wanted))
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other)


def test_a_subclass_with_a_forward_of_its_own_reads_the_sum() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input) * 3

    table = nn.Sequential(Scaled(ROWS, OUT))
    base = copy.deepcopy(table)
    handle = tnpeft.attach(table, "lora", match="0")
    assert torch.equal(table(TOKENS), base(TOKENS))
    train(handle)
    weight = base[0].weight + handle.adapters["0"].delta_weight()
    torch.testing.assert_close(table(TOKENS), 3 * functional.embedding(TOKENS, weight))


def test_bags_read_the_sum() -> None:
    bags = nn.Sequential(nn.EmbeddingBag(ROWS, OUT))
    base = copy.deepcopy(bags)
    handle = tnpeft.attach(bags, "lora", match="0")
    assert torch.equal(bags(TOKENS), base(TOKENS))
    train(handle)
    weight = base[0].weight + handle.adapters["0"].delta_weight()
    torch.testing.assert_close(bags(TOKENS), functional.embedding_bag(TOKENS, weight))


def test_several_adapters_at_their_scales() -> None:
    adapted, base = model(), model()
    first = tnpeft.attach(adapted, "lora", match=["0"], mode="factored")
    train(first)
    second = tnpeft.attach(adapted, "loha", match=["0"], name="second", mode="factored")
    train(second)
    tnpeft.activate(adapted, {"default": 0.5, "second": -2.0})
    weight = base[0].weight + 0.5 * first.adapters["0"].delta_weight() - 2.0 * second.adapters["0"].delta_weight()
    torch.testing.assert_close(adapted(TOKENS), base[1](functional.embedding(TOKENS, weight)), rtol=1e-4, atol=1e-5)


def test_values_and_counts_are_those_of_peft() -> None:
    base = model()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    ours = copy.deepcopy(base)
    handle = tnpeft.attach(ours, "lora", match=["0"], r=2, alpha=6)
    train(handle)
    adapter, layer = handle.adapters["0"], theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_embedding_A["default"].copy_(adapter.cores["down"])
        layer.lora_embedding_B["default"].copy_(adapter.cores["up"])
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS))
    assert handle.report().trained == sum(each.numel() for each in theirs.parameters() if each.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_norm": 1.0},
            "layer '0': embedding: expected one that only reads its weight, found max_norm=1, which writes to the "
            "weight. Set `max_norm` to None, and clip the rows.",
        ),
        (
            {"sparse": True},
            "layer '0': embedding: expected dense gradients, found `sparse=True`. Set `sparse` to False: cores take "
            "dense ones.",
        ),
        (
            {"dtype": torch.complex64},
            "layer '0': weight dtype: expected one of float16, bfloat16, float32, float64, found complex64. Match "
            "other layers.",
        ),
    ],
)
def test_what_cannot_be_adapted(options: dict[str, object], message: str) -> None:
    table = nn.Sequential(nn.Embedding(4, 3, **options))  # type: ignore[arg-type]
    with pytest.raises(AttachError) as caught:
        tnpeft.attach(table, "lora", match=["0"])
    assert str(caught.value) == message
    assert list(table.state_dict()) == ["0.weight"]


def test_match_all_passes_embeddings_over() -> None:
    adapted = model()
    handle = tnpeft.attach(adapted, "lora", match="all")
    assert list(handle.adapters) == ["1"]
    assert handle.report().passed == {"Embedding": 1}


def test_an_embedding_that_was_resized_meanwhile_says_so() -> None:
    """As transformers' `resize_token_embeddings` does it: what it writes to is the sum."""
    adapted = model()
    tnpeft.attach(adapted, "lora", match=["0"])
    adapted[0].weight.data = torch.zeros(ROWS + 3, OUT)
    adapted[0].num_embeddings = ROWS + 3
    with pytest.raises(ExecutionError) as caught:
        adapted(TOKENS)
    assert str(caught.value) == (
        "parameter '0': rows of its weight: expected the 53 of `num_embeddings`, found 50: what was written to the sum "
        "with its updates is lost. Set `num_embeddings` back to 50, take the adapters off (`tnpeft.detach`), resize, "
        "and attach again."
    )
