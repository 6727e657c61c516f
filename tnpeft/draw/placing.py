"""Where the nodes of a diagram go: a search over the points of a grid."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.draw.diagram import Diagram, mirrors, sides

__all__ = ["ASPECT", "bulge", "place"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ASPECT = 1.2  # a column is that much wider than a row is high
_CLEARANCE = 0.36  # of a row: how near a line may pass to the centre of a node that is not its own
_STARTS, _KICKS, _SWEEPS, _PATIENCE = 8, 60, 12, 8
_WORK = 200_000_000  # comparisons of lines and nodes in one search, about a second

# The price of what makes a picture hard to read, against the length of one bond from row to row.
_THROUGH, _CROSSING, _SLANTED, _LONG = 60.0, 12.0, 0.25, 0.08
_SIDE, _SWAPPED, _MIDDLE, _INNER, _LOW, _ORDER, _ASYMMETRY, _AREA = 4.0, 6.0, 2.5, 0.6, 0.7, 0.4, 6.0, 0.15
_BALANCE = 2.0


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
        x, y = self.x * ASPECT, self.y
        dx, dy = (x[None] - x[:, None])[:, :, None], (y[None] - y[:, None])[:, :, None]
        to_x, to_y = (x[None] - x[:, None])[:, None, :], (y[None] - y[:, None])[:, None, :]
        length = np.maximum(dx**2 + dy**2, 1e-12)
        along = np.clip((dx * to_x + dy * to_y) / length, 0, 1)
        distance = np.hypot(to_x - along * dx, to_y - along * dy)
        points = np.arange(len(x))
        distance[points, :, points] = np.inf
        distance[:, points, points] = np.inf
        return distance.astype(np.float32)

    @lru_cache(maxsize=8)  # noqa: B019 - grids are few and stay
    def near(self, clearance: float) -> NDArray[np.bool_]:
        """near[p, q, s]: whether the line from p to q passes too near to s, which is neither; flattened."""
        return (self._apart < clearance).reshape(-1)


@lru_cache(maxsize=8)
def _grid(columns: int, rows: int) -> _Grid:
    return _Grid(columns, rows)


def _grid_for(nodes: int, stacked: int) -> _Grid:
    """Odd numbers of columns, so that there is a middle, which has room for `stacked` nodes."""
    for columns, rows, most in ((5, 3, 4), (7, 5, 12), (9, 6, 20)):
        if nodes <= most:
            return _grid(columns, max(rows, stacked))
    side = math.ceil(math.sqrt(1.6 * nodes))
    return _grid(2 * (side // 2) + 5, side + 1)


class _Objective:
    """The price of placements, many at a time: `states[b, n]` is the point of node n in placement b."""

    def __init__(self, diagram: Diagram, grid: _Grid) -> None:
        self.grid = grid
        self.nodes = len(diagram.nodes)
        bonds = Counter((min(line.ends), max(line.ends)) for line in diagram.lines)
        pairs = sorted(bonds, key=lambda pair: (bonds[pair], pair))
        self.ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        # Parallel bonds bulge: the lines in order of how many they stand for, and the clearance of each such group.
        self.groups = []
        for count, group in itertools.groupby(range(len(pairs)), key=lambda number: bonds[pairs[number]]):
            numbers = list(group)
            self.groups.append((slice(numbers[0], numbers[-1] + 1), _CLEARANCE + bulge(count - 1, count)))
        self.reflections = mirrors(diagram)
        side = sides(diagram)
        self.left, self.middle, self.right = (np.array([s == at for s in side]) for at in (-1, 0, 1))
        self.inner = np.array([s is None and node.core is not None for s, node in zip(side, diagram.nodes, strict=True)])
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
        return np.round(price, 6)  # equal placements stay equal on every machine

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
    return list(zip(owners, owners[1:], strict=False))


def bulge(number: int, count: int) -> float:
    """How far the middle of one of `count` parallel bonds is from the straight line, in rows."""
    return (number - (count - 1) / 2) * min(0.3, 1.2 / count)


def place(diagram: Diagram) -> list[tuple[float, float]]:
    """Each node's column and row, counted from the middle of the picture.

    A local search with restarts and a fixed seed. It looks for few crossings, no line through a node, short and
    straight lines, input on the left, output on the right, the kernel low, and the two sides each
    other's mirror image where the graph allows it. Where some line still passes through a node, all go on a circle.
    """
    search = _Search(diagram)
    points = search.run()
    x, y = search.grid.x[points], search.grid.y[points]
    if search.objective.through(points):
        x, y = _on_circle(x, y)
    x, y = x - (x.min() + x.max()) / 2, y - (y.min() + y.max()) / 2
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


def _on_circle(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The same nodes, as near as can be in the same directions, on a circle that no line leaves."""
    count = len(x)
    order = np.argsort(np.round(np.arctan2(y - y.mean(), x - x.mean()), 6), kind="stable")
    angles = np.empty(count)
    angles[order] = 2 * math.pi * np.arange(count) / count - math.pi
    radius = max(_CLEARANCE / (1 - math.cos(2 * math.pi / count)), count / 4)
    return radius * np.cos(angles) / ASPECT, radius * np.sin(angles)


