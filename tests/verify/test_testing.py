"""`tnpeft.testing`: the strategies cover what they say, and the assertion holds for whatever they make."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import tnpeft
from tnpeft import testing
from tnpeft.errors import TnpeftError
from tnpeft.network import layer_of
from tnpeft.spec.pattern import KINDS

# The norm of a channel that a bond of 2 and a core of zeros make: no gradient ever reaches `up`.
DEAD = """
tnpeft: 1
name: dead
layers: Linear
params: {r: 2}
sizes: {o: out_channels, i: in_channels}
cores:
  up: {legs: o r, init: normal(1)}
  mask: {legs: r, init: zeros, frozen: true}
  down: r i
weight: o i
start: frozen_copy
"""


@settings(max_examples=60)
@given(st.data())
def test_layers_take_their_inputs_and_bind(data: st.DataObject):
    layer = data.draw(testing.layers(dtypes=("float32", "float64")))
    x = data.draw(testing.inputs_for(layer))
    signature = layer_of(layer)
    assert max(signature.in_channels, signature.out_channels) <= 12
    assert x.dtype == layer.weight.dtype
    with torch.no_grad():
        assert layer(x).numel()


def test_layers_have_every_kind_and_option():
    seen: Counter[object] = Counter()

    @settings(max_examples=400, database=None)
    @given(testing.layers())
    def look(layer: nn.Module) -> None:
        signature = layer_of(layer)
        seen.update([signature.kind, f"groups {signature.groups}", f"bias {layer.bias is not None}"])
        seen.update(["one channel"] if signature.in_channels == 1 else ["prime"] if signature.in_channels == 7 else [])
        if not isinstance(layer, nn.Linear):
            seen.update([layer.padding_mode, f"stride {max(layer.stride)}", f"dilation {max(layer.dilation)}"])
            seen.update(["same"] if layer.padding == "same" else [])

    look()
    expected = {*KINDS, *("groups 1", "groups 2", "groups 3", "bias True", "bias False", "one channel", "prime")}
    expected |= {"zeros", "reflect", "replicate", "circular", "same", "stride 2", "dilation 2"}
    assert expected <= seen.keys()


def test_layers_can_be_chosen():
    @settings(max_examples=30, database=None)
    @given(testing.layers("ConvTranspose2d", max_channels=5, max_kernel=2, groups=False, dtypes=("bfloat16",)))
    def look(layer: nn.Module) -> None:
        assert isinstance(layer, nn.ConvTranspose2d)
        assert max(layer.in_channels, layer.out_channels) <= 5
        assert max(layer.kernel_size) <= 2
        assert layer.groups == 1
        assert layer.weight.dtype == torch.bfloat16

    look()


@settings(max_examples=60)
@given(st.data())
def test_params_are_the_specs(data: st.DataObject):
    spec = tnpeft.load_spec("lokr")
    params = data.draw(testing.params_of(spec, {"alpha": 3}))
    assert params["alpha"] == 3
    assert params.keys() <= spec.params.keys()
    spec.bind(data.draw(testing.layers()), **params)


@pytest.mark.slow
def test_networks_have_every_construct():
    seen: Counter[str] = Counter()

    @settings(max_examples=200, database=None)
    @given(testing.networks())
    def look(network: tnpeft.Network) -> None:
        uses = Counter(leg for core in network.cores for leg in core.legs)
        opened = set(network.open_legs)
        found = {
            "bond": any(number == 2 and leg not in opened for leg, number in uses.items()),
            "hyperedge": any(number > 2 and leg not in opened for leg, number in uses.items()),
            "kept": any(number > 1 and leg in opened for leg, number in uses.items()),
            "scalar": any(not core.legs for core in network.cores),
            "frozen": any(core.frozen and core.origin is None for core in network.cores),
            "shared": any(core.shared == "model" for core in network.cores),
            "scope": any(core.shared == "block" for core in network.cores),
            "base weight": any(core.origin == "weight" for core in network.cores),
            "terms": len(network.terms) > 1,
            "dora": network.compose == "dora",
            network.start: True,
        }
        seen.update(name for name, holds in found.items() if holds)
        tnpeft.plan(network)

    look()
    wanted = {"bond", "hyperedge", "kept", "scalar", "frozen", "shared", "scope", "base weight", "terms", "dora"}
    assert wanted | {"zero", "frozen_copy"} <= seen.keys()


@pytest.mark.slow
@settings(max_examples=6, suppress_health_check=[HealthCheck.nested_given])
@given(testing.specs())
def test_random_specs_are_sound(spec: tnpeft.Spec):
    testing.assert_adapter_ok(spec, examples=2)


def test_the_assertion_takes_names_paths_texts_and_layers(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(DEAD.replace("zeros, frozen", "ones, frozen"))
    report = testing.assert_adapter_ok(path, examples=2, r=3)
    assert report.ok
    assert testing.assert_adapter_ok(path.read_text(), examples=2).spec == "dead"
    report = testing.assert_adapter_ok("lora", examples=2, layer=nn.Conv2d(4, 6, 3, groups=2))
    assert report.seen["kinds"] == Counter({"Conv2d": 2})
    assert report.seen["groups"] == Counter({"2": 2})


def test_the_assertion_names_the_dead_cores():
    with pytest.raises(AssertionError) as excinfo:
        testing.assert_adapter_ok(DEAD, examples=3)
    lines = str(excinfo.value).splitlines()
    assert lines[0] == "spec 'dead' fails alive (seed 0, 0 layers refused)"
    assert lines[1] == (
        "  alive: no gradient ever reaches cores 'up', 'down': freeze them, or mend the inits of the cores around them"
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: testing.layers("Conv4d"), "layer kind: expected one of Linear, Conv1d, Conv2d, Conv3d, "),
        (lambda: testing.layers(()), "layer kinds: expected some of Linear, "),
        (lambda: testing.verify("lora", examples=0), "`examples`: expected a positive whole number, found 0. "),
        (lambda: testing.verify("lora", rank=2), "params of spec 'lora': expected one of r, alpha, found `rank`. Did"),
        (lambda: testing.assert_adapter_ok("lora", layer=3), "`layer`: expected a torch.nn layer or a tnpeft.Layer, "),
        (lambda: testing.run_check("shape", "lora", testing.Case("Linear", 2, 2)), "check: expected one of sizes, "),
    ],
)
def test_usage(act, message: str):
    with pytest.raises(TnpeftError) as excinfo:
        act()
    assert str(excinfo.value).startswith(message)


def test_it_is_there_without_an_import_of_its_own():
    code = "import sys, tnpeft; assert 'torch' not in sys.modules; assert callable(tnpeft.testing.assert_adapter_ok)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
