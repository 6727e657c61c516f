"""Layers that look like torch's and are something else: each is refused as what it is."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn

import tnpeft
from tnpeft.surgery import layer_problem
from tnpeft.surgery.checks import weight_problem

KINDS = "Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d"
UNQUANTISED = "Attach to the unquantised model."


def refused(model: nn.Module, spec: str = "lora", match: str = r"\d") -> str:
    before = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, spec, match=match)
    assert {name: id(value) for name, value in model.named_parameters()} == before
    return str(caught.value)


def kind(full: str, *bases: type) -> nn.Module:
    """A layer of a class with this full name, as a library that is not installed here would have it."""
    module, _, name = full.rpartition(".")
    made = type(name, bases or (nn.Module,), {"__module__": module, "forward": lambda self, x: x})
    return made(4, 4) if bases else made()


def layers_of(found: str, fix: str, names: str = "layer '0'") -> str:
    return f"{names}: layer type: expected one of {KINDS}, found {found}. {fix}"


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (kind("gptqmodel.nn_modules.qlinear.torch.TorchQuantLinear"), "TorchQuantLinear, quantised by GPTQ"),
        (kind("awq.modules.linear.gemm.WQLinear_GEMM"), "WQLinear_GEMM, quantised by AWQ"),
        (kind("hqq.core.quantize.HQQLinear"), "HQQLinear, quantised by HQQ"),
        (kind("somebody.layers.QuantLinear"), "QuantLinear, a quantised layer"),
    ],
)
def test_quantised_layers_without_sizes_are_said_to_be(layer, found):
    expected = layers_of(f"{found}, which does not say its sizes", UNQUANTISED)
    assert refused(nn.Sequential(layer)) == expected
    assert refused(nn.Sequential(layer), match="all") == expected.replace(
        f"layer type: expected one of {KINDS}",
        f"spec 'lora', match 'all': expected at least one of {KINDS} that can be adapted",
    )
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.load_spec("lora").bind(layer)
    assert str(caught.value) == (
        f"unsupported layer: expected one of {KINDS}, found {found}, which does not say its sizes. {UNQUANTISED}"
    )
    layer.in_features = layer.out_features = 4
    assert str(tnpeft.load_spec("lora").bind(layer).layer) == "Linear(4, 4, opaque)"


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (kind("bitsandbytes.nn.modules.Linear4bit", nn.Linear), "Linear4bit, quantised by bitsandbytes"),
        (kind("optimum.quanto.nn.qlinear.QLinear", nn.Linear), "QLinear, quantised by optimum-quanto"),
        (kind("torchao.float8.float8_linear.Float8Linear", nn.Linear), "Float8Linear, quantised by torchao"),
        (
            kind("transformers.integrations.finegrained_fp8.FP8Linear", nn.Linear),
            "FP8Linear, quantised by transformers (finegrained_fp8)",
        ),
        (kind("diffusers.quantizers.gguf.utils.GGUFLinear", nn.Linear), "GGUFLinear, quantised by GGUF"),
        (kind("somebody.layers.QuantLinear", nn.Linear), "QuantLinear, a quantised layer"),
    ],
)
def test_quantised_layers_are_adapted_without_their_weight(layer, found):
    model = nn.Sequential(layer)
    assert [row.layer for row in tnpeft.attach(model, "lora", match="all").report().layers] == ["Linear(4, 4, opaque)"]
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.merge(model)
    assert str(caught.value) == (
        f"layer '0': merging: expected a weight that the update can be added to, found {found}. "
        "Keep the adapter beside it: `tnpeft.save` writes that."
    )
    tnpeft.detach(model)
    assert refused(model, "dora") == (
        f"layer '0': spec 'dora': expected a base weight that can be read, found {found}. "
        "Use a spec that does not read the weight, such as `lora`, or match other layers."
    )


@pytest.mark.parametrize(
    ("layer", "found", "fix"),
    [
        (
            kind("transformer_engine.pytorch.module.linear.Linear"),
            "Linear, a layer of Transformer Engine with kernels of its own",
            "Match other layers, or build the model of torch's.",
        ),
        (
            kind("torch.distributed.fsdp._fully_shard._fully_shard.FSDPLinear", nn.Linear),
            "FSDPLinear, whose weights FSDP shards",
            "Attach to the plain model first, then wrap it.",
        ),
    ],
)
def test_layers_of_other_libraries_are_named(layer, found, fix):
    assert refused(nn.Sequential(layer), match="0") == layers_of(found, fix) or not list(layer.parameters())
    assert str(layer_problem("0", layer)) == layers_of(found, fix)


def test_a_class_of_the_same_name_is_told_with_its_module():
    model = nn.Sequential(kind("my.layers.Conv1D"), kind("my.layers.Linear", nn.Linear))
    model[0].weight = nn.Parameter(torch.zeros(2))
    assert refused(model) == (
        f"layer '0': layer type: expected one of {KINDS}, found Conv1D of my.layers. "
        "Narrow the pattern, or match `all`: every layer of the spec's kinds."
    )
    tnpeft.attach(model, "lora", match="1")
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.merge(model)
    assert str(caught.value) == (
        "layer '1': merging: expected a weight that the update can be added to, found Linear of my.layers, "
        "with a `forward` of its own. Keep the adapter beside it: `tnpeft.save` writes that."
    )


def test_attention_is_told_where_its_weights_are():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora", match=["0"])
    assert str(caught.value) == layers_of(
        "MultiheadAttention, whose q, k and v weights are parameters of its own",
        "Adapt its `out_proj`, and the others by their names (`parameters`).",
    )
    assert len(tnpeft.attach(model, "lora", match="0").report().layers) == 1


@pytest.fixture
def quantise():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that torchao replaces it
        yield torch.ao.quantization


def test_layers_that_torch_has_quantised_with_integers_around(quantise):
    static = nn.Sequential(torch.ao.nn.quantized.Linear(4, 4), nn.Linear(4, 4))
    found = "Linear, quantised by torch.ao, its input and output too"
    assert refused(static, match="0") == layers_of(found, UNQUANTISED)
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.load_spec("lora").bind(static[0])
    assert str(caught.value) == f"unsupported layer: expected one of {KINDS}, found {found}. {UNQUANTISED}"
    report = tnpeft.attach(static, "lora", match="all").report()
    assert ([row.name for row in report.layers], report.skipped) == (["1"], {"0": found})


def test_layers_that_torch_has_fused(quantise):
    fused = torch.ao.nn.intrinsic.quantized.dynamic.LinearReLU(4, 4)
    found = "LinearReLU, fused by torch.ao with what follows it"
    assert refused(nn.Sequential(fused), match="0") == layers_of(found, UNQUANTISED)


class Scaled(torch.Tensor):
    """A tensor that holds eighths of its values: a subclass as libraries of quantisation make them."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(function))


