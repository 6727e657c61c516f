"""The price of a placement of nodes on a grid: how hard it is to read."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.draw.diagram import Diagram, mirrors, sides

__all__ = ["ASPECT", "CLEARANCE", "Floats", "Grid", "Ints", "Objective", "bulge", "grid_for"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ASPECT = 1.2  # a column is that much wider than a row is high
CLEARANCE = 0.36  # of a row: how near a line may pass to the centre of a node that is not its own

# The price of what makes a picture hard to read, against the length of one bond from row to row.
_THROUGH, _CROSSING, _SLANTED, _LONG = 60.0, 24.0, 0.25, 0.08
_SIDE, _SWAPPED, _MIDDLE, _INNER, _LOW, _ORDER, _ASYMMETRY, _AREA = 4.0, 6.0, 2.5, 0.6, 0.7, 0.4, 6.0, 0.15
_BALANCE = 2.0


@dataclass(frozen=True)
class Grid:
    """Points numbered row by row; coordinates count columns and rows from the middle."""

    columns: int
    rows: int

    @cached_property
    def x(self) -> Floats:
        return np.tile(np.arange(self.columns) - (self.columns - 1) / 2, self.rows)

    @cached_property
    def y(self) -> Floats:
        return np.repeat((self.rows - 1) / 2 - np.arange(self.rows), self.columns)

    @cached_property
    def mirrored(self) -> Ints:
        """Each point's reflection, left and right swapped."""
        numbers = np.arange(self.columns * self.rows).reshape(self.rows, self.columns)
        return numbers[:, ::-1].reshape(-1)

    @cached_property
    def line(self) -> Floats:
        """The price of a line between two points for its length and its slant; flattened."""
        across, down = np.abs(self.x[None] - self.x[:, None]) * ASPECT, np.abs(self.y[None] - self.y[:, None])
        length = np.hypot(across, down)
        return (length + _LONG * length**2 + _SLANTED * ((across > 0) & (down > 0))).reshape(-1)

    @cached_property
    def turn(self) -> NDArray[np.int8]:
        """turn[p, q, s]: on which side of the line from p to q the point s is: -1, 0 or 1; flattened."""
        x, y = self.x, self.y
        dx, dy = x[None] - x[:, None], y[None] - y[:, None]
        cross = dx[:, :, None] * dy[:, None, :] - dy[:, :, None] * dx[:, None, :]
        return np.sign(cross).astype(np.int8).reshape(-1)

    @cached_property
    def _apart(self) -> NDArray[np.float32]:
        """_apart[p, q, s]: how far s is from the line from p to q, in rows; far where it is an end."""
        x, y = (self.x * ASPECT).astype(np.float32), self.y.astype(np.float32)
        dx, dy = (x[None] - x[:, None])[:, :, None], (y[None] - y[:, None])[:, :, None]
        to_x, to_y = (x[None] - x[:, None])[:, None, :], (y[None] - y[:, None])[:, None, :]
        length = np.maximum(dx**2 + dy**2, 1e-12)
        along = np.clip((dx * to_x + dy * to_y) / length, 0, 1)
        distance: NDArray[np.float32] = np.hypot(to_x - along * dx, to_y - along * dy)
        points = np.arange(len(x))
        distance[points, :, points] = np.inf
        distance[:, points, points] = np.inf
        return distance

    @lru_cache(maxsize=8)  # noqa: B019 - grids are few and stay
    def near(self, clearance: float) -> NDArray[np.bool_]:
        """near[p, q, s]: whether the line from p to q passes too near to s, which is neither; flattened."""
        return (self._apart < clearance).reshape(-1)


@lru_cache(maxsize=8)
def _grid(columns: int, rows: int) -> Grid:
    return Grid(columns, rows)


