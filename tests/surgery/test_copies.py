"""Copies and pickles of adapted models and of parts of them, and what is kept around a change of the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import move
from torch import nn

import tnpeft
from tnpeft.errors import BindError, ExecutionError
from tnpeft.program import counting

X = torch.ones(2, 8)


def model(spec: str = "lora", layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    tnpeft.attach(plain, spec, match=".")
    move(plain)
    return plain


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("spec", ["lora", "vera", "lotr", "hira", "dora"])
def test_parts_of_a_model_are_copied(spec: str, copied: Callable[[Any], Any]):
    whole = model(spec)
    for layer in whole:
        assert torch.equal(copied(layer)(X), layer(X))
        assert torch.equal(copied(layer.base).weight, layer.base.weight)
        adapter = layer.adapter("default")
        assert torch.equal(copied(adapter).delta_weight(), adapter.delta_weight())
    torch.testing.assert_close(copied(whole[1:])(X), whole[1:](X))  # a first pass contracts layer by layer
    torch.testing.assert_close(copied(whole)(X), whole(X))


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_layer_that_is_compiled_in_place_runs_its_own_weights(copied: Callable[[Any], Any]):
    whole = model()
    for layer in whole:
        layer.compile(backend="eager")
    with torch.no_grad():
        whole(X)
        twin = copied(whole)
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(X).count_nonzero() == 0


@pytest.mark.parametrize("mode", ["dense", "factored", "hybrid"])
def test_a_first_pass_of_the_disabled_model_changes_nothing_of_later_ones(mode: str):
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    tnpeft.attach(whole, "lora", match=".", mode=mode)
    with tnpeft.disabled(whole):
        whole(X)
    for _ in range(2):
        whole(X)
    with counting() as counts:
        whole(X)
    assert [3] in counts.values() or [3, 3] in counts.values()


def test_an_earlier_pickle_keeps_and_checks_while_accumulating():
    file = Path(__file__).parents[1] / "data" / "models_before_rooms.pt"
    case = torch.load(file, weights_only=False)["trained"]
    whole, x = case["model"], case["x"]
    with tnpeft.accumulating(whole):
        require_check(whole, x)


def test_what_is_attached_anew_while_accumulating_is_kept_too():
    whole = model()
    with tnpeft.accumulating(whole):
        tnpeft.detach(whole)
        tnpeft.attach(whole, "lora", match=".")
        require_check(whole, X)


def require_check(whole: nn.Module, x: torch.Tensor) -> None:
    """After a step of the optimiser, what was kept is refused."""
    whole(x).sum().backward()
    torch.optim.SGD([parameter for parameter in whole.parameters() if parameter.requires_grad], 0.1).step()
    with pytest.raises(ExecutionError, match="values that were written since"):
        whole(x)


def test_a_module_that_shares_the_hooks_of_a_model_runs():
    whole, other = model(), nn.Sequential(nn.Identity())
    other._forward_pre_hooks, other._forward_hooks = whole._forward_pre_hooks, whole._forward_hooks
    assert torch.equal(other(X), X)


def test_networks_are_remembered_by_what_their_params_are():
    class Odd(float):
        def __repr__(self) -> str:
            return "odd"

    spec, layer = tnpeft.load_spec("lora"), nn.Linear(8, 8)
    assert spec.bind(layer, r=2) is spec.bind(nn.Linear(8, 8), r=2)
    assert spec.bind(layer, r=2) is not spec.bind(layer, r=2.0)
    assert [spec.bind(layer, r=Odd(rank)).params["r"] for rank in (2, 3)] == [2, 3]
    assert spec.bind(tnpeft.Layer("Linear", 8, 8, []), r=2).params["r"] == 2  # type: ignore[arg-type]
    with pytest.raises(BindError, match="a larger one"):
        spec.bind(layer, r=10**5000)