class Named(torch.Tensor):
    """A name alone: it computes as torch's tensors do."""


def with_weight(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


def fake(full: str) -> type:
    module, _, name = full.rpartition(".")
    return type(name, (Scaled,), {"__module__": module})


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            with_weight(torch.zeros(4, 4).as_subclass(fake("torch.distributed.tensor._api.DTensor"))),
            "found DTensor, which lies on several devices. Attach to the plain model first, then wrap it.",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spec", ["lora", "quanta", "pissa"])
def test_weights_that_are_no_plain_tensors(model, problem, spec):
    assert refused(model, spec) == f"layer '0': weight: expected a plain tensor, {problem}"


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.ones(4, 4).as_subclass(Scaled), "Linear, whose weight is a Scaled"),
        (
            torch.ones(4, 4).as_subclass(fake("optimum.quanto.tensor.weights.qbytes.WeightQBytesTensor")),
            "WeightQBytesTensor, quantised by optimum-quanto",
        ),
    ],
)
def test_weights_of_other_classes_are_left_alone(weight, found):
    model, x = with_weight(weight), torch.randn(2, 4)
    expected = model(x)
    tnpeft.attach(model, "lora", match="0")
    assert torch.equal(model(x), expected)
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.detach(model, merge=True, dequantise=True)
    assert str(caught.value) == (
        f"layer '0': merging: expected a weight that the update can be added to, found {found}. "
        "Keep the adapter beside it: `tnpeft.save` writes that."
    )
    for spec in ("pissa", "supertuning"):
        assert refused(with_weight(weight), spec) == (
            f"layer '0': spec '{spec}': expected a base weight that can be read, found {found}. "
            "Use a spec that does not read the weight, such as `lora`, or match other layers."
        )