def grid_for(nodes: int, stacked: int) -> Grid:
    """A grid with an odd number of columns, so that it has a middle column, with room for `stacked` nodes."""
    for columns, rows, most in ((5, 3, 4), (7, 5, 12), (9, 6, 20)):
        if nodes <= most:
            return _grid(columns, max(rows, stacked))
    side = math.ceil(math.sqrt(1.6 * nodes))
    return _grid(2 * (side // 2) + 5, side + 1)


class Objective:
    """The price of placements, many at a time: `states[b, n]` is the point of node n in placement b."""

    def __init__(self, diagram: Diagram, grid: Grid) -> None:
        self.grid = grid
        self.nodes = len(diagram.nodes)
        bonds = Counter((min(line.ends), max(line.ends)) for line in diagram.lines)
        pairs = sorted(bonds, key=lambda pair: (bonds[pair], pair))
        self.ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        # Parallel bonds bulge: the lines in order of how many they stand for, and the clearance of each such group.
        self.groups = []
        for count, group in itertools.groupby(range(len(pairs)), key=lambda number: bonds[pairs[number]]):
            numbers = list(group)
            self.groups.append((slice(numbers[0], numbers[-1] + 1), CLEARANCE + bulge(count - 1, count)))
        self.reflections = mirrors(diagram)
        side = sides(diagram)
        self.left, self.middle, self.right = (np.array([s == at for s in side]) for at in (-1, 0, 1))
        self.inner = np.array(
            [s is None and node.core is not None for s, node in zip(side, diagram.nodes, strict=True)]
        )
        self.low = np.array(["kernel" in node.own for node in diagram.nodes])
        self.falling = [pair for role in ("in", "out") for pair in _in_order(diagram, role)]
        self.rightward = _in_order(diagram, "kernel")
        graph = diagram.graph
        dots = [number for number, node in enumerate(diagram.nodes) if node.core is None]
        self.between = [(dot, *sorted(graph[dot])) for dot in dots if len(graph[dot]) == 2]

    @property
    def work(self) -> int:
        return max(1, len(self.ends) * (self.nodes + len(self.ends)))

    def __call__(self, states: Ints) -> Floats:
        x, y = self.grid.x[states], self.grid.y[states]
        price = self._lines(states) + self._roles(x, y)
        for reflection in self.reflections[:1]:
            best = self._asymmetry(x, y, reflection)
            for other in self.reflections[1:]:
                best = np.minimum(best, self._asymmetry(x, y, other))
            price += best
        return np.asarray(np.round(price, 6))  # equal placements stay equal on every machine

    def _lines(self, states: Ints) -> Any:
        if not len(self.ends):
            return np.zeros(len(states))
        one, other = self.ends.T
        count, at = len(self.grid.x), np.ascontiguousarray(states.T)  # placements last: four times as fast
        triples = (at[one] * count + at[other])[None] * count + at[:, None]  # (nodes, lines, placements)
        through = self._through(triples)
        turns = self.grid.turn.take(triples)
        apart = turns[one] * turns[other] < 0  # apart[f, e]: whether line e has the ends of line f on both sides
        crossings = (apart & apart.transpose(1, 0, 2)).sum((0, 1)) / 2
        lengths = self.grid.line.take(at[one] * count + at[other]).sum(0)
        return _THROUGH * through + _CROSSING * crossings + lengths

    def _through(self, triples: Ints) -> Any:
        return sum(self.grid.near(gap).take(triples[:, lines]).sum((0, 1)) for lines, gap in self.groups)

    def through(self, points: Ints) -> int:
        """How many lines of one placement pass through nodes."""
        one, other = self.ends.T
        count = len(self.grid.x)
        triples = (points[one] * count + points[other])[None, :, None] * count + points[:, None, None]
        return int(np.sum(self._through(triples)))

    def _roles(self, x: Floats, y: Floats) -> Any:
        first, last = x.min(1, keepdims=True), x.max(1, keepdims=True)
        lowest, highest = y.min(1, keepdims=True), y.max(1, keepdims=True)
        price = _SIDE * ((x - first) * self.left + (last - x) * self.right).sum(1)
        if self.left.any() and self.right.any():
            overlap = x[:, self.left].max(1) - x[:, self.right].min(1)
            price += _SWAPPED * np.maximum(overlap + 1, 0)
        price += _MIDDLE * (np.abs(x - (first + last) / 2) * self.middle).sum(1)
        price += _INNER * (((x == first) | (x == last)) * self.inner).sum(1)
        price += _LOW * ((y - lowest) * self.low).sum(1)
        for above, below in self.falling:
            price += _ORDER * (y[:, above] < y[:, below])
        for one, next_one in self.rightward:
            price += _ORDER * (x[:, one] > x[:, next_one])
        for dot, one, other in self.between:
            price += _BALANCE * np.abs(y[:, dot] - (y[:, one] + y[:, other]) / 2)
        return price + _AREA * ((last - first + 1) * (highest - lowest + 1))[:, 0]

    @staticmethod
    def _asymmetry(x: Floats, y: Floats, reflection: Sequence[int]) -> Any:
        partner = list(reflection)
        axis = x.min(1, keepdims=True) + x.max(1, keepdims=True)
        return _ASYMMETRY * (np.abs(x + x[:, partner] - axis) + np.abs(y - y[:, partner])).sum(1) / 2


def _in_order(diagram: Diagram, role: str) -> list[tuple[int, int]]:
    """Pairs of nodes of which the first holds the earlier legs of a role."""
    owners = list(dict.fromkeys(stub.node for stub in diagram.stubs if stub.role == role))
    return list(itertools.pairwise(owners))


def bulge(number: int, count: int) -> float:
    """How far the middle of bond `number` of `count` parallel bonds is from the straight line, in rows."""
    return (number - (count - 1) / 2) * min(0.3, 1.2 / count)
