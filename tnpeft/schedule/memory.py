"""What a call of an adapted layer takes in memory, beside what the frozen layer takes itself.

Counted are elements that are alive at once: what an adapter holds all the time (its cores, their frozen copy and what
is folded from that), what survives the forward pass, and the tensors on the way, forward and backward. Not counted are
the layer's input, its output and their gradients, which belong to the model, and the workspace of kernels: of torch's,
and the halves in which the gradients of a small volume are made, a few times the input and the output.
Tests hold the numbers against measured allocations. A layer by itself is meant: where layers contract together what
they have alike, small weights of several are alive at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tnpeft.planning.call import Call
from tnpeft.planning.path import find_path
from tnpeft.planning.steps import Contraction, steps_of
from tnpeft.schedule.chain_legs import PAIRS
from tnpeft.schedule.chain_sizes import link_sizes

__all__ = ["FLOAT_BYTES", "Memory", "memory_of"]

# Cores and delta weights are fp32 unless the layer is fp64; activations as wide are assumed.
FLOAT_BYTES = 4
# `compose: dora` keeps so many tensors of the weight's size more for its backward pass, and makes so many on its way.
DORA_SAVED, DORA_PASSING = 3, 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one call at fp32.

    `held` is there all the time. `saved` is what survives the forward pass: W + ΔW of dense and hybrid layers, the
    results of contractions that the backward pass reads again, the clusters of factored ones. `input` is the layer's
    input, which factored and hybrid layers save too; it is the caller's activation, a frozen convolution saves it as
    well, and it is in none of the other numbers. `forward` and `backward` are the peaks of the two passes.
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
    found = _dense(plan) if plan.mode == "dense" else _factored(plan)
    return Memory(*(FLOAT_BYTES * elements for elements in found))


class _Elements(NamedTuple):
    held: int
    saved: int
    forward: int
    backward: int
    input: int


def _dense(plan: Contraction) -> _Elements:
    """The delta weight's own memory becomes that of W + ΔW."""
    parts = plan.terms or (plan,)
    numel = plan.network.layer.numel
    held = sum(_held(part) + sum(_folded(part)) for part in parts)
    kept = sum(sum(_kept(part)) for part in parts)
    forward = sum(_making(part) for part in parts)
    # With the gradient of W + ΔW at hand: first W + ΔW is there as well, then the gradients on the way to the cores.
    gradients = [sum(_remade(part)) + sum(_results(part)) + _trained(part) for part in parts]
    backward = max(2 * numel, numel + max(gradients))
    saved = kept + numel
    if plan.network.compose is not None:
        saved += DORA_SAVED * numel
        forward += (DORA_SAVED + DORA_PASSING) * numel
        backward += (DORA_SAVED + DORA_PASSING) * numel
    return _Elements(held, saved, forward, held + kept + backward, 0)


def _making(part: Contraction) -> int:
    """The peak while one term's delta weight is made.

    Alive are all cores; every result so far, but for those at least half as large as the delta weight, which are made
    anew by the backward pass, and are alive until their step has used them; and the delta weight itself. A frozen copy
    adds its cores, the same results made of it, and the differences between the two at the current step.
    """
    cores = part.network.cores
    size = {number: core.numel for number, core in enumerate(cores)}
    size.update((step.number, step.elements) for step in part.steps)
    copies = _copies(part)
    held = _held(part)
    peak = held + (part.network.layer.numel if not part.steps else 0)
    for step in part.steps:
        last = step is part.steps[-1]
        held += step.elements * (2 if copies and not last else 1)
        passing = sum(size[number] for number in (*step.operands, step.number)) if copies and not last else 0
        peak = max(peak, held + passing)
        held -= sum(size[n] for n in step.operands if n >= len(cores) and 2 * size[n] >= part.network.layer.numel)
    return peak


def _factored(plan: Contraction) -> _Elements:
    chain, hybrid = plan.chain or plan, plan.mode == "hybrid"
    assert chain.call is not None
    parts = chain.terms or (chain,)
    numel = plan.network.layer.numel
    held = sum(_held(part) + (sum(step.elements for step in part.steps) if _copies(part) else 0) for part in parts)
    values, dual = sum(map(_values, parts)), sum(map(_dual, parts))
    changes = max(_trained(part) + sum(step.elements for step in part.steps) if _copies(part) else 0 for part in parts)
    gradients = max(_trained(part) + _values(part) for part in parts)
    passes = [_passes(part, chain.call, hybrid) for part in parts]
    saved = values + (numel if hybrid else dual)
    contracting = values + dual + changes
    applying = values + dual + (max(map(_completing, parts)) if hybrid else max(forward for forward, _ in passes))
    backward = saved + max(gradients, *(backward for _, backward in passes))
    call = chain.call
    inputs = call.batch * call.inputs * plan.network.layer.in_channels
    return _Elements(held, saved, held + max(contracting, applying), held + backward, inputs)


def _copies(part: Contraction) -> bool:
    return part.network.start == "frozen_copy"


def _held(part: Contraction) -> int:
    """The cores and their frozen copies; a core that is the base weight takes no memory of its own."""
    own = [core for core in part.network.cores if core.origin != "weight"]
    return sum(core.numel * (2 if _copies(part) and not core.frozen else 1) for core in own)


def _trained(part: Contraction) -> int:
    return sum(core.numel for core in part.network.cores if not core.frozen)


