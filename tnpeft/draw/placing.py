"""Where the nodes of a diagram go: a search over the points of a grid."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.draw.diagram import Diagram, mirrors, sides

__all__ = ["ASPECT", "place"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ASPECT = 1.2  # a column is that much wider than a row is high
_CLEARANCE = 0.36  # of a row: how near a line may pass to the centre of a node that is not its own
_STARTS, _KICKS = 5, 8
_WORK = 120_000_000  # comparisons of lines and nodes in one search, about a second

# The price of what makes a picture hard to read, against the length of one bond from row to row.
_THROUGH, _CROSSING, _SLANTED = 60.0, 7.0, 0.25
_SIDE, _SWAPPED, _MIDDLE, _INNER, _LOW, _ORDER, _ASYMMETRY, _AREA = 4.0, 6.0, 2.5, 0.6, 0.7, 0.4, 3.0, 0.15
_BALANCE = 2.5


@dataclass(frozen=True)
class _Grid:
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
    def turn(self) -> NDArray[np.int8]:
        """turn[p, q, s]: on which side of the line from p to q the point s is: -1, 0 or 1; flattened."""
        x, y = self.x, self.y
        dx, dy = x[None] - x[:, None], y[None] - y[:, None]
        cross = dx[:, :, None] * dy[:, None, :] - dy[:, :, None] * dx[:, None, :]
        return np.sign(cross).astype(np.int8).reshape(-1)

    @cached_property
    def near(self) -> NDArray[np.bool_]:
        """near[p, q, s]: whether the line from p to q passes too near to s, which is neither; flattened."""
        x, y = self.x * ASPECT, self.y
        dx, dy = (x[None] - x[:, None])[:, :, None], (y[None] - y[:, None])[:, :, None]
        to_x, to_y = (x[None] - x[:, None])[:, None, :], (y[None] - y[:, None])[:, None, :]
        length = np.maximum(dx**2 + dy**2, 1e-12)
        along = np.clip((dx * to_x + dy * to_y) / length, 0, 1)
        distance = np.hypot(to_x - along * dx, to_y - along * dy)
        close = (distance < _CLEARANCE).reshape(len(x), len(x), len(x))
        points = np.arange(len(x))
        close[points, :, points] = False
        close[:, points, points] = False
        return close.reshape(-1)


@lru_cache(maxsize=8)
def _grid(columns: int, rows: int) -> _Grid:
    return _Grid(columns, rows)


def _grid_for(nodes: int) -> _Grid:
    """Odd numbers of columns, so that there is a middle."""
    for columns, rows, most in ((5, 3, 4), (7, 5, 12), (9, 6, 20)):
        if nodes <= most:
            return _grid(columns, rows)
    side = math.ceil(math.sqrt(1.6 * nodes))
    return _grid(2 * (side // 2) + 5, side + 1)


class _Objective:
    """The price of placements, many at a time: `states[b, n]` is the point of node n in placement b."""

    def __init__(self, diagram: Diagram, grid: _Grid) -> None:
        self.grid = grid
        self.nodes = len(diagram.nodes)
        pairs = sorted({(min(line.ends), max(line.ends)) for line in diagram.lines})
        self.ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self.reflections = mirrors(diagram)
        side = sides(diagram)
        self.left, self.middle, self.right = (np.array([s == at for s in side]) for at in (-1, 0, 1))
        self.inner = np.array([s is None and node.core is not None for s, node in zip(side, diagram.nodes, strict=True)])
        self.low = np.array(["kernel" in node.own for node in diagram.nodes])
        self.falling = _falling(diagram)
        graph = diagram.graph
        dots = [number for number, node in enumerate(diagram.nodes) if node.core is None]
        self.around = [(dot, sorted(graph[dot])) for dot in dots if graph[dot]]

    @property
    def work(self) -> int:
        return max(1, len(self.ends) * (self.nodes + len(self.ends)))

    def __call__(self, states: Ints) -> Floats:
        x, y = self.grid.x[states], self.grid.y[states]
        price = self._lines(states, x, y) + self._roles(x, y)
        for reflection in self.reflections[:1]:
            best = self._asymmetry(x, y, reflection)
            for other in self.reflections[1:]:
                best = np.minimum(best, self._asymmetry(x, y, other))
            price += best
        return np.round(price, 6)  # equal placements stay equal on every machine

    def _lines(self, states: Ints, x: Floats, y: Floats) -> Any:
        if not len(self.ends):
            return np.zeros(len(states))
        one, other = self.ends.T
        points = len(self.grid.x)
        triples = (states[:, one] * points + states[:, other])[:, :, None] * points + states[:, None, :]
        through = self.grid.near.take(triples).sum((1, 2))
        turns = self.grid.turn.take(triples)
        apart = turns[:, :, one] * turns[:, :, other] < 0  # whether line e has the ends of line f on both sides
        crossings = (apart & apart.transpose(0, 2, 1)).sum((1, 2)) / 2
        dx, dy = np.abs(x[:, one] - x[:, other]) * ASPECT, np.abs(y[:, one] - y[:, other])
        length = np.hypot(dx, dy)
        slanted = (dx > 0) & (dy > 0)
        return _THROUGH * through + _CROSSING * crossings + (length + 0.08 * length**2 + _SLANTED * slanted).sum(1)

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
        for dot, cores in self.around:  # a hyperedge's dot stands level with the middle of its cores
            price += _BALANCE * np.abs(y[:, dot] - y[:, cores].mean(1))
        return price + _AREA * ((last - first + 1) * (highest - lowest + 1))[:, 0]

    @staticmethod
    def _asymmetry(x: Floats, y: Floats, reflection: Sequence[int]) -> Any:
        partner = list(reflection)
        axis = x.min(1, keepdims=True) + x.max(1, keepdims=True)
        return _ASYMMETRY * (np.abs(x + x[:, partner] - axis) + np.abs(y - y[:, partner])).sum(1) / 2


def _falling(diagram: Diagram) -> list[tuple[int, int]]:
    """Pairs of nodes of which the first holds the earlier legs of the same side, and so stands higher."""
    pairs = []
    for role in ("in", "out"):
        owners = list(dict.fromkeys(stub.node for stub in diagram.stubs if stub.role == role))
        pairs += list(zip(owners, owners[1:], strict=False))
    return pairs


def place(diagram: Diagram) -> list[tuple[float, float]]:
    """Each node's column and row, counted from the middle of the picture.

    A local search with restarts and a fixed seed. It looks for few crossings, no line through a node, short and
    straight lines, input on the left, output on the right, the kernel low, and the two sides each
    other's mirror image where the graph allows it.
    """
    search = _Search(diagram)
    points = search.run()
    x, y = search.grid.x[points], search.grid.y[points]
    x, y = x - (x.min() + x.max()) / 2, y - (y.min() + y.max()) / 2
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


class _Search:
    """A placement is where each of the grid's points' items goes: nodes first, then blanks, so that every move is a swap."""

    def __init__(self, diagram: Diagram) -> None:
        self.grid = _grid_for(len(diagram.nodes))
        self.objective = _Objective(diagram, self.grid)
        self.sides = sides(diagram)
        self.random = random.Random(0)
        self.left_to_do = _WORK

    def run(self) -> Ints:
        best: tuple[float, Ints] | None = None
        for _ in range(_STARTS):
            found = self._improve(self._start())
            for _ in range(_KICKS):
                if self.left_to_do < 0:
                    break
                other = self._improve(self._kicked(found[1]))
                if other[0] < found[0]:
                    found = other
            if best is None or found[0] < best[0]:
                best = found
            if self.left_to_do < 0:
                break
        assert best is not None
        return best[1][: self.objective.nodes]

    def _start(self) -> Ints:
        """Nodes at random points of the third of the grid that their side asks for."""
        grid, taken = self.grid, set[int]()
        places: list[int] = []
        for side in self.sides:
            free = [point for point in range(len(grid.x)) if point not in taken]
            wanted = [point for point in free if side is None or side * grid.x[point] > grid.columns / 6 or not side]
            places.append(self.random.choice(wanted or free))
            taken.add(places[-1])
        places += [point for point in range(len(grid.x)) if point not in taken]
        return np.array(places, dtype=np.int64)

    def _kicked(self, state: Ints) -> Ints:
        """A few nodes swapped with any points."""
        state = state.copy()
        for _ in range(self.random.randint(2, 4)):
            one, other = self.random.randrange(self.objective.nodes), self.random.randrange(len(state))
            state[[one, other]] = state[[other, one]]
        return state

    def _improve(self, state: Ints) -> tuple[float, Ints]:
        """The best move of each node in turn, until none helps."""
        price = float(self.objective(state[None, : self.objective.nodes])[0])
        helped = True
        while helped and self.left_to_do > 0:
            helped = False
            for node in self.random.sample(range(self.objective.nodes), self.objective.nodes):
                moves = self._moves(state, node)
                prices = self.objective(moves[:, : self.objective.nodes])
                self.left_to_do -= len(moves) * self.objective.work
                best = int(prices.argmin())
                if prices[best] < price:
                    price, state, helped = float(prices[best]), moves[best], True
        return price, state

    def _moves(self, state: Ints, node: int) -> Ints:
        """`node` at every point, alone and, for each reflection, with its partner at the mirrored point."""
        points = np.arange(len(state))
        alone = _swapped(np.tile(state, (len(points), 1)), node, points)
        moves = [alone]
        for reflection in self.objective.reflections:
            if reflection[node] != node:
                moves.append(_swapped(alone, reflection[node], self.grid.mirrored))
        return np.concatenate(moves)


def _swapped(states: Ints, item: int, targets: Ints) -> Ints:
    """In row b, `item` goes to `targets[b]` and what is there to where the item was."""
    rows = np.arange(len(states))
    there = np.argmax(states == targets[:, None], axis=1)
    result = states.copy()
    result[rows, there] = states[:, item]
    result[rows, item] = targets
    return result
