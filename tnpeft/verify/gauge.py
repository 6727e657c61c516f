"""Redundancy: directions in which the cores can move without moving the update.

Every network has some. Over a bond of size r between two trainable cores, an invertible r x r matrix can pass from one
to the other (gauge). Over an index that several cores share, a factor for each of its values can pass. Between
disconnected parts one factor can pass. Any redundancy beyond these is a parameter that costs and does nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.errors import TnpeftError
from tnpeft.network import BoundCore, Network, Spec
from tnpeft.network.derived import BoundReference
from tnpeft.spec.maps import registered_map
from tnpeft.verify.case import Case
from tnpeft.verify.exact import Exact
from tnpeft.verify.model_under_test import Subject, adapted_layers
from tnpeft.verify.oracle import term_weight

__all__ = ["Gauge", "gauge_of"]

MAX_PARAMETERS, MAX_ENTRIES = 700, 40_000
COLUMNS = 2_000  # random sums of the weight's entries: a rank shows in them as well, once they are enough
SUMS = 8  # in which each entry stands: in one alone, numbers that are single entries would meet
BATCH = 100  # columns whose gradients are taken at once
PRECISION = 1e-9  # of singular values, relative to the largest


@dataclass(frozen=True)
class Gauge:
    """The rank of d(T)/d(cores) at a random point on one layer, and what explains the surplus of parameters."""

    layer: str
    params: Mapping[str, float]
    parameters: int  # trained numbers
    entries: int  # of the weight
    rank: int
    gauge: int  # directions that bonds and shared indices leave free
    scalings: int  # directions that disconnected parts, or a core and others, exchange as a factor
    causes: tuple[str, ...] = ()  # numbers, legs and bonds that are not needed, oversized bonds among them

    @property
    def redundant(self) -> int:
        return self.parameters - self.rank - self.gauge - self.scalings

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "params": dict(self.params), "causes": list(self.causes), "redundant": self.redundant}

    def __str__(self) -> str:
        text = f"{self.rank} of {self.parameters} parameters move the update independently on {self.layer}"
        rest = {"gauge (bonds, shared indices)": self.gauge, "factors between cores": self.scalings}
        parts = [f"{number} are {what}" for what, number in (rest | {"redundant": self.redundant}).items() if number]
        return f"{text}; {', '.join(parts)}" if parts else text


def gauge_of(spec: Spec, candidates: Sequence[Case]) -> Gauge | None:
    """The redundancy on the case with the largest weight that fits the bounds; None if none does."""
    fitting: list[tuple[int, int, Case]] = []
    for number, case in enumerate(candidates):
        try:
            network = spec.bind(case.layer, **case.params)
        except TnpeftError:
            continue
        parameters, entries = _trained(network), network.layer.numel
        if 0 < parameters <= MAX_PARAMETERS and entries <= MAX_ENTRIES:
            fitting.append((min(entries - parameters, parameters), -number, case))
    for _, _, case in sorted(fitting, key=lambda item: item[:2], reverse=True):
        try:
            return _gauge(spec, case)
        except TnpeftError:
            continue
    return None


def _trained(network: Network) -> int:
    return sum(core.numel for core in network.cores if not core.frozen)


def _gauge(spec: Spec, case: Case) -> Gauge:
    subject = Subject(spec, case)
    model = subject.attached(dtype=torch.float64, moved=True)
    layer = next(iter(adapted_layers(model)))
    adapter = layer.adapter("default")
    sizes = {core.name: core.unfolded for core in adapter.network.cores}
    parts = _through_maps(adapter) if adapter.network.factors else {}
    with torch.no_grad():
        cores = {name: core.detach() for name, core in Exact(model).cores(layer).items()}
        names = [name for name, core in adapter.cores.items() if isinstance(core, nn.Parameter)]
        trained = {name: cores[name].reshape(sizes[name]) for name in names}
        parts = parts or {name: _derivative(adapter.network, cores, name) for name in trained}
        entries = adapter.network.layer.numel
        jacobian = torch.cat(list(parts.values()))  # (parameters, columns)
        rank = _rank(jacobian)
        bonds = _free(list(_bond_moves(adapter.network, trained)), jacobian)
        both = _free([*_bond_moves(adapter.network, trained), *_scalings(trained)], jacobian)
        causes = tuple(_causes(adapter.network, trained, parts))
    return Gauge(
        str(adapter.network.layer),
        dict(adapter.network.params),
        jacobian.shape[0],
        entries,
        rank,
        bonds,
        both - bonds,
        causes,
    )


def _derivative(network: Network, cores: Mapping[str, Tensor], name: str) -> Tensor:
    """d(T)/d(core), one row for each number in the core: T with the core replaced by every unit tensor.

    The columns are the weight's entries, or sums of them under random signs, `COLUMNS` in all.
    """
    bound = {core.name: core for core in network.cores}
    numel = bound[name].numel
    units = torch.eye(numel, dtype=torch.float64).reshape(numel, *bound[name].shape)
    total = torch.zeros(numel, network.layer.numel, dtype=torch.float64)
    for term in network.terms:
        if name not in term.cores:
            continue
        operands = [
            (units, ("", *bound[other].legs)) if other == name else (cores[other], bound[other].legs)
            for other in term.cores
        ]
        total += term.scale * term_weight(network, term, operands, [""]).reshape(numel, -1)
    return _sketch(total)


def _through_maps(adapter: Adapter) -> dict[str, Tensor]:
    """The same for networks whose cores are derived, or stand in several places: by gradients."""
    trained = {name: core for name, core in adapter.cores.items() if isinstance(core, nn.Parameter)}
    # A user's function may have a gradient that cannot be taken of many at once.
    alone = any(registered_map(each.name) for core in adapter.network.derived for each in core.maps)
    value = _sketch(adapter.network_weight().reshape(1, -1)).squeeze(0)
    size, batch = len(value), 1 if alone else BATCH
    units = torch.eye(size, dtype=value.dtype)
    rows: dict[str, list[Tensor]] = {name: [] for name in trained}
    for start in range(0, size, batch):
        chosen = units[start] if alone else units[start : start + batch]
        gradients = torch.autograd.grad(
            value, [*trained.values()], chosen, retain_graph=True, is_grads_batched=not alone, allow_unused=True
        )
        count = min(batch, size - start)
        for (name, core), gradient in zip(trained.items(), gradients, strict=True):
            rows[name].append(
                (value.new_zeros(count * core.numel()) if gradient is None else gradient).reshape(count, -1)
            )
    return {name: torch.cat(parts).T.contiguous() for name, parts in rows.items()}


def _sketch(matrix: Tensor) -> Tensor:
    """Every column with random signs in some of `COLUMNS` sums; the same sums for every matrix of this width."""
    width = matrix.shape[1]
    if width <= COLUMNS:
        return matrix
    generator = torch.Generator().manual_seed(width)
    sums = matrix.new_zeros(matrix.shape[0], COLUMNS)
    for _ in range(SUMS):
        signs = 2.0 * torch.randint(2, (width,), generator=generator, dtype=torch.float64) - 1
        places = torch.randint(COLUMNS, (width,), generator=generator)
        sums.index_add_(1, places, matrix * signs)
    return sums


def _rank(matrix: Tensor) -> int:
    if not matrix.numel():
        return 0
    values = torch.linalg.svdvals(matrix)
    return int((values > PRECISION * values[0]).sum()) if values[0] > 0 else 0


def _free(moves: Sequence[Tensor], jacobian: Tensor) -> int:
    """How many independent combinations of `moves` leave the update where it is."""
    if not moves:
        return 0
    stacked = torch.stack(list(moves))
    stacked = stacked / stacked.norm(dim=1, keepdim=True).clamp_min(1e-300)
    scale = float(jacobian.norm(dim=1).max()) or 1.0
    # Of those that span the moves, the combinations whose image is zero.
    basis = torch.linalg.svd(stacked, full_matrices=False)
    spanning = basis.Vh[(basis.S / basis.S[0]) > PRECISION]
    image = torch.linalg.svdvals(spanning @ jacobian / scale)
    return int(spanning.shape[0]) - int((image > PRECISION * 10).sum())


def _bond_moves(network: Network, trained: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Moves that span every bond's general linear group, and the factors along indices that more places share."""
    legs_of = {core.name: core.legs for core in network.cores}
    for legs in _parallel(network):
        size = math.prod(network.sizes[leg] for leg in legs)
        for sides in _sides(network, legs[0]):
            if not sides:
                continue
            if all(core in trained for core in sides) and any(sides.values()):
                pairs = itertools.product(range(size), repeat=2)
                yield from (_flat(trained, _moved(trained, legs_of, legs, sides, *pair)) for pair in pairs)
            else:  # one core and one value at a time: what they do together is seen from their image
                for core, value in itertools.product(sides, range(size)):
                    if core in trained:
                        yield _flat(trained, _moved(trained, legs_of, legs, {core: 1}, value, value))


