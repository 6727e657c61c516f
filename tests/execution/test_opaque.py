"""Opaque layers: base(x) with the update beside it, whatever the base is; tests/wide has those of other libraries."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from opaque import CausalConv3d, Doubled, PackedQuantLinear, PaddedConv2d, TwiceConv1d, expected
from small import quick_if
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import tnpeft


def dynamic() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that torchao replaces it
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(16, 24)), {nn.Linear})[0]


def old(norm: Callable[..., nn.Module], layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(layer)


LINEAR = {
    "packed": lambda: PackedQuantLinear(nn.Linear(16, 24)),
    "doubled": lambda: Doubled(16, 24),
    "torch.ao": dynamic,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(16, 24)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(16, 24)),
    "old weight norm": lambda: old(nn.utils.weight_norm, nn.Linear(16, 24)),
    "old spectral norm": lambda: old(nn.utils.spectral_norm, nn.Linear(16, 24)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(16, 24), "weight", 0.5),
}
CONV = {
    "padded": (lambda: PaddedConv2d(4, 6, 3, 2, dilation=(1, 2)), (2, 4, 9, 8)),
    "causal": (lambda: CausalConv3d(4, 8, 3, (1, 2, 1)), (2, 4, 4, 5, 6)),
    "reflecting": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, 2, 1, padding_mode="reflect")),
        (2, 4, 6, 7),
    ),
    "grouped": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, 1, 1, groups=2, padding_mode="reflect")),
        (4, 6, 7),
    ),
    "transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)), (2, 4, 5, 6)),
}
LAYERS = {name: (make, (2, 3, 16)) for name, make in LINEAR.items()} | CONV
SPECS = ["lora", "tenvoo_l", "quanta", "tt_lora", "loha"]


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model of one opaque layer, and an input."""
    make, shape = LAYERS[name]
    torch.manual_seed(seed)
    return nn.Sequential(make()).eval(), torch.randn(shape)


def train(handle: tnpeft.Handle, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def takes(spec: str, model: nn.Module) -> bool:
    return tnpeft.layer_of(model[0]).kind in tnpeft.load_spec(spec).layers


CASES = [
    (name, spec, mode)
    for name in LAYERS
    for spec in SPECS
    if takes(spec, made(name)[0])
    for mode in (("auto", "factored", "dense", "hybrid") if spec == "loha" else ("auto", "dense"))
]


@pytest.mark.parametrize(("name", "spec", "mode"), CASES)
def test_the_update_stands_beside_the_base(name: str, spec: str, mode: str):
    model, x = made(name)
    first, keys = model(x), [*model.state_dict()]
    handle = tnpeft.attach(model, spec, match="0", mode=mode)
    assert torch.equal(model(x), first)
    train(handle)
    base, adapter = model[0].base, model[0].adapter("default")
    results = []
    for run in (model, lambda x: expected(base, x, {adapter.delta_weight(): 1.0}, name != "torch.ao")):
        for parameter in handle.parameters():
            parameter.grad = None
        known = x.clone().requires_grad_()
        output = run(known)
        output.square().sum().backward()
        results.append((output, known.grad, *[parameter.grad for parameter in handle.parameters()]))
    found, right = results
    if name == "torch.ao":  # gradients of the base's input: those of the dequantised weight
        weight = base.weight().dequantize()
        right = (right[0], right[1] + 2 * right[0].detach() @ weight, *right[2:])
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))
    with tnpeft.disabled(model):
        assert torch.equal(model(x), first)
    state = model.state_dict()
    assert [key for key in state if ".adapters." not in key] == keys
    again, _ = made(name)
    tnpeft.attach(again, spec, match="0", mode=mode)
    again.load_state_dict(state)
    for other in (again, copy.deepcopy(model)):
        torch.testing.assert_close(other(x), found[0])
    tnpeft.detach(model)
    assert torch.equal(model(x), first)
    assert [*model.state_dict()] == keys


@pytest.mark.parametrize("spec", SPECS)
def test_plans_say_how_an_opaque_layer_runs(spec: str):
    for name in ("doubled", "causal", "grouped"):
        model, x = made(name)
        if not takes(spec, model):
            continue
        network = tnpeft.load_spec(spec).bind(model[0])
        assert tnpeft.plan(network, "hybrid").reason == "one product with the delta weight beside the layer's own"
        planned = tnpeft.plan(network, "auto")
        tnpeft.attach(model, spec, match="0")
        model(x)
        assert planned.mode == (model[0].chosen("default") or "dense")


