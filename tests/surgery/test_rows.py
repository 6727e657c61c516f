"""Rows with adapters of their own: each is what the model gives it alone, and what PEFT's `adapter_names` gives."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from opaque import Doubled, PaddedConv2d
from small import spec_cases
from torch import Tensor, nn

import tnpeft

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (nn.Linear(12, 8), torch.randn(6, 3, 12)),
    "Conv2d": lambda: (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), torch.randn(6, 8, 5, 5)),
    "Conv3d": lambda: (nn.Conv3d(8, 8, 3, padding="same"), torch.randn(6, 8, 3, 3, 3)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1), torch.randn(6, 8, 3, 3)),
}
NAMES = ("b", "a", None, "a", "b", None)


def moved(handle: tnpeft.Handle) -> None:
    """Cores away from their start, other ones for each adapter."""
    generator = torch.Generator().manual_seed(ord(handle.name[0]))
    with torch.no_grad():
        for core in handle.parameters():
            core.add_(0.3 * torch.randn(core.shape, generator=generator, dtype=core.dtype))


def with_two(model: nn.Module, spec: str = "lora", match: str = "all", **how: Any) -> dict[str, tnpeft.Handle]:
    scopes = {scope: r"^(\d)" for scope in tnpeft.load_spec(spec).scopes if scope != "model"}
    handles = {name: tnpeft.attach(model, spec, match=match, name=name, scopes=scopes or None, **how) for name in "ab"}
    for handle in handles.values():
        moved(handle)
    return handles


def row_by_row(model: nn.Module, x: Tensor, names: Sequence[str | None] = NAMES) -> Tensor:
    """Each row alone through the model, with its adapter active."""
    before = tnpeft.scales_of(model)
    rows = []
    for number, name in enumerate(names):
        tnpeft.activate(model, {name: before.get(name, 1.0)} if name else {})
        rows.append(model(x[number : number + 1]))
    tnpeft.activate(model, before)
    return torch.cat(rows)


@pytest.mark.parametrize(("spec", "kind"), spec_cases(LAYERS))
def test_each_row_is_what_it_is_alone(spec: str, kind: str):
    for mode in ("dense", "auto"):  # rows run factored, or by a product with ΔW
        torch.manual_seed(0)
        layer, x = LAYERS[kind]()
        model, x = nn.Sequential(layer.double()), x.double()
        handles = with_two(model, spec, mode=mode)
        tnpeft.activate(model, {"a": 0.5, "b": 1.0})
        expected = row_by_row(model, x)
        with tnpeft.rows(model, NAMES):
            y = model(x)
        torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-9)
        assert torch.equal(y[[2, 5]], layer(x)[[2, 5]])
        y[[0, 4]].square().sum().backward()
        assert all(core.grad is None or not core.grad.any() for core in handles["a"].parameters())
        assert any(core.grad is not None and core.grad.any() for core in handles["b"].parameters())
        x.requires_grad_()
        with tnpeft.rows(model, NAMES):
            model(x).sum().backward()
        given, x.grad = x.grad, None
        row_by_row(model, x).sum().backward()
        torch.testing.assert_close(given, x.grad)


def test_it_is_what_pefts_adapter_names_give():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)).double()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="first")
    theirs.add_adapter("second", config)
    theirs.double().eval()
    handles = with_two(model, r=4, alpha=8)
    their_names = {"a": "first", "b": "second", None: "__base__"}
    with torch.no_grad():
        for name, handle in handles.items():
            for layer, adapter in handle.adapters.items():
                module = theirs.base_model.model.get_submodule(layer)
                adapter.cores["down"].copy_(module.lora_A[their_names[name]].weight)
                adapter.cores["up"].copy_(module.lora_B[their_names[name]].weight)
    x = torch.randn(6, 16).double()
    expected = theirs(x, adapter_names=[their_names[name] for name in NAMES])
    with tnpeft.rows(model, NAMES):
        torch.testing.assert_close(model(x), expected)


class Flattened(nn.Module):
    """Sees all tokens of all sequences as rows, and some layers see each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.token, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mixed = self.mix(x)
        tokens = self.token(mixed.flatten(0, 1)).relu().view_as(mixed)
        output: Tensor = self.last(tokens)
        return output


def test_layers_that_see_all_tokens_as_rows():
    model = Flattened().double()
    with_two(model, match="mix|token")
    x = torch.randn(6, 5, 8).double()
    expected = row_by_row(model, x)
    with tnpeft.rows(model, NAMES):
        torch.testing.assert_close(model(x=x, mask=torch.ones(5)), expected)
        assert model(x[:0].new_zeros(6, 0, 8)).shape == (6, 0, 4)