def test_weights_that_compute_as_torchs_own():
    tnpeft.attach(with_weight(torch.randn(4, 4).as_subclass(Named)), "lora", match="0")
    with torch._subclasses.FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 4))
        tnpeft.attach(model, "lora", match="0")
        assert model(torch.randn(2, 4)).shape == (2, 4)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.eye(4).to_sparse(), "weight: expected a dense tensor, found one of torch.sparse_coo. "
                                   "Give the layer `nn.Parameter(weight.detach().to_dense())`."),
        (torch.eye(4, dtype=torch.complex64), "weight dtype: expected one of float16, bfloat16, float32, float64, "
                                              "found complex64. Match other layers."),
        (torch.eye(4).to(torch.float8_e4m3fn), "weight dtype: expected one of float16, bfloat16, float32, float64, "
                                               "found float8_e4m3fn. Attach to the unquantised model."),
        (torch.zeros(0), "weight: expected the shape (4, 4) of Linear(4, 4), found (0,). Attach before the weights are "
                         "taken apart (by FSDP or ZeRO), or give the layer its whole weight."),
    ],
)  # fmt: skip
def test_weights_in_other_forms(weight, message):
    assert refused(with_weight(weight)) == f"layer '0': {message}"


def test_the_helper_for_weights():
    assert weight_problem(nn.Linear(2, 2).weight) is None
    assert str(weight_problem(torch.zeros(2, 2, dtype=torch.int8))) == (
        f"weight dtype: expected one of float16, bfloat16, float32, float64, found int8. {UNQUANTISED}"
    )


PEFT = "Take PEFT's adapters off first, by `unload()` or `merge_and_unload()`."


def test_layers_that_peft_has_adapted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"], modules_to_save=["2"]))
    inner = adapted.base_model.model
    assert refused(inner) == (
        layers_of("Linear, which PEFT has adapted", PEFT, "layers '0', '1'")
        + "\n"
        + layers_of("ModulesToSaveWrapper, which PEFT has adapted", PEFT, "layer '2'")
    )
    assert refused(inner, match="all").startswith(
        "layers '0', '1': spec 'lora', match 'all': expected at least one of "
    )
    report = tnpeft.attach(inner, "lora", match=r"base_layer$").report()  # PEFT calls it: both adapters act
    assert [row.name for row in report.layers] == ["0.base_layer", "1.base_layer"]
    plain = nn.Sequential(nn.Linear(4, 4))
    assert peft.get_peft_model(plain, peft.LoraConfig(target_modules=["0"])).unload() is plain
    tnpeft.attach(plain, "lora", match="0")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)


def test_layers_that_lycoris_has_adapted():
    model = Net()
    LycorisNetwork.apply_preset({"target_name": ["to_q"]})
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1.0, algo="lora")
    network.apply_to()
    assert refused(model, match="to_q") == (
        "layer 'to_q': layer: expected the forward of Linear, found Linear, which LyCORIS has adapted. "
        "Take LyCORIS's network off first, by its `restore()`."
    )
    network.restore()
    assert "forward" in model.to_q.__dict__  # torch's own
    tnpeft.attach(model, "lora", match="to_q")


class Outer(nn.Module):
    def forward(self, x):
        return x


def test_layers_whose_forward_is_another_modules():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].__dict__["forward"] = Outer().forward
    assert refused(model) == (
        "layer '0': layer: expected the forward of Linear, found Linear, with the `forward` of Outer. "
        "An adapter would bypass it: take it off first, or match other layers."
    )