@pytest.mark.parametrize("name", ["packed", "causal", "weight norm"])
def test_several_adapters_and_scales(name: str):
    model, x = made(name)
    first = model(x)
    handles = [tnpeft.attach(model, spec, match="0", name=spec, mode=mode) for spec, mode in MIXED]
    for seed, handle in enumerate(handles):
        train(handle, seed)
    scales = {"lora": 0.5, "loha": -2.0, "tt_lora": 1.5}
    tnpeft.activate(model, scales)
    deltas = {model[0].adapter(known).delta_weight(): scale for known, scale in scales.items()}
    output = expected(model[0].base, x, deltas)
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-4)
    with tnpeft.accumulating(model):
        torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-4)
        (model(x).sum() + model(x).sum()).backward()
    summed = [parameter.grad.clone() for handle in handles for parameter in handle.parameters()]
    model.zero_grad()
    (2 * output.sum()).backward()
    right = [parameter.grad for handle in handles for parameter in handle.parameters()]
    torch.testing.assert_close(summed, right, rtol=1e-3, atol=1e-3)
    tnpeft.activate(model, {})
    assert torch.equal(model(x), first)
    tnpeft.detach(model, name="loha")
    tnpeft.activate(model, "tt_lora")
    left = expected(model[0].base, x, {model[0].adapter("tt_lora").delta_weight(): 1.0})
    torch.testing.assert_close(model(x), left, rtol=1e-4, atol=1e-4)


MIXED = [("lora", "auto"), ("loha", "dense"), ("tt_lora", "factored")]


@pytest.mark.parametrize("name", [*LINEAR, "padded"])
def test_files(name: str, tmp_path):
    model, x = made(name)
    trained = {"bias": "adapted"} if name in ("doubled", "padded", "weight norm") else None
    train(tnpeft.attach(model, "lora", match="0", train=trained))
    tnpeft.save(model, tmp_path / "a.safetensors")
    again, _ = made(name)
    tnpeft.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), model(x))


def test_what_a_pickle_has():
    model, x = made("doubled")
    train(tnpeft.attach(model, "lora", match="0"))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


MERGING = "layer '0': merging: expected a weight that the update can be added to, found "


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("packed", "PackedQuantLinear, a quantised layer"),
        ("doubled", "Doubled, with a `forward` of its own"),
        ("causal", "CausalConv3d, with a `forward` of its own"),
    ],
)
def test_merging_is_refused_with_the_way_out(name: str, found: str):
    model, x = made(name)
    train(tnpeft.attach(model, "lora", match="0"))
    output = model(x)
    for merge in (tnpeft.merge, lambda model: tnpeft.detach(model, merge=True, dequantise=True)):
        with pytest.raises(tnpeft.AttachError) as caught:
            merge(model)
        assert str(caught.value) == f"{MERGING}{found}. Keep the adapter beside it: `tnpeft.save` writes that."
        assert torch.equal(model(x), output)


COMPUTED = ["weight norm", "spectral norm", "old weight norm", "old spectral norm", "pruned", "transposed", "grouped"]


@pytest.mark.parametrize("name", [*COMPUTED, "torch.ao"])
def test_a_weight_that_can_be_known_is_merged(name: str):
    model, x = made(name)
    handle = tnpeft.attach(model, "lora", match="0")
    train(handle)
    output = model(x)
    near = {"rtol": 0.05, "atol": 0.05} if name == "torch.ao" else {"rtol": 1e-4, "atol": 1e-4}
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.merge(model)
    found = (
        "Linear, quantised by torch.ao"
        if name == "torch.ao"
        else f"{type(model[0].base).__name__}, whose weight is computed"
    )
    assert str(caught.value) == (
        f"{MERGING}{found}. Let `dequantise=True` put a plain layer with the dequantised weight in its place."
    )
    tnpeft.merge(model, dequantise=True)
    torch.testing.assert_close(model(x), output, **near)
    assert {"0.weight", "0.bias"} <= {*model.state_dict()}
    with tnpeft.disabled(model):
        assert not torch.allclose(model(x), output, atol=0.01)
    with pytest.raises(RuntimeError, match=r"is merged into a plain one: call `tnpeft.unmerge` first"):
        model.load_state_dict(model.state_dict())
    tnpeft.unmerge(model)
    assert torch.equal(model(x), output)
    assert handle.report().trained
    tnpeft.detach(model, merge=True, dequantise=True)
    assert type(model[0]) is getattr(nn, tnpeft.layer_of(model[0]).kind)
    torch.testing.assert_close(model(x), output, **near)
    assert model[0].weight.requires_grad is (name != "torch.ao")


