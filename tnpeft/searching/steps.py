"""The time of a training step with a network, relative to full fine-tuning: measured on a model, or predicted."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.errors import Problem, TnpeftError, in_one_line
from tnpeft.network import Layer, Spec, load_spec
from tnpeft.planning import nominal_call
from tnpeft.recipe import attach
from tnpeft.schedule import best_plan, feasible_plans, predict
from tnpeft.surgery import activate

__all__ = ["ROUNDS", "measured_steps", "predicted_steps"]

ROUNDS = 7
# What another library's model may raise when it is called.
THEIR_ERRORS = (ArithmeticError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError,
                ValueError)  # fmt: skip


def measured_steps(
    model: nn.Module, names: Sequence[str], specs: Mapping[str, Spec], example: Sequence[Any], rounds: int = ROUNDS
) -> dict[str, float]:
    """The median time of a step with each spec on the named layers, relative to a step that trains the whole model.

    A step is `model(*example)`, the mean square of the output, gradients and Adam. In every round all take turns in one
    process, and each is compared with the full step of its round, so that a slow minute slows both. `model` stays as it
    is. Raises TnpeftError if it cannot be called.
    """
    full, adapted = copy.deepcopy(model), copy.deepcopy(model)
    for number, spec in enumerate(specs.values()):
        attach(adapted, spec, match=[*names], name=f"{number}")
    full.requires_grad_(True)
    step_full = _step(full, [*full.parameters()], example)
    steps = []
    for number in range(len(specs)):
        activate(adapted, f"{number}")
        steps.append(_step(adapted, [each for each in adapted.parameters() if each.requires_grad], example))
    ratios: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 1):
        reference = _seconds(step_full)
        for number, step in enumerate(steps):
            activate(adapted, f"{number}")
            if turn:
                ratios[number].append(_seconds(step) / reference)
            else:
                step()  # which plans
    return dict(zip(specs, map(statistics.median, ratios), strict=True))


def _step(model: nn.Module, parameters: Sequence[Tensor], example: Sequence[Any]) -> Callable[[], None]:
    optimiser = torch.optim.Adam([*parameters], lr=1e-9)

    def step() -> None:
        optimiser.zero_grad()
        output = _called(model, example)
        (output.float() ** 2).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def _called(model: nn.Module, example: Sequence[Any]) -> Tensor:
    fix = "Pass the arguments of a call of the model."
    try:
        output = model(*example)
    except THEIR_ERRORS as error:
        said = in_one_line(f"{type(error).__name__}: {error}", 160)
        raise TnpeftError(Problem("search, `example`", "arguments that the model takes", said, fix)) from error
    if not isinstance(output, Tensor):
        found = f"a {type(output).__name__}"
        raise TnpeftError(Problem("search, `example`", "a model that returns a tensor", found, fix))
    return output


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def predicted_steps(layers: Sequence[Layer], specs: Mapping[str, Spec]) -> dict[str, float]:
    """The same ratio for these layers alone, predicted by the planner's cost model for calls of its assumed size.

    Full fine-tuning is predicted as the spec `full`, one core as large as the weight.
    """
    full = _predicted(load_spec("full"), layers)
    return {key: _predicted(spec, layers) / full for key, spec in specs.items()}


def _predicted(spec: Spec, layers: Sequence[Layer]) -> float:
    """Predicted seconds of a forward and a backward pass of the layers, each in the mode that `auto` chooses."""
    seconds = 0.0
    for layer in layers:
        call = nominal_call(layer)
        seconds += predict(best_plan(feasible_plans(spec.bind(layer), call), call), call).step
    return seconds
