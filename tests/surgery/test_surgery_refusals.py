"""What surgery refuses: with its whole text, and with the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from small import attach, chain, net, net_input, refused
from torch import nn

from tnpeft.errors import AttachError
from tnpeft.execution import compile
from tnpeft.surgery import (
    activate,
    detach,
    disabled,
    install,
    layer_problem,
    merge,
    names_of,
    plain_modules,
    record_of,
    unmerge,
)

KINDS = "Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d"


def quantised() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def strided(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight)
    return layer


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: nn.Bilinear(3, 3, 3),
            f"layer 'x': layer type: expected one of {KINDS}, found Bilinear. Match other layers.",
        ),
        (
            lambda: nn.LazyConv2d(4, 1),
            "layer 'x': layer: expected known sizes, found a LazyConv2d without sizes yet. "
            "Run the model once, then attach.",
        ),
        (
            quantised,
            "layer 'x': weight dtype: expected one of float16, bfloat16, float32, float64, found int8. "
            "Attach to the unquantised model.",
        ),
        (
            lambda: strided(torch.randn(4, 8)[:, ::2]),
            "layer 'x': weight: expected memory without gaps or overlaps, found strides (8, 2) for the shape (4, 4). "
            "Give the layer `nn.Parameter(weight.detach().contiguous())`.",
        ),
        (
            lambda: strided(torch.randn(4, 1).expand(4, 4)),
            "layer 'x': weight: expected memory without gaps or overlaps, found strides (1, 0) for the shape (4, 4). "
            "Give the layer `nn.Parameter(weight.detach().contiguous())`.",
        ),
    ],
)
def test_layers_that_cannot_be_adapted(make, expected):
    model = nn.Sequential()
    model.add_module("x", make())
    assert str(layer_problem("x", model.x)) == expected
    adapter = compile(chain(), nn.Linear(4, 4))
    with pytest.raises(AttachError) as excinfo:
        install(model, "a", {"x": adapter})
    assert str(excinfo.value) == expected
    assert not any("adapters" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 3).T,
        torch.randn(4, 1),
        torch.randn(1, 4).T,
        torch.randn(2, 4, 1, 3, 1).to(memory_format=torch.channels_last_3d),
        torch.randn(1, 8)[:, :4],
        torch.randn(3, 4).as_strided((1, 4), (7, 1)),
    ],
)
def test_dense_weights_of_any_order_start_exactly(weight):
    layer = nn.Linear(1, 1) if weight.ndim == 2 else nn.Conv3d(4, 2, (1, 3, 1))
    layer.weight, layer.bias = nn.Parameter(weight), None
    layer.out_features, layer.in_features = weight.shape[:2]
    model = nn.Sequential(layer)
    x = torch.randn(3, weight.shape[1], *([4] * (weight.ndim - 2)))
    base = model(x)
    attach(model, targets=("0",), trained=())
    assert model[0].weight.stride() == weight.stride()
    assert torch.equal(model(x), base)


def test_subclasses_that_keep_the_forward_are_plain_layers():
    assert layer_problem("x", nn.MultiheadAttention(4, 1).out_proj) is None

    class Named(nn.Conv2d):
        pass

    assert layer_problem("x", Named(2, 2, 1)) is None


def test_every_problem_of_an_attach_is_told_at_once():
    model = net()
    linear = compile(chain(), nn.Linear(4, 6))
    targets = {"frist": linear, "norm": linear, "first": linear, "head": linear, "head.9": linear}
    trained = ["first.weight", "norm.wieght", "head.0.bias"]
    assert refused(model, lambda: install(model, "a b", targets, trained)) == "\n".join(
        [
            "adapter name: expected ASCII letters, digits, `_` and `-`, the first a letter or a digit, found 'a b'. "
            "Choose another name.",
            "layer 'frist': target: expected a layer of the model, found no such layer. Did you mean `first`?",
            f"layer 'norm': layer type: expected one of {KINDS}, found GroupNorm. Match other layers.",
            "layer 'first': adapter: expected one for Conv3d(2, 4, 3x3x3), found one for Linear(4, 6). "
            "Compile the adapter for this layer.",
            f"layer 'head': layer type: expected one of {KINDS}, found Sequential. Match other layers.",
            "layer 'head.9': target: expected a layer of the model, found no such layer. Did you mean `head.2`?",
            "parameter 'first.weight': training: expected a parameter that is not adapted, "
            "found the weight of 'first'. Train the layer as a whole or adapt it, not both.",
            "parameter 'norm.wieght': training: expected a parameter of the model, found no such parameter. "
            "Did you mean `norm.weight`?",
        ]
    )


def test_an_adapter_of_the_same_name_is_refused():
    model = net()
    attach(model)
    assert refused(model, lambda: attach(model)) == (
        "adapter name: expected a new name, found 'default', which is attached already. "
        "Choose another name, or detach that adapter first."
    )


def test_parts_of_adapted_layers_are_no_targets():
    model = net()
    attach(model)
    adapter = compile(chain(), model.first.base)
    for name in ("first.base", "first.adapters.default"):
        assert refused(model, lambda name=name: install(model, "b", {name: adapter})) == (
            f"layer '{name}': target: expected a layer of the model, found a part of the adapted layer 'first'. "
            "Name 'first' itself."
        )
    assert refused(model, lambda: install(model, "b", {}, ["wide.weight"])) == (
        "parameter 'wide.weight': training: expected a parameter that is not adapted, found the weight of 'wide'. "
        "Train the layer as a whole or adapt it, not both."
    )


def test_a_layer_claimed_by_two_names_is_refused():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.SiLU(), layer)
    adapters = {"0": compile(chain(), layer), "2": compile(chain(), layer)}
    assert refused(model, lambda: install(model, "a", adapters)) == (
        "layer '2': target: expected a layer of its own, found the layer that is also called '0'. "
        "Name it once: it is adapted at both."
    )


def test_parameters_that_cannot_train():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    model[0].register_parameter("steps", nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False))
    with pytest.raises(AttachError) as excinfo:
        install(model, "a", {}, ["0.steps", "1.weight"])
    assert str(excinfo.value) == (
        "parameter '0.steps': training: expected a floating-point parameter, found int64. Leave it out.\n"
        "parameter '1.weight': training: expected a parameter of known size, found one without a size yet. "
        "Run the model once, then attach."
    )


def test_a_bare_layer_has_nowhere_to_hang_an_adapter():
    layer = nn.Linear(4, 4)
    assert refused(layer, lambda: install(layer, "a", {"": compile(chain(), layer)})) == (
        "model: expected a module that holds the layers, found the layer Linear itself. "
        "Put it into a container, for example `torch.nn.Sequential(layer)`, and attach to that."
    )


def test_wrapped_models_are_attached_to_before_they_are_wrapped():
    inner = net()
    for model, kind in (
        (torch.compile(inner, backend="eager"), "OptimizedModule"),
        (nn.DataParallel(inner), "DataParallel"),
    ):
        assert refused(inner, lambda model=model: install(model, "a", {})) == (
            f"model: expected a plain module, found a {kind}. Attach to the plain model first, then wrap it."
        )


def test_parts_and_wholes_of_adapted_models():
    inner = net()
    outer = nn.ModuleDict({"unet": inner, "other": net()})
    attach(inner)
    assert refused(outer, lambda: install(outer, "b", {})) == (
        "model: expected the model that the other adapters were attached to, found one that holds it at 'unet'. "
        "Attach to the part 'unet', or detach the other adapters first."
    )
    assert names_of(outer) == ("default",)
    attach(outer.other)
    assert refused(outer, lambda: merge(outer)) == (
        "model: expected one adapted model, found several, at 'unet', 'other'. Pass the part that is meant."
    )
    for part in (inner.head, inner.norm, inner.batch_norm):
        assert refused(part, lambda part=part: install(part, "b", {})) == (
            "model: expected the model that the other adapters were attached to, found a part of it. "
            "Attach to that model instead."
        )
    detach(inner)
    attach(inner.head, targets=("0",), trained=())


def test_models_without_adapters():
    model = net()
    for act in (
        merge,
        unmerge,
        detach,
        names_of,
        lambda model: activate(model, {}),
        lambda model: disabled(model).__enter__(),
    ):
        assert refused(model, lambda act=act: act(model)) == (
            "model: expected an attached adapter, found none. "
            "Attach one with `tnpeft.attach`, or pass the whole model that it was attached to."
        )


@pytest.mark.parametrize(
    ("model", "found"),
    [(None, "None"), ("x", "'x'"), (3, "3"), ([], "[]"), (nn.Linear, "the class Linear"), ("a\nb", r"'a\nb'")],
)
def test_what_is_no_model(model, found):
    for act in (
        merge,
        unmerge,
        detach,
        names_of,
        lambda model: activate(model, "a"),
        lambda model: disabled(model).__enter__(),
        lambda model: install(model, "a", {}),
    ):
        with pytest.raises(AttachError) as excinfo:
            act(model)
        assert str(excinfo.value) == f"model: expected a torch.nn.Module, found {found}. Pass the model itself."


def test_unknown_names_and_impossible_scales():
    model = net()
    attach(model, name="adni")
    attach(model, name="ppmi")
    assert refused(model, lambda: activate(model, {"ppmi": 1.0, "andi": 0.5})) == (
        "adapter name: expected one of 'adni', 'ppmi', found 'andi'. Did you mean `adni`?"
    )
    assert refused(model, lambda: detach(model, name="zzz")) == (
        "adapter name: expected one of 'adni', 'ppmi', found 'zzz'. Use one of these names."
    )
    assert refused(model, lambda: activate(model, {"adni": float("nan")})) == (
        "scale of adapter 'adni': expected a finite number, found nan. Use a finite scale, or leave the adapter out."
    )
    assert refused(model, lambda: activate(model, {"adni": "1"})) == (
        "scale of adapter 'adni': expected a finite number, found '1'. Use a finite scale, or leave the adapter out."
    )
    for scale, found in (
        (1e39, "1e+39"),
        (-1e308, "-1e+308"),
        (10**400, "one beyond that"),
        (10**5000, "one beyond that"),
    ):
        assert refused(model, lambda scale=scale: activate(model, {"adni": scale, "ppmi": 1.0})) == (
            f"scale of adapter 'adni': expected a number that float32 can hold, found {found}. Use a smaller scale."
        )
    for name, found in ((["x"], "['x']"), (None, "None"), ("a\nb", r"'a\nb'")):
        text = f"adapter name: expected one of 'adni', 'ppmi', found {found}. Use one of these names."
        assert refused(model, lambda name=name: names_of(model) and record_of(model, name)) == text
        if name is not None:
            assert refused(model, lambda name=name: detach(model, name=name)) == text
        assert refused(model, lambda name=name: attach(model, name=name)) == (
            "adapter name: expected ASCII letters, digits, `_` and `-`, the first a letter or a digit, "
            f"found {found}. Choose another name."
        )
    assert refused(model, lambda: activate(model, ["adni"])) == (
        'activate: expected a name, or scales by name, found list. For example `{"default": 1.0}`.'
    )
    merge(model)
    assert refused(model, lambda: detach(model, name="ppmi")) == (
        "model: expected 'ppmi' unmerged, found a merged model. Call `tnpeft.unmerge(model)` first."
    )


def test_a_merged_model_keeps_what_it_has():
    model = net()
    attach(model)
    merge(model)
    text = "model: expected an unmerged model, found a merged one. Call `tnpeft.unmerge(model)` first."
    assert refused(model, lambda: attach(model, name="b")) == text
    assert refused(model, lambda: activate(model, {"default": 0.5})) == text


def test_a_disabled_model_keeps_what_it_has():
    model = net()
    attach(model)
    x = net_input()
    expected = model(x)
    with disabled(model):
        acts = (merge, unmerge, lambda model: activate(model, {}), lambda model: attach(model, name="b"))
        for act in acts:
            assert refused(model, lambda act=act: act(model)) == (
                "model: expected enabled adapters, found adapters disabled by `tnpeft.disabled`. "
                "Leave the `disabled` context first."
            )
    assert torch.equal(model(x), expected)


def test_a_refused_attach_leaves_even_a_model_with_other_adapters():
    model = net()
    attach(model)
    x = net_input()
    expected, twin = model(x), copy.deepcopy(model)
    refused(model, lambda: install(model, "b", {"nowhere": compile(chain(), plain_modules(model)["first"])}))
    assert torch.equal(model(x), expected)
    assert names_of(model) == names_of(twin) == ("default",)