def test_merging_one_of_two_for_good():
    model, _ = made("weight norm")
    model.append(nn.Linear(24, 4))
    for name, match in (("a", "0"), ("b", "all")):
        train(tnpeft.attach(model, "lora", match=match, name=name))
    tnpeft.activate(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.detach(model, merge=True, name="a", dequantise=True)
    assert str(caught.value) == (
        "layer '0': merging 'a' for good: expected no other adapter that depends on the weight, "
        "found 'b', which stands on an opaque layer (ParametrizedLinear). "
        "Detach 'b' first, or merge for a time: `tnpeft.merge(model, name='a')`."
    )


@pytest.mark.parametrize("spec", ["dora", "pissa", "hira", "ia3"])
def test_specs_that_read_the_weight(spec: str):
    model, _ = made("packed")
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, spec, match="0")
    assert str(caught.value) == (
        f"layer '0': spec '{spec}': expected a base weight that can be read, "
        "found PackedQuantLinear, a quantised layer. "
        "Use a spec that does not read the weight, such as `lora`, or match other layers."
    )
    model.append(nn.Linear(24, 4))
    report = tnpeft.attach(model, spec, match="all").report()
    assert ([row.name for row in report.layers], [*report.skipped]) == (["1"], ["0"])
    for name in ("weight norm", "torch.ao"):
        known, x = made(name)
        first = known(x)
        handle = tnpeft.attach(known, spec, match="0")
        assert torch.equal(known(x), first)
        train(handle)
        right = expected(known[0].base, x, {known[0].adapter("default").delta_weight(): 1.0})
        torch.testing.assert_close(known(x), right)


def test_a_convolution_is_known_by_what_it_is_called_with():
    model = nn.Sequential(TwiceConv1d(2, 2, 3))
    tnpeft.attach(model, "lora", match="0")
    with pytest.raises(tnpeft.ExecutionError) as caught:
        model(torch.randn(1, 2, 5))
    assert str(caught.value) == (
        "layer '0': an opaque layer: expected one convolution, found 2 of them in its `forward`. Match other layers."
    )


class Cropped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :2]


class Tuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Cropped(3, 4), "output: expected the shape (5, 4) of Linear(3, 4, opaque), found (5, 2). Match other layers."),
        (Tuple(3, 4), "input and output: expected tensors, found a Tensor and a tuple. Match other layers."),
    ],
)
def test_outputs_that_no_update_fits(layer: nn.Module, message: str):
    model = nn.Sequential(layer)
    tnpeft.attach(model, "lora", match="0")
    with pytest.raises(tnpeft.ExecutionError) as caught:
        model(torch.randn(5, 3))
    assert str(caught.value) == f"layer '0': {message}"


