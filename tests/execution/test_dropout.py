"""Dropout: what is left out, in every mode and path the same, against masks that are drawn again here and PEFT's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from opaque import Doubled, PaddedConv2d
from small import spec_cases
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tnpeft

MODES = ("dense", "factored", "hybrid", "auto")
ALL = {"input": 0.2, "bond": 0.3, "module": 0.2}
LAYERS = {
    "Linear": lambda: (nn.Linear(12, 8), torch.randn(4, 12)),
    "Conv2d": lambda: (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), torch.randn(2, 8, 5, 5)),
    "Conv3d": lambda: (nn.Conv3d(8, 8, 3, padding="same"), torch.randn(1, 8, 3, 3, 3)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1), torch.randn(2, 8, 3, 3)),
}


def attached(
    layer: nn.Module, spec: str, dropout: Mapping[str, float], mode: str = "auto", **params: Any
) -> tuple[nn.Module, tnpeft.Handle]:
    """A model of one float64 layer with an adapter whose cores have moved."""
    model = nn.Sequential(layer.double())
    scopes = {scope: r"^(\d)" for scope in tnpeft.load_spec(spec).scopes if scope != "model"}
    handle = tnpeft.attach(model, spec, match="0", mode=mode, dropout=dropout, scopes=scopes or None, **params)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for core in handle.parameters():
            core.add_(0.3 * torch.randn(core.shape, generator=generator, dtype=core.dtype))
    return model, handle


def kept(size: int, probability: float) -> Tensor:
    return (torch.rand(size) >= probability).double()


def bonds(spec: str, layer: nn.Module) -> bool:
    """Whether a spec has a bond to drop on this layer."""
    try:
        tnpeft.attach(nn.Sequential(layer), spec, match="0", dropout={"bond": 0.1}, scopes=None)
    except tnpeft.TnpeftError as error:
        return "`bond`" not in str(error)
    return True


@pytest.mark.parametrize(("spec", "kind"), spec_cases(LAYERS))
def test_every_mode_drops_the_same_and_the_start_is_exact(spec: str, kind: str):
    dropout = ALL if bonds(spec, LAYERS[kind]()[0]) else {"input": 0.2, "module": 0.2}
    results = []
    for mode in MODES:
        torch.manual_seed(0)
        layer, x = LAYERS[kind]()
        x = x.double().requires_grad_()
        model, handle = attached(layer, spec, dropout, mode)
        moved = copy.deepcopy(handle.adapters["0"])
        handle.adapters["0"].reset_parameters(model[0].base.weight)
        assert torch.equal(model(x), model[0].base(x))
        handle.adapters["0"].take(moved)
        torch.manual_seed(3)
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(core.grad for core in handle.parameters())])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_bond_dropout_is_a_mask_of_the_rank(mode: str):
    model, handle = attached(nn.Linear(6, 5), "lora", {"bond": 0.4}, mode, r=4, alpha=8)
    x = torch.randn(3, 6).double()
    torch.manual_seed(2)
    y = model(x)
    torch.manual_seed(2)
    mask = kept(4, 0.4) / 0.6
    down, up = handle.adapters["0"].cores.values()
    assert 0 < mask.count_nonzero() < 4
    torch.testing.assert_close(y, x @ (model[0].base.weight + 2 * up * mask @ down).T + model[0].bias)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_copy_has_the_masks_of_its_cores(mode: str):
    model, handle = attached(nn.Linear(8, 8), "tt_lora", {"bond": 0.3, "module": 0.1}, mode)
    adapter = handle.adapters["0"]
    x = torch.randn(3, 8).double()
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    sizes = [mask.size for mask in adapter.masks]
    pieces = torch.rand(sum(sizes)).split(sizes)
    trained, start = (dict(cores) for cores in (adapter.cores, {**adapter.cores, **adapter.start}))
    for mask, piece in zip(adapter.masks, pieces, strict=True):
        for core, shape in mask.places:
            name = adapter.network.cores[core].name
            factor = ((piece >= mask.probability).double() * mask.scale).view(shape)
            trained[name], start[name] = trained[name] * factor, start[name] * factor
    equation = adapter.network.einsum
    change = torch.einsum(equation, *trained.values()) - torch.einsum(equation, *start.values())
    weight = model[0].base.weight + adapter.network.scale * change.reshape(8, 8)
    torch.testing.assert_close(y, x @ weight.T + model[0].bias)


@pytest.mark.parametrize("spec", ["lora", "dora", "glora", "fourierft"])
@pytest.mark.parametrize("mode", MODES)
def test_module_dropout_leaves_the_update_out_as_often_as_it_says(spec: str, mode: str):
    model, _ = attached(nn.Linear(6, 5), spec, {"module": 0.3}, mode)
    x = torch.randn(3, 6).double()
    base, whole = model[0].base(x), model.eval()(x)
    model.train()
    torch.manual_seed(0)
    outputs = [model(x) for _ in range(100)]
    for output in outputs:
        torch.testing.assert_close(output, base if torch.allclose(output, base) else whole)
    assert sum(torch.allclose(output, base) for output in outputs) / 100 == pytest.approx(0.3, abs=0.15)


@pytest.mark.parametrize("mode", MODES)
def test_input_dropout_is_that_of_peft(mode: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)).double()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], lora_dropout=0.3, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double()
    handle = tnpeft.attach(model, "lora", match="all", r=4, alpha=8, dropout={"input": 0.3}, mode=mode)
    with torch.no_grad():
        for layer, adapter in handle.adapters.items():
            module = theirs.base_model.model.get_submodule(layer)
            adapter.cores["down"].copy_(module.lora_A["default"].weight)
            adapter.cores["up"].copy_(module.lora_B["default"].weight)
    x = torch.randn(5, 16).double()
    outputs = []
    for each in (theirs.train(), model.train()):
        torch.manual_seed(7)
        outputs.append(each(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    their_down = theirs.base_model.model[0].lora_A["default"].weight.grad
    torch.testing.assert_close(handle.adapters["0"].cores["down"].grad, their_down)
    theirs.eval()
    torch.testing.assert_close(model.eval()(x), theirs(x))


def test_nothing_is_dropped_where_nothing_trains(tmp_path: Any):
    model, handle = attached(nn.Linear(6, 5), "lora", ALL)
    x = torch.randn(3, 6).double()
    plain, other = attached(copy.deepcopy(model[0].base), "lora", {})
    with torch.no_grad():
        for ours, theirs in zip(handle.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours)
    whole = plain(x)
    torch.testing.assert_close(model.eval()(x), whole)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    torch.testing.assert_close(model[0].weight, plain[0].weight)
    with tnpeft.disabled(model):
        assert torch.equal(model(x), model[0].base(x))
    tnpeft.merge(model)
    torch.testing.assert_close(model(x), whole)
    tnpeft.unmerge(model)
    assert not torch.equal(model(x), model(x))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        y = copied(x)
        torch.manual_seed(0)
        assert torch.equal(model(x), y)


def test_what_accumulates_is_never_what_was_dropped():
    model, _ = attached(nn.Linear(6, 5), "tt_lora", {"bond": 0.3}, "dense")
    x = torch.randn(3, 6).double()
    torch.manual_seed(0)
    expected = [model(x) for _ in range(3)]
    whole = model.eval()(x)
    with tnpeft.accumulating(model):
        torch.testing.assert_close(model(x), whole)
        model.train()
        torch.manual_seed(0)
        assert all(torch.equal(model(x), y) for y in expected)
        torch.testing.assert_close(model.eval()(x), whole)


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_are_batched_drop_by_themselves(mode: str):
    """Layers alike, some with dropout, one without, and several calls of one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double()
    recipe = tnpeft.Recipe.from_yaml(
        "tnpeft: 1\nname: two\nadapters:\n  - {spec: tt_lora, match: '[012]', dropout: {bond: 0.3}}\n"
        "  - {spec: tt_lora, match: '3'}\n"
    )
    handle = tnpeft.attach(model, recipe, mode=mode)
    with torch.no_grad():
        for core in handle.parameters():
            core.add_(0.1 * torch.randn_like(core))
    x = torch.randn(2, 8).double()
    for _ in range(3):
        torch.manual_seed(1)
        y = model(x)
        torch.manual_seed(1)
        expected = x
        for layer in model:
            expected = layer(expected)  # outside of a pass each contracts its own
        torch.testing.assert_close(y, expected)
    whole = model.eval()(x)
    weights = [layer.base.weight + handle.adapters[str(number)].delta_weight() for number, layer in enumerate(model)]
    for layer, weight in zip(model, weights, strict=True):
        x = functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(whole, x)


