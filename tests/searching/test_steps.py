"""The time of a training step with a network, against full fine-tuning: measured and predicted."""

from __future__ import annotations

import pytest
import torch
from test_search import net
from torch import nn

import tnpeft
from tnpeft.errors import TnpeftError
from tnpeft.network import layer_of
from tnpeft.planning import nominal_call
from tnpeft.schedule import plan, predict
from tnpeft.searching import steps
from tnpeft.searching.steps import measured_steps, predicted_steps


def test_predictions_are_those_of_the_mode_that_auto_takes():
    layers = [layer_of(nn.Conv3d(8, 8, 3)), layer_of(nn.Linear(32, 16))]
    lora = tnpeft.load_spec("lora")

    def seconds(name: str) -> float:
        own = [(tnpeft.load_spec(name).bind(layer), nominal_call(layer)) for layer in layers]
        return sum(predict(plan(network, "auto", call), call).step for network, call in own)

    assert predicted_steps(layers, {"a": lora}) == {"a": pytest.approx(seconds("lora") / seconds("full"))}


def test_steps_take_turns_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch):
    turns = []
    clock = iter([1.0, 4.0, 2.0, 6.0, 2.0, 8.0, 3.0, 5.0, 5.0, 5.0])  # the first of the full step is of the warmup
    monkeypatch.setattr(steps, "_seconds", lambda step: (turns.append(step), step(), next(clock))[-1])
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    specs = {"one": tnpeft.load_spec("lora"), "two": tnpeft.load_spec("moslora")}
    found = measured_steps(model, ["0", "1"], specs, [torch.zeros(1, 4, 6, 6)], rounds=3)
    # Rounds: full 4, one 2, two 6; full 2, one 8, two 3; full 5, one 5, two 5.
    assert found == {"one": 1.0, "two": 1.5}
    assert len({*turns}) == 3
    assert turns[1:4] == turns[4:7] == turns[7:]
    assert turns[0] is turns[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {type(module) for module in model} == {nn.Conv2d}


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "example", "text"),
    [
        (
            nn.Sequential(nn.Conv2d(4, 4, 2)), [],
            "search, `example`: expected arguments that the model takes, found TypeError: Sequential.forward() missing "
            "1 required positional argument: 'input'. Pass the arguments of a call of the model.",
        ),
        (
            nn.Sequential(nn.Conv2d(4, 4, 2), Pair()), [torch.zeros(1, 4, 6, 6)],
            "search, `example`: expected a model that returns a tensor, found a tuple. "
            "Pass the arguments of a call of the model.",
        ),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_called_so(model: nn.Module, example: list[torch.Tensor], text: str):
    with pytest.raises(TnpeftError) as caught:
        measured_steps(model, ["0"], {"a": tnpeft.load_spec("lora")}, example)
    assert str(caught.value) == text
