"""What is saved or loaded all the same, with a warning: another base of the same shapes, numbers that are none."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved import X, metadata, rewritten, trained
from small import attach, bits, chain, net, same_bits, train
from torch import nn

import tnpeft
from tnpeft.errors import TnpeftWarning
from tnpeft.io import load, save
from tnpeft.network import load_spec
from tnpeft.surgery import adapters_of, disabled, trained_of

DATA = Path(__file__).parents[1] / "data"
OTHERS = "base model: expected the values that the adapter was trained on, found others in"
ELSEWHERE = "Load it onto that base; here it computes something else than it was trained to."
DIVERGED = "Training may have diverged: go back to an earlier file, or train with a smaller learning rate."


def warned(act, *arguments) -> str:
    with pytest.warns(TnpeftWarning) as told:
        act(*arguments)
    (warning,) = told
    assert warning.filename == __file__
    return str(warning.message)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save(trained(), path)
    return path


def test_another_base_of_the_same_shapes_is_named_layer_by_layer(file):
    other = net(seed=1)
    assert warned(load, other, file) == (
        f"{file}: {OTHERS} 'first', 'wide', 'up', 'head.0'. {ELSEWHERE}"
    )  # norms start alike
    assert tnpeft.names_of(other) == ("adni",)


def test_one_number_is_enough_and_what_is_not_adapted_is_not_asked(file):
    base = net()
    with torch.no_grad():
        base.head[2].weight.add_(1)  # neither adapted nor trained
        base.batch_norm.running_mean.add_(1)  # each adapter has its own
    load(base, file)
    for name, owner in (("head.0.weight", "head.0"), ("up.bias", "up"), ("norm.bias", "norm")):
        other = net()
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1].add_(1e-3)
        assert warned(load, other, file) == f"{file}: {OTHERS} '{owner}'. {ELSEWHERE}"


def test_as_an_error_the_warning_leaves_the_model_alone(file):
    other = net(seed=1)
    before = bits(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TnpeftWarning) as excinfo:
            load(other, file)
    assert [problem.what for problem in excinfo.value.problems] == ["base model"]
    assert same_bits(bits(other), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_before_saving_are_the_base_of_the_file(tmp_path, dtype):
    model = trained().to(dtype)
    save(model, tmp_path / "x")
    fresh = net().to(dtype)
    load(fresh, tmp_path / "x")
    assert torch.equal(fresh(X.to(dtype)), model(X.to(dtype)))


def test_the_base_is_the_one_below_other_adapters(tmp_path):
    """Another adapter trains the layer as a whole, its bias and a norm; what is digested is the base's own."""
    model = net()
    attach(model, chain(), "whole", targets=("wide",), trained=("up.weight", "up.bias", "norm.weight"))
    model.train()
    train(model, X, rate=0.5)
    assert not torch.equal(trained_of(model, "whole")["up.weight"], net().up.weight)
    attach(model, load_spec("lora"), "second", targets=("up",), trained=("norm.weight",))
    for act in ({"second": 1.0}, {"whole": 1.0, "second": 0.5}):
        tnpeft.activate(model, act)
        save(model, tmp_path / "x", "second")
        load(net(), tmp_path / "x")
    with disabled(model):
        save(model, tmp_path / "x", "second")
    load(net(), tmp_path / "x")
    tnpeft.detach(model, name="second")
    load(model, tmp_path / "x")


def test_weights_without_values_have_no_digest(tmp_path, file):
    """Offloading puts weights on the meta device for a time; the rest is digested."""
    model = trained()
    values = {layer: model.get_submodule(layer).base for layer in ("first", "up")}
    values["first"].weight = nn.Parameter(values["first"].weight.detach().to("meta"), requires_grad=False)
    save(model, tmp_path / "x")
    assert "first.weight" not in metadata(tmp_path / "x")["digests"]
    assert "up.weight" in metadata(tmp_path / "x")["digests"]
    load(net(), tmp_path / "x")


def test_files_of_earlier_versions_load_silently():
    """Written at format 3: they know no digests, and name layers with what torch.compile puts around them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    load(model, DATA / "adapter_format_3.safetensors")
    expected = torch.tensor([[0.11621347814798355, -0.02879420667886734]])
    torch.testing.assert_close(model(torch.ones(1, 4)), expected)


def test_numbers_that_are_none(tmp_path):
    path = tmp_path / "x"
    for value in (float("nan"), float("inf"), -float("inf")):
        model = trained()
        with torch.no_grad():
            adapters_of(model, "adni")["up"].cores["left"].view(-1)[1] = value
            trained_of(model, "adni")["norm.bias"][0] = value
        text = (
            f"{path}: values of the adapter: expected finite numbers, found NaN or infinity in 'up', 'norm.bias'. "
            f"{DIVERGED}"
        )
        assert warned(save, model, path) == text
        fresh = net()
        assert warned(load, fresh, path) == text
        assert torch.equal(
            adapters_of(fresh, "adni")["up"].cores["left"].isfinite(),
            adapters_of(model, "adni")["up"].cores["left"].isfinite(),
        )


def test_large_finite_numbers_are_fine(tmp_path):
    model = trained()
    with torch.no_grad():
        adapters_of(model, "adni")["up"].cores["left"].fill_(3e38)  # their sum is infinite
    save(model, tmp_path / "x")


def test_many_names_are_folded(tmp_path):
    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(*[nn.Linear(2, 2) for _ in range(13)])

    model, path = base(0), tmp_path / "x"
    tnpeft.attach(model, "lora", match=".", r=1)
    save(model, path)
    names = ", ".join(f"'{number}'" for number in range(10))
    assert warned(load, base(1), path) == f"{path}: {OTHERS} {names} and 3 more. {ELSEWHERE}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4) | st.sampled_from(["norm.bias", "first.bias", "nothing", "bias", "norm"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["trained", "recipe", "bias", "norm", "also", "x"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(about=st.dictionaries(st.sampled_from(["trained", "recipe", "x"]), JSON, max_size=3))
def test_whatever_a_file_says_about_itself_the_report_counts_what_trains(file, about):
    path = file.with_name("odd")
    path.write_bytes(file.read_bytes())
    rewritten(path, lambda fields, tensors: fields.update(about=about))
    handle = load(net(), path)
    report = handle.report()
    assert report.bias + report.norm + report.also == 4 + 4 + 4
    assert report.trained == sum(parameter.numel() for parameter in handle.parameters())
    assert tnpeft.inspect(path).parameters == report.trained


@pytest.mark.parametrize(
    "odd", [5, {"bias": 3}, {"bias": {"x": 1}}, {"norm": ["nothing"]}, {"also": [["norm.bias"]]}, []]
)
def test_a_report_of_a_file_with_an_odd_about(file, odd):
    rewritten(file, lambda fields, tensors: fields.update(about={"trained": odd}))
    report = load(net(), file).report()
    assert (report.bias, report.norm, report.also) == (0, 0, 12)
    assert str(report)