def test_several_adapters_drop_each_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    given: dict[str, dict[str, float]] = {"a": {"input": 0.3}, "b": {"bond": 0.3}, "c": {}}
    for name, dropout in given.items():
        handle = tnpeft.attach(model, "lora", match="0", name=name, dropout=dropout)
        with torch.no_grad():
            for core in handle.parameters():
                core.add_(torch.randn_like(core))
    x = torch.randn(3, 6).double()
    scales = {"a": 0.5, "b": 2.0, "c": 1.0}
    tnpeft.activate(model, scales)
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    read = functional.dropout(x, 0.3)
    mask = kept(4, 0.3) / 0.7
    cores = {name: [*model[0].adapter(name).cores.values()] for name in given}
    expected = model[0].base(x) + 0.5 * (read @ (cores["a"][1] @ cores["a"][0]).T)
    expected = expected + x @ (2 * (cores["b"][1] * mask) @ cores["b"][0] + cores["c"][1] @ cores["c"][0]).T
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dropout", [{"input": 0.3}, {"bond": 0.3}, ALL], ids=str)
@pytest.mark.parametrize("mode", ["dense", "auto"])
def test_opaque_layers_drop_as_plain_ones(dropout: dict[str, float], mode: str):
    outputs = []
    for layer in (Doubled(6, 5), nn.Linear(6, 5)):
        torch.manual_seed(0)
        model, handle = attached(layer, "lora", dropout, mode)
        with torch.no_grad():
            for core in handle.parameters():
                core.copy_(torch.linspace(-1, 1, core.numel()).view(core.shape))
        x = torch.ones(3, 6).double()
        torch.manual_seed(1)
        y = model(x)
        with tnpeft.disabled(model):
            outputs.append(y - model(x))
        assert torch.equal(model.eval()(x), model(x))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_an_opaque_convolution_drops_what_its_weight_reads():
    model, handle = attached(PaddedConv2d(4, 4, 3), "lora", {"input": 0.4})
    x = torch.randn(2, 4, 5, 5).double()
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    read = functional.dropout(functional.pad(x, (0, 1, 2, 0)), 0.4)
    base = model[0].base
    torch.testing.assert_close(y, base(x) + functional.conv2d(read, handle.adapters["0"].delta_weight()))


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_draws_the_same_again(mode: str):
    model, handle = attached(nn.Linear(8, 8), "tt_lora", ALL, mode)
    x = torch.randn(3, 8).double()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        handle.model.zero_grad()
        run(x).square().sum().backward()
        grads.append([core.grad.clone() for core in handle.parameters() if core.grad is not None])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_start_is_exact_in_every_dtype_and_under_autocast(dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    x = torch.randn(3, 8).to(dtype)
    base = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x)
    for spec in ("tt_lora", "lora", "dora"):
        for mode in MODES:
            tnpeft.attach(model, spec, match="all", mode=mode, dropout=ALL)
            assert torch.equal(model(x), base)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(model(x), cast)
            tnpeft.detach(model)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "mode"), [("lora", "factored"), ("tt_lora", "dense"), ("dora", "auto")])
def test_a_compiled_model_drops_the_same(spec: str, mode: str):
    torch.compiler.reset()
    model, _ = attached(nn.Linear(16, 16), spec, ALL, mode)
    x = torch.randn(3, 16).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(1)
        y = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), y)
    torch.testing.assert_close(torch.compile(model.eval(), fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), Doubled(8, 8)], ids=["plain", "opaque"])
def test_flags_that_are_written_to_are_followed(layer: nn.Module):
    """As Lightning gives modules their flags back after each validation: no call of `train`."""
    model, _ = attached(copy.deepcopy(layer), "lora", {"input": 0.5}, r=4)
    x = torch.randn(4, 8, dtype=torch.float64)
    flags = {module: module.training for module in model.modules()}
    model.eval()
    exact = model(x)
    for module, flag in flags.items():
        module.training = flag
    assert not torch.equal(model(x), model(x))
    for module in model.modules():
        module.training = False
    torch.testing.assert_close(model(x), exact, rtol=0, atol=0)