def _parallel(network: Network) -> list[tuple[str, ...]]:
    """Legs grouped by the places where they stand: parallel bonds act as one."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for leg in network.sizes:
        groups.setdefault(tuple(_owners(network, leg)), []).append(leg)
    return [tuple(legs) for legs in groups.values()]


def _owners(network: Network, leg: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """For each term, and each product of a derived core, the cores that have the leg, and whether it is open there."""
    for cores, opened in _products(network):
        yield tuple(name for name, legs in cores if leg in legs), leg in opened


def _products(network: Network) -> Iterator[tuple[list[tuple[str, tuple[str, ...]]], tuple[str, ...]]]:
    """Cores with their legs, and the open legs. A core under other legs than its own is one that does not train."""
    stored = {core.name: core for core in network.cores}
    named = {core.name: (core.name, core.legs) for core in network.cores}
    named |= {factor.label: _place(factor.reference, stored) for factor in network.factors}
    for term in network.terms:
        yield [named[name] for name in term.cores], tuple(leg for axis in term.weight for leg in axis)
    for derived in network.derived:
        for summand in derived.summands:
            yield [_place(reference, stored) for reference in summand.references], derived.before


def _place(reference: BoundReference, stored: Mapping[str, BoundCore]) -> tuple[str, tuple[str, ...]]:
    core = stored.get(reference.core)
    itself = core is not None and core.legs == reference.legs
    return reference.core if itself else f"{reference.core}({' '.join(reference.legs)})", reference.legs


def _sides(network: Network, leg: str) -> Iterator[dict[str, int]]:
    """The cores that a leg ties together, over all terms; with signs if it is a bond that has two sides.

    A matrix passes from the cores of one sign to those of the other. Signs of zero: the leg is shared otherwise.
    """
    terms = [(owners, opened) for owners, opened in _owners(network, leg) if owners]
    tied: networkx.Graph[str] = networkx.Graph()
    for owners, _ in terms:
        networkx.add_path(tied, owners)
    for component in networkx.connected_components(tied):
        own = [(owners, opened) for owners, opened in terms if owners[0] in component]
        plain = all(len(owners) == 2 and not opened for owners, opened in own)
        part = tied.subgraph(component)
        if sum(len(owners) + opened for owners, opened in own) < 2:
            continue
        if plain and networkx.is_bipartite(part):
            yield {core: 1 if side else -1 for core, side in networkx.bipartite.color(part).items()}
        elif len(component) > 1:
            yield dict.fromkeys(sorted(component), 0)


def _moved(
    trained: Mapping[str, Tensor],
    legs_of: Mapping[str, tuple[str, ...]],
    legs: Sequence[str],
    sides: Mapping[str, int],
    row: int,
    column: int,
) -> dict[str, Tensor]:
    """The unit matrix (row, column) put on each side of a bond, with its sign."""
    return {
        core: _matrix(trained[core], legs_of[core], legs, *((row, column) if sign > 0 else (column, row)), float(sign))
        for core, sign in sides.items()
    }


def _matrix(core: Tensor, own: tuple[str, ...], legs: Sequence[str], row: int, column: int, sign: float) -> Tensor:
    """The core with its slice `row` of the joint bond put in place `column`, zero elsewhere."""
    places = [own.index(leg) for leg in legs]
    front = [*places, *(axis for axis in range(core.ndim) if axis not in places)]
    moved = core.permute(front)
    joint = moved.reshape(-1, *moved.shape[len(places) :])
    change = torch.zeros_like(joint)
    change[column] = sign * joint[row]
    return change.reshape(moved.shape).permute([front.index(axis) for axis in range(core.ndim)])


def _scalings(trained: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Each core larger by itself: together they span every exchange of factors."""
    for name, core in trained.items():
        yield _flat(trained, {name: core})


