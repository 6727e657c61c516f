"""The execution modes of a layer side by side: the predicted time and memory of each for one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tnpeft.network import Network
from tnpeft.planning import Call, Link
from tnpeft.schedule.model import Plan
from tnpeft.schedule.modes import MODES, best_plan, feasible_plans, plan
from tnpeft.schedule.predict import predict

__all__ = ["Costs", "bytes_text"]


@dataclass(frozen=True)
class Costs:
    """The plans of a network's modes for one call, from which `auto` chooses."""

    call: Call
    plans: dict[str, Plan]
    auto: Plan
    inference: Plan
    large: tuple[str, ...]

    @classmethod
    def of(cls, network: Network, call: Call) -> Costs:
        plans = {mode: plan(network, mode, call) for mode in MODES if mode != "auto"}
        choices = [feasible_plans(network, call, alone) for alone in (False, True)]
        auto, inference = (best_plan(found, call, alone) for found, alone in zip(choices, (False, True), strict=True))
        allowed = [found.mode for found in choices[0]]
        large = tuple(mode for mode, found in plans.items() if found.mode == mode and mode not in allowed)
        return cls(call, plans, auto, inference, large)

    def __str__(self) -> str:
        """What `auto` takes, in one line."""
        alone = "" if self.inference.mode == self.auto.mode else f" ({self.inference.mode} without gradients)"
        return f"{self.auto.mode}{alone} for {self.call} on {self.call.device}"

    def rows(self) -> list[tuple[str, ...]]:
        """For each mode its name, times of forward, backward and step, FLOPs, peak, what is saved, and remarks."""
        return [self._row(mode) for mode in self.plans]

    def _row(self, mode: str) -> tuple[str, ...]:
        known = self.plans[mode]
        cost = predict(known, self.call)
        times = (f"{seconds * 1e3:.3g} ms" for seconds in (cost.forward, cost.backward, cost.step))
        peak, saved = bytes_text(known.peak_bytes), bytes_text(known.saved_bytes)
        marks = ["auto"] if mode == self.auto.mode else []
        marks += [f"as dense ({known.reason})"] if known.mode != mode else []
        marks += ["more memory than `auto` gives it"] if mode in self.large else []
        return mode, *times, f"{known.flops:,}", peak, saved, ", ".join(marks)

    def data(self) -> dict[str, Any]:
        """The same for JSON."""
        factored = self.plans["factored"]
        chain = [[_link_data(part, link) for link in part.links] for part in factored.terms or (factored,)]
        axes = self.call.axes
        return {
            "device": self.call.device,
            "batch": self.call.batch,
            "inputs": [axis.inputs for axis in axes],
            "outputs": [axis.outputs for axis in axes],
            "auto": self.auto.mode,
            "inference": self.inference.mode,
            "modes": {mode: self._mode_data(mode) for mode in self.plans},
            "chain": chain if factored.mode == "factored" else None,
        }

    def _mode_data(self, mode: str) -> dict[str, Any]:
        known = self.plans[mode]
        cost = predict(known, self.call)
        return {
            "runs": known.mode,
            "reason": known.reason if known.mode != mode else None,
            "forward_ms": cost.forward * 1e3,
            "backward_ms": cost.backward * 1e3,
            "step_ms": cost.step * 1e3,
            "flops": known.flops,
            "peak_bytes": known.peak_bytes,
            "saved_bytes": known.saved_bytes,
        }


def _link_data(part: Plan, link: Link) -> dict[str, Any]:
    return {
        "cores": list(part.cores_of(link)),
        "kernel": list(link.kernel),
        "spreads": link.gather,
        "before": list(link.before),
        "after": list(link.after),
        "flops": link.flops,
    }


def bytes_text(count: int) -> str:
    """12345678 → "11.77 MiB"."""
    size = float(min(count, 10**300))  # what no float holds is not there to be read
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
