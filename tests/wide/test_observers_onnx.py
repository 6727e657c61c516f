"""ONNX files and MONAI's converters have what the adapted model computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import tnpeft

onnxruntime = pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from monai.bundle import ckpt_export  # noqa: E402
from monai.networks.nets import UNet  # noqa: E402
from monai.networks.utils import convert_to_onnx, convert_to_torchscript  # noqa: E402
from observers import exported_by_dynamo, exported_to_onnx, subject  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and MONAI warn of each other's exporters

X = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["auto", "factored", "hybrid"])
@pytest.mark.parametrize(
    ("kind", "spec"), [("Linear", "lora"), ("Linear", "quanta"), ("Conv2d", "dora"), ("Conv3d", "tenvoo_l")]
)
def test_an_onnx_file_computes_what_the_model_computes(kind, spec, mode):
    assert exported_to_onnx(*subject(kind, spec, mode)) < 1e-5


@pytest.mark.parametrize(("kind", "spec", "mode"), [("Linear", "lora", "factored"), ("Conv3d", "tenvoo_l", "auto")])
def test_so_does_one_by_way_of_torch_export(kind, spec, mode):
    assert exported_by_dynamo(*subject(kind, spec, mode)) < 1e-5


def unet(spec: str = "tenvoo_l", merged: bool = False) -> nn.Module:
    """An adapted 3D U-Net, some way from its start."""
    torch.manual_seed(0)
    model = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv3d)]
    tnpeft.attach(model.eval(), spec, match=layers, train={"bias": "adapted"})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if merged:
        tnpeft.merge(model)
    return model


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
@pytest.mark.parametrize("spec", ["lora", "tenvoo_l"])
def test_monai_converts_a_unet(spec, merged):
    model = unet(spec, merged)
    expected = model(X).detach()
    trace = convert_to_torchscript(model, inputs=[X], use_trace=True)
    torch.testing.assert_close(trace(X), expected, rtol=1e-5, atol=1e-5)
    file = convert_to_onnx(model, inputs=[X], use_trace=True).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    numpy.testing.assert_allclose(output, expected.numpy(), rtol=1e-4, atol=1e-5)
    if merged:
        script = convert_to_torchscript(model)
        assert torch.equal(script(X), expected)
        return
    with pytest.raises(tnpeft.TnpeftError) as excinfo:
        convert_to_torchscript(model)
    assert "torch.jit.script: expected a merged adapter, found an adapter that is not merged." in str(excinfo.value)
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_monai_exports_a_bundle_of_it(merged, tmp_path: Path):
    model = unet(merged=merged)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "metadata.json").write_text(json.dumps({}))
    network = {"_target_": f"{__name__}.unet", "merged": merged}
    (tmp_path / "inference.json").write_text(json.dumps({"network_def": network}))
    arguments = {
        "net_id": "network_def",
        "ckpt_file": str(tmp_path / "model.pt"),
        "config_file": str(tmp_path / "inference.json"),
        "key_in_ckpt": "",
        "input_shape": list(X.shape),
    }
    expected = model(X).detach()
    ckpt_export(filepath=str(tmp_path / "traced.ts"), use_trace=True, **arguments)
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.ts")(X), expected, rtol=1e-5, atol=1e-5)
    if merged:
        ckpt_export(filepath=str(tmp_path / "scripted.ts"), **arguments)
        torch.testing.assert_close(torch.jit.load(tmp_path / "scripted.ts")(X), expected, rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(tnpeft.TnpeftError):
        ckpt_export(filepath=str(tmp_path / "scripted.ts"), **arguments)
    assert not (tmp_path / "scripted.ts").exists()