class Rounding(nn.Linear):
    """Whole numbers all the way: nothing of it can be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach().round())


def test_a_base_that_passes_no_gradients_on():
    model = nn.Sequential(nn.Linear(3, 3), Rounding(3, 3))
    tnpeft.attach(model, "lora", match="1")
    with torch.no_grad():
        model(torch.randn(2, 3))
    model(torch.randn(2, 3)).sum().backward()  # nothing before it trains
    tnpeft.attach(model, "lora", match="all", name="second")
    with pytest.raises(tnpeft.ExecutionError) as caught:
        model(torch.randn(2, 3))
    assert str(caught.value) == (
        "layer '1': gradients of the input: expected a base layer that has them, found Rounding, with a `forward` of "
        "its own, which passes none on. Adapt layers behind it, or attach to the unquantised model."
    )


@pytest.mark.parametrize(
    ("name", "mode"),
    [("packed", "factored"), quick_if(False, "padded", "factored"), quick_if(False, "doubled", "dense")],
)
def test_who_looks_on_sees_the_same(name: str, mode: str):
    model, x = made(name)
    train(tnpeft.attach(model, "lora", match="0", mode=mode))
    output = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), output)
    torch.testing.assert_close(torch.compile(model, backend="eager", dynamic=True)(x[:1]), model(x[:1]))
    torch.testing.assert_close(torch.vmap(model)(x[:, None])[:, 0], output, rtol=1e-4, atol=1e-5)
    for reentrant in (False, True):
        grads = []
        for run in (model, lambda x, how=reentrant: checkpoint(model, x, use_reentrant=how)):
            known = x.clone().requires_grad_()
            run(known).square().sum().backward()
            grads.append(known.grad)
        torch.testing.assert_close(*grads)
    outputs: list[Tensor] = []
    threads = [threading.Thread(target=lambda: outputs.append(model(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 4
    assert all(torch.equal(one, output) for one in outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["factored", "dense"])
def test_narrow_numbers(dtype: torch.dtype, mode: str):
    for name in ("packed", "doubled", "padded"):
        model, x = made(name)
        first = model(x)
        handle = tnpeft.attach(model, "lora", match="0", mode=mode)
        with torch.autocast("cpu", dtype):
            with tnpeft.disabled(model):
                base = model(x)
            assert torch.equal(model(x), base)
            train(handle)
            output = model(x)
            assert output.dtype == base.dtype
            output.float().sum().backward()
        right = expected(model[0].base, x, {model[0].adapter("default").delta_weight(): 1.0})
        torch.testing.assert_close(output.float(), right, rtol=0.05, atol=0.05 * float(first.detach().abs().max()))
        narrow = model.to(dtype)
        assert {core.dtype for core in narrow[0].adapter("default").cores.values()} == {torch.float32}
        assert narrow(x.to(dtype)).dtype == dtype


def test_what_trains_and_what_a_module_shows():
    model, x = made("doubled")
    handle = tnpeft.attach(model, "lora", match="0", train={"bias": "adapted"})
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "0._tnpeft_of_default:bias", "0.adapters.default.core_down", "0.adapters.default.core_up"
    }  # fmt: skip
    assert model[0].weight is model[0].base.weight
    assert (model[0].in_features, float(model[0](hidden_states=x, scale=0.0).detach().abs().sum())) == (16, 0.0)
    model.train()
    assert model[0].base.training
    assert "Doubled, in_features=16, out_features=24" in repr(model[0])
    assert handle.report().layers[0].runs == "auto: factored"
    assert handle.report().layers[0].layer == "Linear(16, 24, opaque)"


def test_hooks_of_the_base_run():
    model, x = made("doubled")
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    first = model(x)
    tnpeft.attach(model, "lora", match="0")
    assert torch.equal(model(x), first)


def test_a_model_from_meta():
    model = nn.Sequential(Doubled(4, 4, device="meta"))
    tnpeft.attach(model, "lora", match="0")
    model.to_empty(device="cpu")
    nn.init.ones_(model[0].base.weight)
    nn.init.ones_(model[0].base.bias)
    model[0].reset_parameters()
    assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 4), 10.0))


def test_scripts_have_no_opaque_layers():
    model, x = made("weight norm")
    train(tnpeft.attach(model, "lora", match="0", train={"bias": "adapted"}))
    output = model(x)
    tnpeft.merge(model, dequantise=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(tnpeft.ExecutionError) as caught:
            torch.jit.script(model)
    assert str(caught.value) == (
        "layer '0': torch.jit.script: expected plain layers, found an opaque one. "
        "Use `torch.jit.trace`, or take the adapters off: `tnpeft.detach(model, merge=True, dequantise=True)`."
    )
    tnpeft.detach(model, merge=True, dequantise=True)
    torch.testing.assert_close(model(x), output)


def test_attention_reads_the_weight_of_a_computed_layer():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    parametrizations.weight_norm(attention.out_proj)
    model, x = nn.ModuleDict({"attention": attention}).requires_grad_(False), torch.randn(2, 3, 8)
    first = attention(x, x, x)[0]
    handle = tnpeft.attach(model, "lora", match="out_proj")
    torch.testing.assert_close(attention(x, x, x)[0], first)  # torch takes other kernels for weights with gradients
    train(handle)
    output = attention(x, x, x)[0]
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    tnpeft.merge(model, dequantise=True)
    torch.testing.assert_close(attention(x, x, x)[0], output)
    tnpeft.detach(model, merge=True, dequantise=True)
    torch.testing.assert_close(attention(x, x, x)[0], output)
    assert not torch.allclose(output, first, atol=0.01)


def test_attention_never_calls_an_opaque_layer():
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = Doubled(8, 8)
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(nn.ModuleDict({"attention": attention}), "lora", match="out_proj")
    assert str(caught.value) == (
        "layer 'attention.out_proj': opaque layer: expected one that is called, "
        "found one that torch's MultiheadAttention reads and never calls. Match other layers."
    )


def test_fits_and_budgets_of_opaque_layers(tmp_path):
    for name in ("packed", "doubled", "causal"):
        model, _ = made(name)
        layer = tnpeft.layer_of(model[0])
        delta = torch.randn(layer.stored_shape)
        fitted = tnpeft.fit("lora", delta, model[0], r=2)
        named = tnpeft.fit("lora", delta, layer.kind, r=2, **sizes_of(layer))
        assert fitted.error == pytest.approx(named.error)
        assert tnpeft.budget("lora", model, 10_000, match="all").value
    model, _ = made("doubled")
    state = model.state_dict()
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.extract(model, state, "lora", match="0")
    assert str(caught.value) == (
        "layer '0': extracting: expected a weight that can be read, found an opaque layer. "
        "Match other layers, or extract from the unquantised model."
    )


@pytest.mark.parametrize("name", ["weight norm", "old weight norm", "spectral norm", "pruned", "transposed"])
def test_the_plain_state_dict_of_a_merged_layer_is_that_of_the_plain_one(name: str):
    """No parameters of a parametrization beside the merged weight: a lax loader would take the base from them."""
    model, x = made(name)
    handle = tnpeft.attach(model, "lora", match="0", r=2)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    wanted = list(tnpeft.plain_state_dict(model))
    tnpeft.merge(model, dequantise=True)
    assert sorted(tnpeft.plain_state_dict(model)) == ["0.bias", "0.weight"]
    with tnpeft.disabled(model):
        assert sorted(tnpeft.plain_state_dict(model)) == sorted(wanted)
    state, y = tnpeft.plain_state_dict(model), model(x)
    tnpeft.unmerge(model)
    assert list(tnpeft.plain_state_dict(model)) == wanted
    tnpeft.detach(model, merge=True, dequantise=True)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


def sizes_of(layer: tnpeft.Layer) -> dict[str, object]:
    if not layer.kernel_size:
        return {"in_features": layer.in_channels, "out_features": layer.out_channels}
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "groups": layer.groups,
    }


def test_the_input_is_known_in_a_call_by_keywords():
    class Gated(nn.Linear):
        def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
            return super().forward(hidden) * gate

    torch.manual_seed(0)
    model = nn.Sequential(Gated(8, 8))
    x, gate = torch.randn(2, 3, 8)
    handle = tnpeft.attach(model, "lora", match="0")
    train(handle)
    wanted = model[0](x, gate)
    for call in ({"hidden": x, "gate": gate}, {"gate": gate, "hidden": x}):
        assert torch.equal(model[0](**call), wanted)


def test_parametrizations_of_the_base_stay_its_own():
    """torch would delete the weight from the class of all adapted layers."""
    model, x = made("spectral norm")
    other, _ = made("weight norm")
    for each in (model, other):
        train(tnpeft.attach(each, "lora", match="0"))
    before, others = model(x), other(x)
    for change in (
        lambda: parametrize.remove_parametrizations(model[0], "weight"),
        lambda: parametrize.register_parametrization(model[0], "weight", nn.Identity()),
    ):
        with pytest.raises(tnpeft.ExecutionError) as caught:
            change()
        assert str(caught.value) == (
            "layer '0': the parametrization of `weight`: expected to stay what it is while adapters are attached, "
            "found something that would add to it or take it off. Take the adapters off first (`tnpeft.detach`); "
            "`parametrizations.weight` reads it."
        )
    assert torch.equal(model(x), before)
    assert torch.equal(other(x), others)
    assert model[0].parametrizations.weight.original is model[0].base.parametrizations.weight.original
    tnpeft.detach(model)
    parametrize.remove_parametrizations(model[0], "weight")


def test_a_computed_bias_has_a_weight_to_be_merged_with():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    train(tnpeft.attach(model, "pissa", match="0"))
    before = model(x)
    tnpeft.merge(model, dequantise=True)
    torch.testing.assert_close(model(x), before)
    tnpeft.detach(model, merge=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), before)
