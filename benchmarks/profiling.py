"""Where a method's training step spends its time over the floor.

The functions that do tnpeft's work are timed. What they do not account for of the difference to the floor is the
optimiser's share and the rest: weight gradients of dense layers, Python around the work, hooks.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from common import show
from methods import adapt, modes_of
from models import unet
from torch import nn
from training import Setting, optimiser_of

import tnpeft.execution.batches
import tnpeft.execution.modes
import tnpeft.program.clusters
import tnpeft.program.delta
from tnpeft.program import ClusterGradients, ClusterMerge, FactoredUpdate

__all__ = ["profile"]

WARMUP = 2
# Where a function is found, in which phase of a step it runs, and the part that it belongs to. None calls another one.
CLOCKED = (
    (tnpeft.program.clusters.Contracted, "forward", "forward", "clusters"),
    (FactoredUpdate, "forward", "forward", "chain, forward"),
    (ClusterMerge, "__call__", "forward", "delta weight"),
    (tnpeft.program.delta.Delta, "forward", "forward", "delta weight"),
    (tnpeft.execution.modes, "add_weight", "forward", "sum with the weight"),
    (tnpeft.execution.batches, "add_weight", "forward", "sum with the weight"),
    (tnpeft.program.clusters.Contracted, "backward", "backward", "clusters, gradients"),
    (FactoredUpdate, "backward", "backward", "chain, backward"),
    (ClusterGradients, "backward", "backward", "chain, backward"),
    (tnpeft.program.delta.Delta, "backward", "backward", "delta weight, gradients"),
)
PHASES = ("forward", "backward", "optimiser")
Seconds = dict[str, float]


def profile(method: str, setting: Setting, rounds: int) -> dict[str, Any]:
    """Prints and returns the parts of a step over the floor, in seconds: medians over rounds."""
    base = unet(setting.model)
    models = {
        name: adapt(setting.placed(copy.deepcopy(base)), name, setting.mode) for name in ("full", "floor", method)
    }
    steps = {name: phases(model, setting) for name, model in models.items()}
    found: dict[str, list[Seconds]] = {name: [] for name in steps}
    with clocks(setting) as clocked:
        for number in range(WARMUP + rounds):
            for name, step in steps.items():
                clocked.clear()
                seconds = step()
                if number >= WARMUP:
                    found[name].append({**seconds, **clocked})
    full, floor, own = (medians(found[name]) for name in steps)
    parts = over_the_floor(own, floor)
    whole = sum(full[phase] for phase in PHASES)
    rows = [[part, f"{1e3 * value:.1f}", f"{value / whole:.3f}"] for part, value in parts.items()]
    rows.append(["in all", f"{1e3 * sum(parts.values()):.1f}", f"{sum(parts.values()) / whole:.3f}"])
    show(f"{method} over the floor, {setting}", ("part", "ms", "of a full step"), rows)
    about = {
        "modes": dict(modes_of(models[method])),
        "tensors": sum(parameter.requires_grad for parameter in models[method].parameters()),
        "floor_ratio": sum(floor[phase] for phase in PHASES) / whole,
        "ratio": sum(own[phase] for phase in PHASES) / whole,
    }
    modes = ", ".join(f"{number} {mode}" for mode, number in about["modes"].items())
    print(
        f"a full step takes {1e3 * whole:.0f} ms, the floor {about['floor_ratio']:.3f}, {method} {about['ratio']:.3f}"
    )
    print(f"{about['tensors']} tensors train; layers: {modes or 'none of tnpeft'}")
    seconds = {"full": full, "floor": floor, method: own}
    return {"method": method, **setting.as_json(), "rounds": rounds, "seconds": seconds, "over_floor": parts, **about}


def phases(model: nn.Module, setting: Setting) -> Callable[[], Seconds]:
    """One training step as a function that returns the seconds of its phases."""
    optimiser = optimiser_of(model, setting)
    x, timesteps = setting.inputs()
    target = torch.randn_like(x)

    def run() -> Seconds:
        times = [now(setting)]
        with setting.precision():
            loss = nn.functional.mse_loss(model(x, timesteps), target)
        times.append(now(setting))
        loss.backward()
        times.append(now(setting))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        times.append(now(setting))
        return {phase: times[place + 1] - times[place] for place, phase in enumerate(PHASES)}

    return run


@contextlib.contextmanager
def clocks(setting: Setting) -> Iterator[Seconds]:
    """Wraps what is `CLOCKED`; the seconds of each part add up in what is given."""
    seconds: Seconds = {}
    originals = [(owner, name, vars(owner)[name]) for owner, name, *_ in CLOCKED]
    try:
        for owner, name, _, part in CLOCKED:
            original = vars(owner)[name]
            function = original.__func__ if isinstance(original, staticmethod) else original
            timed = _timed(function, part, seconds, setting)
            setattr(owner, name, staticmethod(timed) if isinstance(original, staticmethod) else timed)
        yield seconds
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed(function: Callable[..., Any], part: str, seconds: Seconds, setting: Setting) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        start = now(setting)
        found = function(*arguments)
        seconds[part] = seconds.get(part, 0.0) + now(setting) - start
        return found

    return run


def now(setting: Setting) -> float:
    """The time, once the device has done what it was given."""
    if setting.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(rounds: Sequence[Seconds]) -> Seconds:
    return {part: statistics.median(one.get(part, 0.0) for one in rounds) for part in rounds[0]}


def over_the_floor(own: Mapping[str, float], floor: Mapping[str, float]) -> Seconds:
    """The parts of the difference between a step and the floor's, the rest of each phase last."""
    found = {part: own[part] for part in dict.fromkeys(part for *_, part in CLOCKED) if part in own}
    found["optimiser"] = own["optimiser"] - floor["optimiser"]
    for phase in ("forward", "backward"):
        known = sum(own.get(part, 0.0) for part in {part for *_, known, part in CLOCKED if known == phase})
        found[f"rest, {phase}"] = own[phase] - floor[phase] - known
    return found