class _Search:
    """Several placements improve side by side: `states[s, n]` is the point of node n in placement s."""

    def __init__(self, diagram: Diagram) -> None:
        self.sides = sides(diagram)
        self.nodes = len(diagram.nodes)
        self.grid = _grid_for(self.nodes, self.sides.count(0))
        self.objective = _Objective(diagram, self.grid)
        self.random = random.Random(0)
        self.left_to_do = _WORK

    def run(self) -> Ints:
        states = np.array([self._start() for _ in range(_STARTS)], dtype=np.int64)
        states, prices = self._improved(states)
        best_so_far: list[float] = []
        for _ in range(_KICKS):
            best_so_far.append(float(prices.min()))
            if self.left_to_do < 0 or best_so_far[-_PATIENCE - 1 : -_PATIENCE] == best_so_far[-1:]:
                break
            kicked, new_prices = self._improved(self._kicked(states))
            better = new_prices < prices
            states, prices = np.where(better[:, None], kicked, states), np.where(better, new_prices, prices)
            order = np.argsort(prices, kind="stable")
            best, worst = order[: _STARTS // 4], order[-(_STARTS // 4) :]
            states[worst], prices[worst] = states[best], prices[best]
        return states[prices.argmin()]

    def _start(self) -> list[int]:
        """Nodes at random points of the third of the grid that their side asks for."""
        grid, places = self.grid, list[int]()
        for side in self.sides:
            free = [point for point in range(len(grid.x)) if point not in places]
            wanted = [point for point in free if not side or side * grid.x[point] > grid.columns / 6]
            places.append(self.random.choice(wanted or free))
        return places

    def _kicked(self, states: Ints) -> Ints:
        """A few nodes of each placement moved to any points."""
        states = states.copy()
        for row in states:
            for _ in range(self.random.randint(2, 4)):
                node, target = self.random.randrange(self.nodes), self.random.randrange(len(self.grid.x))
                row[:] = _swapped(row[None], np.array([node]), np.array([target]))[0]
        return states

    def _improved(self, states: Ints) -> tuple[Ints, Floats]:
        """The best move of each node in turn, and shifts of whole parts, until none helps."""
        prices = self.objective(states)
        for _ in range(_SWEEPS):
            before = prices
            orders = np.array([self.random.sample(range(self.nodes), self.nodes) for _ in states])
            for nodes in orders.T:
                states, prices = self._best(states, prices, self._moves(states, nodes))
            states, prices = self._best(states, prices, self._shifts(states))
            if self.left_to_do < 0 or not (prices < before).any():
                break
        return states, prices

    def _best(self, states: Ints, prices: Floats, moves: Ints) -> tuple[Ints, Floats]:
        """For each placement the cheapest of its moves, where it is cheaper than staying. `moves[s, m]` is one."""
        new_prices = self.objective(moves.reshape(-1, self.nodes)).reshape(moves.shape[:2])
        self.left_to_do -= new_prices.size * self.objective.work
        rows, best = np.arange(len(states)), new_prices.argmin(1)
        cheaper = new_prices[rows, best] < prices
        states = np.where(cheaper[:, None], moves[rows, best], states)
        return states, np.where(cheaper, new_prices[rows, best], prices)

    def _moves(self, states: Ints, nodes: Ints) -> Ints:
        """`nodes[s]` to every point, alone and, for each reflection, with its partner to the mirrored point."""
        count, points = len(states), np.arange(len(self.grid.x))
        item, target = np.repeat(nodes, len(points)), np.tile(points, count)
        alone = _swapped(np.repeat(states, len(points), axis=0), item, target)
        moves = [alone]
        for reflection in self.objective.reflections:
            partner = np.array(reflection)[item]
            moves.append(_swapped(alone, partner, np.where(partner == item, target, self.grid.mirrored[target])))
        return np.concatenate([move.reshape(count, len(points), -1) for move in moves], axis=1)

    def _shifts(self, states: Ints) -> Ints:
        """All nodes beyond a column or row one nearer, where there is room; else the placement itself."""
        grid = self.grid
        moved = []
        for places, most, step in (
            (states % grid.columns, grid.columns, 1),
            (states // grid.columns, grid.rows, grid.columns),
        ):
            for cut in range(1, most):
                for beyond, way in ((places >= cut, -step), (places < cut, step)):
                    targets = states + way * beyond
                    clash = (np.diff(np.sort(targets, axis=1), axis=1) == 0).any(1)
                    moved.append(np.where(clash[:, None], states, targets))
        return np.stack(moved, axis=1)


def _swapped(states: Ints, items: Ints, targets: Ints) -> Ints:
    """In row b node `items[b]` goes to point `targets[b]`, and a node that is there to where it was."""
    rows = np.arange(len(states))
    result = np.where(states == targets[:, None], states[rows, items][:, None], states)
    result[rows, items] = targets
    return result