def test_adapters_of_other_layers_leave_the_base():
    model = Flattened().double()
    moved(tnpeft.attach(model, "lora", match="mix", name="a"))
    moved(tnpeft.attach(model, "tt_lora", match="last|token", name="b"))
    x = torch.randn(6, 5, 8).double()
    expected = row_by_row(model, x)
    with tnpeft.rows(model, NAMES):
        torch.testing.assert_close(model(x), expected)
    alike = row_by_row(model, x, ["a"] * 6)
    with tnpeft.rows(model, ["a"] * 6):
        torch.testing.assert_close(model(x), alike)


@pytest.mark.parametrize("layer", [Doubled(8, 6), PaddedConv2d(4, 4, 3)], ids=["Linear", "Conv2d"])
def test_opaque_layers(layer: nn.Module):
    model = nn.Sequential(copy.deepcopy(layer).double())
    with_two(model)
    x = torch.randn(6, 8) if isinstance(layer, nn.Linear) else torch.randn(6, 4, 5, 5)
    expected = row_by_row(model, x.double())
    with tnpeft.rows(model, NAMES):
        torch.testing.assert_close(model(x.double()), expected)


def test_contexts_nest_and_end_with_an_error():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
    with_two(model)
    x = torch.randn(2, 8).double()
    ordinary = model(x)
    expected = {names: row_by_row(model, x, names) for names in (("a", "b"), (None, "a"))}
    with tnpeft.rows(model, ["a", "b"]):
        torch.testing.assert_close(model(x), expected["a", "b"])
        with tnpeft.rows(model, [None, "a"]):
            torch.testing.assert_close(model(x), expected[None, "a"])
        torch.testing.assert_close(model(x), expected["a", "b"])
        with tnpeft.disabled(model):
            assert torch.equal(model(x), model[1].base(model[0].base(x)))
        torch.testing.assert_close(copy.deepcopy(model)(x), ordinary)  # a copy has no thread
    with pytest.raises(tnpeft.ExecutionError), tnpeft.rows(model, ["a", "b"]):
        model(x[:1])
    assert torch.equal(model(x), ordinary)
    assert not model._forward_pre_hooks_with_kwargs


def test_threads_have_rows_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
    with_two(model)
    x = torch.randn(2, 8).double()
    given: list[tuple[str | None, ...] | None] = [("a", "b"), ("b", None), None, (None, "a")]
    expected = [model(x) if names is None else row_by_row(model, x, names) for names in given]
    wrong: list[int] = []
    barrier = threading.Barrier(len(given))

    def run(number: int) -> None:
        names = given[number]
        barrier.wait()
        for _ in range(20):
            if names is None:
                y = model(x)
            else:
                with tnpeft.rows(model, names):
                    y = model(x)
            wrong.extend([number] * (not torch.allclose(y, expected[number])))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(model(x), expected[2])


def test_what_is_dropped_is_each_adapters_own():
    model = nn.Sequential(nn.Linear(8, 6)).double()
    for name, dropout in (("a", {"input": 0.4}), ("b", {"bond": 0.5})):
        moved(tnpeft.attach(model, "lora", match="0", name=name, dropout=dropout))
    x = torch.randn(6, 8).double()
    torch.manual_seed(3)
    with tnpeft.rows(model, NAMES):
        y = model(x)
    torch.manual_seed(3)
    mask = (torch.rand(4) >= 0.5) * 2.0
    down, up = model[0].adapter("b").cores.values()
    base = model[0].base(x)
    torch.testing.assert_close(y[[0, 4]], base[[0, 4]] + x[[0, 4]] @ (up * mask @ down).T)
    read = nn.functional.dropout(x[[1, 3]], 0.4)
    torch.testing.assert_close(y[[1, 3]], base[[1, 3]] + read @ model[0].adapter("a").delta_weight().T)
    expected = row_by_row(model.eval(), x)
    with tnpeft.rows(model, NAMES):
        torch.testing.assert_close(model(x), expected)


def test_kept_results_serve_rows_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
    with_two(model, "tt_lora")
    x = torch.randn(6, 8).double()
    expected = row_by_row(model, x)
    with tnpeft.accumulating(model), tnpeft.rows(model, NAMES):
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)


