"""What a plan says: the contraction, its operations and its memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from tnpeft.planning.last_step_cost import LARGEST
from tnpeft.planning.steps import Contraction, Link
from tnpeft.schedule.chain import link_sizes
from tnpeft.schedule.memory import Memory, memory_of

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False)
class Plan(Contraction):
    """How a network is contracted, and in which execution mode: to its delta weight, or with the layer's input.

    `dense` has the steps to the delta weight. `factored` has `links`, whose clusters `steps` contract; its path counts
    the layer's input as one tensor more, after the cores. `hybrid` has steps to the delta weight that pass through the
    clusters, and in `chain` the factored plan of its backward pass. With a `side`, `input` or `output`, a factored plan
    is that of a smaller network, which acts there. Factored and hybrid plans are made for one `call`. `reason` says why
    the plan has not the mode that was asked for.

    Plans are equal when one program runs them both: same signature, mode and paths, whatever the names. `path` is in
    opt_einsum's linear format. The plan of one core has no steps. That of a sum of several networks has none either:
    `terms` holds the plans of its terms.
    """

    terms: tuple[Plan, ...] = field(default=(), repr=False)
    chain: Plan | None = field(default=None, repr=False)
    side: str | None = None

    @cached_property
    def key(self) -> Hashable:
        gathers, terms = tuple(link.gather for link in self.links), tuple(term.key for term in self.terms)
        return (self.network.signature, self.mode, self.path, self.call, gathers, terms, self.chain and self.chain.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @cached_property
    def cluster_key(self) -> Hashable:
        """What the clusters of a factored plan depend on; calls of other sizes may share them."""
        own = tuple((link.steps, link.cluster, link.kept, link.gather, link.before, link.after) for link in self.links)
        return (self.network.signature, own, tuple(term.cluster_key for term in self.terms))

    @property
    def flops(self) -> int:
        """Multiplications and additions of a forward pass without the base layer's own.

        Dense and hybrid: those of T(cores). Factored: of the clusters and of the links, for the plan's call. The
        difference from a frozen copy takes about twice as many.
        """
        if self.terms:
            return sum(term.flops for term in self.terms) + len(self.terms) * self._updated
        return sum(step.flops for step in self.steps) + sum(link.flops for link in self.links)

    @property
    def _updated(self) -> int:
        """Elements of what a term is added to: the layer's output, or its weight."""
        layer = self.network.layer
        if self.mode != "factored" or self.call is None:
            return layer.numel
        return self.call.batch * self.call.outputs * layer.out_channels

    @property
    def largest_intermediate(self) -> int:
        """Elements of the largest tensor that a step or link makes, the delta weight included.

        A link makes its result and, for the kernel axes that it has, the copies of its input or of its product.
        """
        if self.terms:
            return max(term.largest_intermediate for term in self.terms)
        made = [step.elements for step in self.steps]
        for sizes in link_sizes(self, self.call) if self.call is not None else ():
            made.append(max(sizes.copied if sizes.link.kernel else 0, sizes.after))
        return max(made, default=self.network.cores[0].numel)

    @cached_property
    def memory(self) -> Memory:
        """The bytes at fp32 that a call takes, in parts."""
        return memory_of(self)

    @property
    def saved_bytes(self) -> int:
        """Bytes at fp32 that a call saves for its backward pass, without the layer's input.

        Dense: W + ΔW, and the results of steps that are small beside it. Factored, and hybrid if
        `remade`: the clusters, the forms that carry differences too, and what they are made by. Other hybrid plans:
        W + ΔW in place of those forms.
        """
        return self.memory.saved

    @property
    def peak_bytes(self) -> int:
        """Bytes at fp32 that are alive at once, at most, in a call and its backward pass.

        They include the cores, their frozen copies and what the call saves, but not the layer's input and output, nor
        their gradients. For a factored or hybrid plan they are those of the call that it was made for. On large inputs
        most are copies of the input for each kernel entry, and pairs of values and differences.
        """
        return self.memory.peak

    def __str__(self) -> str:
        lines = [f"dense: {self.reason}"] if self.terms and self.reason else []
        lines += self.map_lines() if self.terms else ()
        for label, part in self._labelled():
            maps = part.map_lines() if part is self else ()
            lines += [label + part._headline(), *maps, *part._step_lines(), *part.link_lines()]
        if self.chain is not None:
            for label, part in self.chain._labelled():
                lines += [f"backward, {label}{part._headline()}", *part.link_lines()]
        return "\n".join(lines)

    def _labelled(self) -> Iterator[tuple[str, Plan]]:
        """The plans of the terms, each with what leads to it in a text."""
        if not self.terms:
            yield "", self
        for number, term in enumerate(self.terms):
            yield f"term {number + 1}: ", term

    def _headline(self) -> str:
        network, call = self.network, self.call
        about = f"on the layer's {self.side}" if self.side else self.reason
        mode = f"{self.mode} ({about})" if about else self.mode
        facts = [mode, _number(len(self.links), "link") if self.links else _number(len(self.steps), "step")]
        facts += [str(call)] if self.links and call is not None else []
        facts += [f"{_count(self.flops)}FLOP", f"largest {_count(self.largest_intermediate)}elements"]
        facts += [f"peak {_count(self.peak_bytes)}B"] if self.mode == "dense" else []
        return f"{network.spec.name} on {network.layer}: {', '.join(facts)}"

    def _step_lines(self) -> Iterator[str]:
        names = [core.name for core in self.network.cores]
        names += [f"#{number + 1}" for number in range(len(self.steps))]
        for step in self.steps:
            left, right = (names[number] for number in step.operands)
            yield f"  {names[step.number]} = {left} * {right}: {step}  {_count(step.flops)}FLOP"

    @property
    def maps(self) -> int:
        """The number of maps that a pass evaluates before it contracts: those of derived cores, in every mode."""
        return sum(len(core.maps) for core in self.network.evaluated)

    def map_lines(self) -> Iterator[str]:
        """Each derived core: what it is made of, and the elements that its maps make."""
        for core in self.network.evaluated:
            size = f": {_number(len(core.maps), 'map')}, {_count(core.mapped)}elements" if core.maps else ""
            yield f"  {core}{size}"

    def link_lines(self) -> Iterator[str]:
        """Each link: its cores, how it treats its kernel axes, and the channels before and after."""
        for number, link in enumerate(self.links):
            axes = f", {'spreads' if link.gather else 'collects'} {' '.join(link.kernel)}" if link.kernel else ""
            ends = (f"({' '.join(legs)}) {self.elements(legs)}" for legs in (link.before, link.after))
            cores = " * ".join(self.cores_of(link))
            yield f"  link {number + 1}: {cores}{axes}: {' -> '.join(ends)} channels  {_count(link.flops)}FLOP"

    def cores_of(self, link: Link) -> tuple[str, ...]:
        """The names of the cores in a link's cluster, in the network's order."""
        return tuple(self.network.cores[core].name for core in self.numbers_of(link))


def _number(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _count(number: int) -> str:
    """A number with a decimal prefix, e.g. `57.9 M`."""
    if number < 1000:
        return f"{number} "
    power = min(int(math.log10(number)) // 3, 6)
    if number > LARGEST:
        return f"1e+{int(math.log10(number)) - 3 * power} {' kMGTPE'[power]}"
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}"
