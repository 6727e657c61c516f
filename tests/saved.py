"""An adapted model that was trained, and what its file says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import safe_open
from small import attach, bits, net, net_input, same_bits, train
from torch import Tensor, nn

from tnpeft.errors import AdapterFileError
from tnpeft.io import load
from tnpeft.io.manifest import KEY, _canonical, digest
from tnpeft.network import Spec

X = net_input()


def trained(name: str = "adni", spec: Spec | None = None) -> nn.Module:
    model = net()
    attach(model, spec, name)
    model.train()
    train(model, X)
    return model.eval()


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()[KEY])


def refused(
    model: nn.Module,
    path: Path,
    act: Callable[[nn.Module, Path], object] = load,
    error: type[Exception] = AdapterFileError,
) -> str:
    """The text of the error, the model left as it was."""
    before = bits(model)
    adapted = "_tnpeft" in model.__dict__
    with pytest.raises(error) as excinfo:
        act(model, path)
    assert same_bits(bits(model), before)
    assert ("_tnpeft" in model.__dict__) == adapted
    return str(excinfo.value).replace(f"{path}: ", "FILE: ")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """The file with another manifest, and a digest that fits it again."""
    with safe_open(path, framework="pt") as opened:
        fields = json.loads(opened.metadata()[KEY])
    tensors = safetensors.torch.load_file(path)
    number, _ = fields.pop("format"), fields.pop("sha256")
    change(fields, tensors)
    number = fields.pop("format", number)
    text = _canonical({"format": number, "sha256": digest(fields, tensors), **fields})
    safetensors.torch.save_file(tensors, path, {KEY: text})