@pytest.mark.slow
def test_a_compiled_model():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    with_two(model)
    x = torch.randn(3, 16).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ordinary = model(x)
    for names in (("a", "b", None), ("b", "a", "a")):
        expected = row_by_row(model, x, names)
        with tnpeft.rows(compiled, names):
            torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), ordinary)


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    with_two(model)
    return model


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            ["a", "bb"],
            "adapter name: expected one of 'a', 'b', found 'bb'. Did you mean `b`?",
        ),
        (
            ["__base__"],
            "adapter name: expected one of 'a', 'b', found '__base__'. Write None for the base alone.",
        ),
        ("ab", "rows: expected a list of adapters' names, found 'ab'. One name for each row: "
            '`["a", "b", None]`, None for the base alone.'),
        ([], "rows: expected a list of adapters' names, found []. One name for each row: "
            '`["a", "b", None]`, None for the base alone.'),
        ([["a"], ["b"]], "rows: expected a list of adapters' names, found [['a'], ['b']]. One name for each row: "
            '`["a", "b", None]`, None for the base alone.'),
        ([3], "adapter name: expected one of 'a', 'b', found 3. Use one of these names."),
    ],
)  # fmt: skip
def test_names_that_are_refused(names: Any, text: str):
    with pytest.raises(tnpeft.AttachError) as caught, tnpeft.rows(net(), names):
        pass
    assert str(caught.value) == text


def refused(model: nn.Module, names: Sequence[str | None] = ("a", "b")) -> str:
    before = [list(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(tnpeft.AttachError) as caught, tnpeft.rows(model, names):
        pass
    assert [list(module._forward_pre_hooks) for module in model.modules()] == before
    return str(caught.value)


def test_what_rows_would_share_is_refused():
    model = net()
    tnpeft.merge(model)
    text = "model: expected an unmerged model, found a merged one. Call `tnpeft.unmerge(model)` first."
    assert refused(model) == text
    tnpeft.unmerge(model)
    model(torch.randn(4, 8))  # the statistics of 'b', which is active, change
    assert refused(model) == (
        "rows, running statistics of norms: expected the base's, for all rows, found others in '1'. "
        "Run its rows by themselves, with `tnpeft.activate`."
    )
    model = nn.Sequential(nn.Linear(8, 8))
    tnpeft.attach(model, "lora", match="0", name="a", train={"bias": "adapted"})
    tnpeft.attach(model, "lora", match="0", name="b")
    with tnpeft.rows(model, ["b", None]):
        pass
    assert refused(model) == (
        "rows, adapter 'a': expected one that trains its cores alone, found '0.bias' too. "
        "Run its rows by themselves, with `tnpeft.activate`."
    )
    tnpeft.activate(model, "a")  # its bias acts on all rows
    assert refused(model, ["b", None]).startswith("rows, adapter 'a': ")
    attention = nn.MultiheadAttention(8, 2)
    with_two(attention)
    assert refused(attention) == (
        "rows: expected layers whose input is seen, found the output projection of an attention: 'out_proj'. "
        "Leave them out (`exclude`)."
    )


def test_nothing_is_switched_meanwhile():
    model = net().eval()
    text = (
        "model: expected adapters of all rows, found some for single rows, by `tnpeft.rows`. "
        "Leave the `rows` context first, in every thread."
    )
    with tnpeft.rows(model, ["a", "b"]):
        for change in (
            tnpeft.merge,
            lambda model: tnpeft.activate(model, "a"),
            lambda model: tnpeft.detach(model, name="a"),
            tnpeft.detach,
        ):
            with pytest.raises(tnpeft.AttachError) as caught:
                change(model)
            assert str(caught.value) == text


def test_a_copy_made_meanwhile_has_what_acts_and_is_left_plain():
    model = net().eval()
    x = torch.randn(2, 8)
    usual = model(x)
    with tnpeft.rows(model, ["a", None]):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x), usual)
    tnpeft.detach(twin)
    assert not twin._forward_pre_hooks


def called(model: nn.Module, x: Tensor, names: Sequence[str | None] = ("a", "b")) -> str:
    with pytest.raises(tnpeft.ExecutionError) as caught, tnpeft.rows(model, names):
        model(x)
    return str(caught.value)


def test_inputs_of_other_numbers_of_rows():
    model = net().eval()
    assert called(model, torch.randn(4, 8)) == (
        "rows, 2 of which `tnpeft.rows` names: expected inputs of 2, found inputs of 4 rows. "
        "Give one name for each row of the batch; with beams, each name as often as its prompt has beams."
    )
    with pytest.raises(tnpeft.ExecutionError) as caught, tnpeft.rows(model, ["a", "b"]):
        model[0](torch.randn(3, 8))
    assert str(caught.value) == (
        "layer '0': rows of the input, 2 of which `tnpeft.rows` names: expected 2 rows, or a multiple of that, "
        "found an input of the shape (3, 8). "
        "Give one name for each row of the batch, which is the first axis of what layers see."
    )
    with pytest.raises(tnpeft.ExecutionError) as caught, tnpeft.rows(model, ["a", "b"]):
        model[0](torch.randn(8))
    assert "found an input without a batch. " in str(caught.value)
    conv = nn.Sequential(nn.Conv2d(4, 4, 1))
    with_two(conv)
    text = called(conv, torch.randn(4, 5, 5), ["a", "b", None, None])
    assert "found an input without a batch. " in text