def _results(part: Contraction) -> Iterator[int]:
    """Of a dense plan: every result but the delta weight."""
    return (step.elements for step in part.steps[:-1])


def _folded(part: Contraction) -> Iterator[int]:
    """Of a dense plan: what is made of the frozen copy once."""
    return _results(part) if _copies(part) else iter(())


def _kept(part: Contraction) -> Iterator[int]:
    return (elements for elements in _results(part) if 2 * elements < part.network.layer.numel)


def _remade(part: Contraction) -> Iterator[int]:
    return (elements for elements in _results(part) if 2 * elements >= part.network.layer.numel)


def _values(part: Contraction) -> int:
    """The clusters' values and what they are made by; a cluster of one core may be a copy in another order."""
    alone = sum(part.elements(link.kept) for link in part.links if not link.steps)
    return alone + sum(step.elements for step in part.steps)


def _dual(part: Contraction) -> int:
    """The dual forms: twice as large as a cluster at both ends of the chain, four times between."""
    if not _copies(part):
        return 0
    ends = (0, len(part.links) - 1)
    return sum(part.elements(link.kept) * (2 if place in ends else 4) for place, link in enumerate(part.links))


def _completing(part: Contraction) -> int:
    """From the clusters to the delta weight, at most: the last product may have to be copied to the weight's order."""
    network, letters = part.network, part.network.symbols
    sizes = {letters[leg]: network.sizes[leg] for leg in letters}
    # With a frozen copy neighbours are joined by one leg more, of two entries.
    pairs = ["", *(chr(PAIRS + place) for place in range(1, len(part.links))), ""] if _copies(part) else []
    sizes |= dict.fromkeys(filter(None, pairs), 2)
    tensors = []
    for place, link in enumerate(part.links):
        joined = (pair for pair in pairs[place : place + 2] if pair)
        tensors.append((place, (*(letters[leg] for leg in link.kept), *joined)))
    output = "".join(letters[leg] for axis in network.weight for leg in axis)
    path = find_path(tuple("".join(legs) for _, legs in tensors), output, tuple(sizes.items()))
    made = [step.elements for step in steps_of(tensors, output, path, sizes)]
    return sum(made[:-1]) + part.network.layer.numel * 2


class _Stop(NamedTuple):
    """Elements at one link, of values alone: before it, spread before the product, the product, and after it.

    `spread` is zero where the product takes the input as it is, `collected` where it is the next input as it is.
    `kernels` are the entries of the axes that move, in order; `padded`: zeros are added around the last of them.
    """

    before: int
    spread: int
    product: int
    collected: int
    kernels: tuple[int, ...]
    padded: bool

    @property
    def spreading(self) -> int:
        """While copies are stacked, axis by axis: beside them the last axis's input, and that with zeros around it."""
        copies = self.spread or self.product
        return copies + copies // self.kernels[-1] * (self.padded + (len(self.kernels) > 1)) if self.kernels else 0

    @property
    def collecting(self) -> int:
        """While products are added up, axis by axis: each sum beside the one before and the first."""
        stages = [self.spread or self.product]
        for entries in reversed(self.kernels):
            stages.append(stages[-1] // entries)
        return stages[0] + sum(stages[1:3])


def _stops(part: Contraction, call: Call) -> Iterator[_Stop]:
    for sizes in link_sizes(part, call):
        moving = [call.axes[axis] for axis in sizes.link.axes if not call.axes[axis].plain]
        kernels, padded = tuple(axis.kernel for axis in moving), bool(moving) and moving[-1].stride == 1
        if sizes.link.gather:
            yield _Stop(sizes.before, sizes.copied if kernels else 0, sizes.after, 0, kernels, padded)
        else:
            yield _Stop(sizes.before, 0, sizes.copied, sizes.after if kernels else 0, kernels, padded)


def _passes(part: Contraction, call: Call, hybrid: bool) -> tuple[int, int]:
    """The peaks of the chain, forward and backward; with a frozen copy a factored chain carries pairs."""
    stops = [*_stops(part, call)]
    differs = _copies(part) and not hybrid
    remade = [stop.spread or (stop.before if place else 0) for place, stop in enumerate(stops)]
    # The input's gradient, and its sum with that of the base layer.
    forward, backward = 0, 0 if hybrid else 2 * stops[0].before
    for place, stop in enumerate(stops):
        first, last = place == 0, place == len(stops) - 1
        wide_in, wide_out = (2 if differs and not first else 1), (2 if differs and not last else 1)
        arrived = 0 if first else wide_in * stop.before
        spreading = wide_in * stop.spreading if stop.spread else 0
        made = wide_out * (stop.collecting if stop.collected else stop.product)
        forward = max(forward, arrived + spreading, arrived + wide_in * stop.spread + made)
        if not last:
            value = max(stop.spreading if stop.spread else 0, stop.collecting if stop.collected else stop.product)
            backward = max(backward, sum(remade[: place + 1]) + value)
        arrived = 0 if last else wide_out * (stop.collected or stop.product)
        received = wide_out * stop.spreading if stop.collected else 0
        passed = 0 if hybrid and first else wide_in * (stop.collecting if stop.spread else stop.before)
        kept = wide_out * stop.product if stop.collected else 0
        backward = max(backward, sum(remade) + arrived + max(received, kept + passed))
    return forward, backward