def _flat(trained: Mapping[str, Tensor], moves: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([moves.get(name, torch.zeros_like(core)).reshape(-1) for name, core in trained.items()])


def _causes(network: Network, trained: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> Iterator[str]:
    """What can be said of parameters that are not needed."""
    for core in network.cores:
        if core.name not in trained:
            continue
        sizes = core.unfolded
        part = parts[core.name].reshape(*sizes, -1)
        size = float(part.abs().max()) or 1.0
        idle = int((parts[core.name].abs().amax(1) <= PRECISION * size).sum())
        if idle:
            yield f"{idle} of the {core.numel} numbers in core '{core.name}' never matter"
        for axis, leg in enumerate(core.legs):
            first = part.narrow(axis, 0, 1)
            if sizes[axis] > 1 and bool(((part - first).abs() <= PRECISION * size).all()):
                yield f"only the sum of core '{core.name}' over its leg '{leg}' matters: size 1 would do"
            others = core.numel // sizes[axis]
            owners = [other.name for other in network.cores if leg in other.legs]
            bond = leg not in network.open_legs and len(owners) == 2 and all(owner in trained for owner in owners)
            if bond and sizes[axis] > others:
                size_text = f"size {sizes[axis]}, more than its other legs together ({others})"
                yield f"leg '{leg}' of core '{core.name}' has {size_text}"
