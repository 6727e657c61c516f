"""Whole models that the first version pickled: `tests/data/whole_models.pt` was written by commit 7a8f007."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import tnpeft

FILE = Path(__file__).parents[1] / "data" / "whole_models.pt"


@pytest.fixture
def found() -> dict[str, Any]:
    return torch.load(FILE, weights_only=False)  # type: ignore[no-any-return]


def test_adapters_of_cores_alone_work_on(found: dict[str, Any], tmp_path: Path):
    for state in ("cores", "merged"):
        model, x, y = (found[state][key] for key in ("model", "x", "y"))
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)  # `y` is another processor's
        y = model(x)
        if state == "merged":
            tnpeft.unmerge(model)
            torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
            y = model(x)
        with tnpeft.disabled(model):
            base = model(x)
        assert not torch.equal(base, y)
        tnpeft.save(model, tmp_path / f"{state}.safetensors")
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        tnpeft.detach(model)
        assert torch.equal(model(x), base)
        tnpeft.load(model, tmp_path / f"{state}.safetensors")
        torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)


def test_copies_in_their_earlier_places_are_refused_with_the_way_out(found: dict[str, Any]):
    model, x, y = (found["norms"][key] for key in ("model", "x", "y"))
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.merge(model)
    assert str(caught.value) == (
        "the pickled model: expected one of this version, or cores alone, found biases, norms or statistics in the "
        "places of an earlier version. Write the adapter with `tnpeft.save` in the version that pickled it, and load "
        "it onto the base here."
    )


def test_no_room_is_called_as_the_function():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'tnpeft.plan'$"):
        importlib.import_module("tnpeft.plan")
    assert callable(tnpeft.plan)


def test_models_of_the_time_before_the_rooms_were_moved_work_on(tmp_path: Path):
    """Trained biases and norms, merged, and several adapters at scales: written by commit 72a6746."""
    found = torch.load(FILE.with_name("models_before_rooms.pt"), weights_only=False)
    for state, case in found.items():
        model, x, y = case["model"], case["x"], case["y"]
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        if state == "merged":
            tnpeft.unmerge(model)
            torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        with tnpeft.accumulating(model):
            model(x).sum().backward()
        with tnpeft.disabled(model):
            base = model(x)
        assert not torch.equal(base, y)
        tnpeft.detach(model)
        assert torch.equal(model(x), base)
