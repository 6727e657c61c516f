"""What a training step of one layer takes in each mode, in seconds: the model by which `auto` chooses.

Counted are multiplications, elements moved and operations started, at the prices of `device_model.py`. The base layer's
forward pass and its input's gradient cost the same in every mode; what differs is

* dense: the delta weight and its gradients, the sum with the weight, and the weight's gradient of one layer call;
* hybrid: the clusters, the delta weight from them, the sum; backward the chain of values, and in a Linear the sum
  again;
* factored: the clusters and the chain, with pairs where there is a frozen copy, forward and backward.

`benchmarks/modes.py` holds the predictions against timings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tnpeft.planning.call import Call
from tnpeft.planning.device_model import DeviceModel, device_model
from tnpeft.planning.steps import Step
from tnpeft.schedule.chain import Run, runs_of
from tnpeft.schedule.model import Plan

__all__ = ["Prediction", "predict"]

FOREVER = 1e300  # seconds; JSON has no infinity


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer call, and of its backward pass."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        return self.forward + self.backward


def predict(plan: Plan, call: Call) -> Prediction:
    """What a call and its backward pass take in the plan's mode; for ever, where a float holds no such number."""
    try:
        return _predicted(plan, call)
    except OverflowError:
        return Prediction(FOREVER, FOREVER)


def _predicted(plan: Plan, call: Call) -> Prediction:
    price = _Prices(device_model(call.device))
    forward = backward = price.base(plan, call)
    if plan.mode == "dense":
        more = price.dense(plan, call)
    else:
        chain = plan.chain or plan
        more = [price.clusters(part) for part in chain.terms or (chain,)]
        if plan.mode == "hybrid":
            merged = sum(map(price.completion, chain.terms or (chain,))) + price.summed(3 * plan.network.layer.numel)
            more += [(merged, merged if plan.remade else 0.0)]
        more += [price.chain(part, call, plan.mode == "factored") for part in chain.terms or (chain,)]
    forward += sum(one for one, _ in more)
    backward += sum(other for _, other in more)
    return Prediction(forward * 1e-9, backward * 1e-9)


class _Prices:
    """Times in ns; pairs are those of a forward and of a backward pass."""

    def __init__(self, prices: DeviceModel) -> None:
        self.prices = prices

    def arithmetic(self, multiplications: float, rows: float) -> float:
        """Of a product in a chain."""
        narrow = self.prices.narrow
        slow = 1 + (narrow / max(rows, 1)) if rows < narrow else 1.0
        return self.prices.multiply * multiplications * slow

    def moved(self, elements: float) -> float:
        """Of elements of an input or output."""
        return self.prices.start + self.prices.move * elements

    def summed(self, elements: float) -> float:
        """Of elements of a weight."""
        return self.prices.start + self.prices.move_weight * elements

    def copied(self, elements: float) -> float:
        """Of shifted copies, written and read."""
        return 2 * self.prices.move * elements * self.prices.distance(elements)

    def base(self, plan: Plan, call: Call) -> float:
        return self.prices.start + self.prices.call * _multiplications(plan, call) + self._weight(plan)

    def dense(self, plan: Plan, call: Call) -> list[tuple[float, float]]:
        numel = plan.network.layer.numel
        found = []
        for part in plan.terms or (plan,):
            pairs = 3 if part.copies else 1
            starts = self.prices.shared * len(part.network.cores)
            forward = sum(pairs * self._step(step) for step in part.steps) + starts
            backward = 2 * sum(self._step(step) for step in part.steps) + starts / 2
            found.append((forward, backward + self.summed(numel)))
        convolution = bool(plan.network.layer.kernel_size)
        price = self.prices.weight_gradient if convolution else self.prices.linear_gradient
        gradient = self.prices.start + price * _multiplications(plan, call)
        found.append((self.summed(3 * numel), gradient + 2 * self._weight(plan)))
        return found

    def clusters(self, plan: Plan) -> tuple[float, float]:
        """Contracted together with those of layers alike."""
        pairs = 3 if plan.copies else 1
        own = sum(self._step(step) for step in plan.steps)
        elements = sum(plan.elements(link.kept) for link in plan.links)
        starts = self.prices.shared * len(plan.network.cores)
        moved = self.prices.move_weight * elements
        return pairs * own + starts + 2 * pairs * moved, 2 * own + starts / 2 + moved

    def completion(self, plan: Plan) -> float:
        """From the clusters to the delta weight; the last product writes it, over the smallest bond of the chain."""
        numel = plan.network.layer.numel
        bond = min(map(plan.elements, _cuts(plan))) * (2 if plan.copies else 1)
        product = self.prices.start + self.prices.contract * numel * bond
        return (len(plan.links) - 1) * self.prices.start + product + self.summed(numel)

    def chain(self, plan: Plan, call: Call, factored: bool) -> tuple[float, float]:
        """The products and shifted copies of a chain."""
        runs = runs_of(plan, call, not factored)
        forward = self.prices.functions + sum(map(self._run, runs.outputs))
        backward = self.prices.functions + sum(map(self._run, (*runs.values[:-1], *runs.clusters, *runs.inputs)))
        if factored:
            forward += self.moved(2 * call.batch * call.outputs * plan.network.layer.out_channels)
            backward += self.moved(2 * call.batch * call.inputs * plan.network.layer.in_channels)
        return forward, backward

    def _weight(self, plan: Plan) -> float:
        """Of reading the weight in a layer call."""
        price = self.prices.weight if plan.network.layer.kernel_size else self.prices.move_weight
        return price * plan.network.layer.numel

    def _step(self, step: Step) -> float:
        return self.prices.shared + self.prices.contract * step.flops / 2 + self.prices.move_weight * step.elements

    def _run(self, run: Run) -> float:
        sizes, pairs = run.sizes, run.pair_in * run.pair_out
        arithmetic = self.arithmetic(sizes.link.flops / 2 * pairs, sizes.rows * min(pairs, 2))
        traffic = self.prices.move * (sizes.before + sizes.after) * min(pairs, 2)
        longer = max(arithmetic, traffic) if self.prices.overlaps else arithmetic + traffic
        time = self.prices.start + self.prices.views + longer
        if sizes.moving:
            time += len(sizes.moving) * self.prices.shift + self.copied(run.copied)
        return time


def _cuts(plan: Plan) -> Iterator[tuple[str, ...]]:
    """For each link but the last, the legs between the clusters up to it and those after it."""
    for place in range(1, len(plan.links)):
        first, second = (
            {leg for link in part for leg in link.kept} for part in (plan.links[:place], plan.links[place:])
        )
        yield tuple(first & second - set(plan.network.open_legs))


def _multiplications(plan: Plan, call: Call) -> float:
    layer = plan.network.layer
    voxels = call.inputs if call.transposed else call.outputs
    return call.batch * voxels * layer.numel
