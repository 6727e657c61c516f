"""What a call of an adapted layer takes in memory, beside what the frozen layer takes itself.

Counted are elements that are alive at once: what an adapter holds all the time (its cores, their frozen copy and what
is folded from that), what survives the forward pass, and the tensors on the way, forward and backward. Not counted are
the layer's input, its output and their gradients, which belong to the model, and the workspace of kernels: of torch's,
and the halves in which the gradients of a small volume are made, a few times the input and the output.
Tests hold the numbers against measured allocations. A layer by itself is meant: where layers contract together what
they have alike, small weights of several are alive at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tnpeft.planning.call import Call
from tnpeft.planning.steps import Contraction
from tnpeft.schedule.chain import runs_of
from tnpeft.schedule.chain_legs import chain_layout, merge_steps

__all__ = ["FLOAT_BYTES", "Memory", "kept_results", "memory_of"]

# Cores and delta weights are fp32 unless the layer is fp64; activations as wide are assumed.
FLOAT_BYTES = 4
# `compose: dora` keeps so many tensors of the weight's size more for its backward pass, and makes so many on its way.
DORA_SAVED, DORA_PASSING = 3, 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one call at fp32.

    `held` is there all the time. `saved` is what survives the forward pass: W + ΔW of dense and hybrid layers (not of
    hybrid plans that are `remade`), the results of contractions that the backward pass reads again, and the clusters of
    factored and hybrid layers. `input` is the layer's input, which factored and hybrid layers save too; it is the
    caller's activation, a frozen convolution saves it as well, and it is in none of the other numbers. `forward` and
    `backward` are the peaks of the two passes.
    """

    held: int
    saved: int
    forward: int
    backward: int
    input: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def memory_of(plan: Contraction) -> Memory:
    """The memory of a plan's calls; those of factored and hybrid plans have the size that it was made for."""
    elements = _dense(plan) if plan.mode == "dense" else _factored(plan)
    return Memory(*(FLOAT_BYTES * number for number in elements))


def kept_results(part: Contraction) -> tuple[bool, ...]:
    """For each result but the delta weight whether the backward pass reads it: it makes large ones anew."""
    return tuple(2 * step.elements < part.network.layer.numel for step in part.steps[:-1])


def _dense(plan: Contraction) -> tuple[int, ...]:
    """The delta weight's own memory becomes that of W + ΔW."""
    numel = plan.network.layer.numel
    held = kept = forward = gradients = 0
    for part in plan.terms or (plan,):
        results = [step.elements for step in part.steps[:-1]]
        small = sum(itertools.compress(results, kept_results(part)))
        held += _held(part) + (sum(results) if part.copies else 0)
        kept += small
        forward += _making(part)
        gradients = max(gradients, sum(results) - small + sum(results) + _trained(part))
    # With the gradient of W + ΔW at hand: first W + ΔW is there as well, then the gradients on the way to the cores.
    backward = max(2 * numel, numel + gradients)
    saved = kept + numel
    if plan.network.compose is not None:
        saved += DORA_SAVED * numel
        forward += (DORA_SAVED + DORA_PASSING) * numel
        backward += (DORA_SAVED + DORA_PASSING) * numel
    return held, saved, forward, held + kept + backward, 0


def _making(part: Contraction) -> int:
    """The peak while one term's delta weight is made.

    Alive are all cores; every result so far, but for those that the backward pass makes anew, until their step has used
    them; and the delta weight itself. A frozen copy adds its cores, the same results made of it, and the differences
    between the two at the current step.
    """
    size = dict(enumerate(core.numel for core in part.network.cores))
    size.update((step.number, step.elements) for step in part.steps)
    dropped = {step.number for step, kept in zip(part.steps, kept_results(part), strict=False) if not kept}
    alive = _held(part)
    peak = alive + (part.network.layer.numel if not part.steps else 0)
    for step in part.steps:
        twice = part.copies and step is not part.steps[-1]
        alive += step.elements * (2 if twice else 1)
        peak = max(peak, alive + (sum(size[number] for number in (*step.operands, step.number)) if twice else 0))
        alive -= sum(size[number] for number in step.operands if number in dropped)
    return peak


def _factored(plan: Contraction) -> tuple[int, ...]:
    chain, hybrid = plan.chain or plan, plan.mode == "hybrid"
    call = chain.call
    assert call is not None
    parts = chain.terms or (chain,)
    numel = plan.network.layer.numel
    held = sum(_held(part) + (_made(part) if part.copies else 0) for part in parts)
    values, dual = sum(map(_values, parts)), sum(map(_dual, parts))
    changes = max(_trained(part) + _made(part) if part.copies else 0 for part in parts)
    gradients = max(_trained(part) + _values(part) for part in parts)
    saved = values + (numel if hybrid and not plan.remade else dual)
    passes = [_passes(part, call, hybrid) for part in parts]
    merging = max(map(_merging, parts)) if hybrid else 0
    applying = merging if hybrid else max(forward for forward, _ in passes)
    forward = held + values + dual + max(changes, applying)
    backward = held + saved + max(gradients, merging if plan.remade else 0, *(backward for _, backward in passes))
    inputs = call.batch * call.inputs * plan.network.layer.in_channels
    return held, saved, forward, backward, inputs


def _held(part: Contraction) -> int:
    """The cores and their frozen copies; a core that is the base weight takes no memory of its own."""
    own = [core for core in part.network.cores if core.origin != "weight"]
    return sum(core.numel * (2 if part.copies and not core.frozen else 1) for core in own)


def _trained(part: Contraction) -> int:
    return sum(core.numel for core in part.network.cores if not core.frozen)


def _made(part: Contraction) -> int:
    """The results of all steps."""
    return sum(step.elements for step in part.steps)


def _values(part: Contraction) -> int:
    """The clusters' values and what they are made by; a cluster of one core may be a copy in another order."""
    return sum(part.elements(link.kept) for link in part.links if not link.steps) + _made(part)


def _dual(part: Contraction) -> int:
    """The dual forms: twice as large as a cluster at both ends of the chain, four times between."""
    if not part.copies:
        return 0
    ends = (0, len(part.links) - 1)
    return sum(part.elements(link.kept) * (2 if place in ends else 4) for place, link in enumerate(part.links))


def _merging(part: Contraction) -> int:
    """From the clusters to the delta weight, at most: the last product may have to be copied to the weight's order."""
    weight = "".join(part.network.symbols[leg] for axis in part.network.weight for leg in axis)
    _, steps = merge_steps(chain_layout(part), part.copies, weight)
    return sum(step.elements for step in steps[:-1]) + part.network.layer.numel * 2


def _passes(part: Contraction, call: Call, hybrid: bool) -> tuple[int, int]:
    """The peaks of the chain, forward and backward: its inputs that are made anew are there to the end."""
    runs = runs_of(part, call, hybrid)
    # The input's gradient, and its sum with that of the base layer.
    kept, backward = 0, 0 if hybrid else 2 * runs.values[0].sizes.before
    for run in runs.values:
        if run is not runs.values[-1]:
            backward = max(backward, kept + run.alive)
        kept += run.taken
    gradients = max(*(run.taking for run in runs.clusters), *(run.alive for run in runs.inputs))
    return max((run.alive for run in runs.outputs), default=0), max(backward, kept + gradients)
