"""Where the nodes of a diagram go: a search over the points of a grid."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import networkx
import numpy as np

from tnpeft.draw.diagram import Diagram, sides
from tnpeft.draw.objective import ASPECT, CLEARANCE, Floats, Ints, Objective, grid_for

__all__ = ["Places", "passed_by", "place", "place_near"]

Places = list[tuple[float, float]]

_STARTS, _KICKS, _SWEEPS, _PATIENCE = 8, 60, 12, 8
_MOST_SPRINGS = 400  # nodes: each pushes each
_WIDEST = 40.0  # rows, the radius of a circle on which no line passes through a node
_WORK = 200_000_000  # comparisons of lines and nodes in one search, about a second


def place(diagram: Diagram) -> Places:
    """Each node's column and row, counted from the middle of the picture.

    This is a local search with restarts and a fixed seed. It looks for few crossings, no line through a node, short and
    straight lines, the input on the left, the output on the right, the kernel low, and mirror symmetry of the two sides
    if the graph allows it. If some line still passes through a node, all nodes go on a circle.
    """
    if _takes_long(diagram):
        x, y = _by_springs(diagram)
        crossed = passed_by(np.stack([x * ASPECT, y], axis=1), [line.ends for line in diagram.lines], CLEARANCE) > 0
        if crossed:
            x, y = _in_turn(diagram.graph).T
    else:
        search = _Search(diagram)
        points = search.run()
        x, y = search.grid.x[points], search.grid.y[points]
        crossed = search.objective.through(points) > 0
    if crossed:
        x, y = _on_circle(x, y)
    return _centred(x, y)


def place_near(diagram: Diagram, known: Mapping[str, tuple[float, float]]) -> Places:
    """As `place`, in a few milliseconds: from known positions, by node name, to the nearest good placement.

    It may miss the best one: it is for a picture that follows its text while it is written.
    """
    if _takes_long(diagram):
        return place(diagram)
    search = _Search(diagram)
    points = search.improved_from(known)
    x, y = search.grid.x[points], search.grid.y[points]
    return _centred(*(_on_circle(x, y) if search.objective.through(points) else (x, y)))


def _centred(x: Floats, y: Floats) -> Places:
    x, y = x - (x.min() + x.max()) / 2, y - (y.min() + y.max()) / 2
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


def _on_circle(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The same nodes, as near as can be in the same directions, on a circle that no line leaves."""
    count = len(x)
    order = np.argsort(np.round(np.arctan2(y - y.mean(), x - x.mean()), 6), kind="stable")
    angles = np.empty(count)
    angles[order] = 2 * math.pi * np.arange(count) / count - math.pi
    radius = max(min(CLEARANCE / (1 - math.cos(2 * math.pi / count)), _WIDEST), count / 4)
    return radius * np.cos(angles) / ASPECT, radius * np.sin(angles)


def _takes_long(diagram: Diagram) -> bool:
    """Whether moving each node once, in all placements, would take more than a search may."""
    nodes, lines = len(diagram.nodes), len(diagram.lines)
    points = 3 * nodes  # of the grid, about
    return _STARTS * nodes * points * lines * (nodes + lines) > 2 * _WORK


def _by_springs(diagram: Diagram) -> tuple[Floats, Floats]:
    """Nodes that lines pull together and all others push apart, on points of a grid; the input on the left."""
    graph, count = diagram.graph, len(diagram.nodes)
    if count <= _MOST_SPRINGS:
        drawn = networkx.spring_layout(graph, seed=0)
        wanted = np.array([drawn[number] for number in range(count)])
    else:
        wanted = _in_turn(graph)
    ends = [[number for number, node in enumerate(diagram.nodes) if role in node.own] for role in ("in", "out")]
    if all(ends) and wanted[ends[0], 0].mean() > wanted[ends[1], 0].mean():
        wanted[:, 0] *= -1
    side = 2 * math.ceil(math.sqrt(count))
    low, high = wanted.min(0), wanted.max(0)
    wanted = (wanted - low) / np.maximum(high - low, 1e-9) * (side - 1)
    points = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1).reshape(-1, 2)
    free = np.ones(len(points), dtype=bool)
    taken = []
    for place in np.round(wanted, 6):
        away = np.where(free, ((points - place) ** 2).sum(1), np.inf)
        taken.append(int(away.argmin()))
        free[taken[-1]] = False
    return points[taken, 0].astype(float), points[taken, 1].astype(float)


def _in_turn(graph: networkx.Graph[int]) -> Floats:
    """Points of a circle, neighbours mostly beside each other."""
    order = {node: place for place, node in enumerate(networkx.dfs_preorder_nodes(graph))}
    angles = np.array([2 * math.pi * (0.5 - order[node] / len(order)) for node in sorted(order)])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def passed_by(places: Floats, ends: Sequence[tuple[int, int]], clearance: float) -> int:
    """How often a straight line comes nearer than `clearance` to a node that is not its end, at `places[n]`."""
    first, last = (np.array([pair[side] for pair in ends], dtype=np.int64) for side in (0, 1))
    start, way = places[first], places[last] - places[first]
    length = np.maximum((way**2).sum(1), 1e-12)
    count = 0
    for number, place in enumerate(places):
        along = np.clip(((place - start) * way).sum(1) / length, 0, 1)
        near = ((start + along[:, None] * way - place) ** 2).sum(1) < clearance**2
        count += int((near & (first != number) & (last != number)).sum())
    return count


class _Search:
    """Several placements improve side by side: `states[s, n]` is the point of node n in placement s."""

    def __init__(self, diagram: Diagram) -> None:
        self.names = [node.name for node in diagram.nodes]
        self.graph = diagram.graph
        self.sides = sides(diagram)
        self.nodes = len(diagram.nodes)
        self.grid = grid_for(self.nodes, self.sides.count(0))
        self.objective = Objective(diagram, self.grid)
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
        return np.asarray(states[prices.argmin()])

    def improved_from(self, known: Mapping[str, tuple[float, float]]) -> Ints:
        """One placement improved, whose nodes begin on the points nearest to their known places or neighbours."""
        places = {number: known[name] for number, name in enumerate(self.names) if name in known}
        free = np.ones(len(self.grid.x), dtype=bool)
        start = np.zeros(self.nodes, dtype=np.int64)
        for number in sorted(range(self.nodes), key=lambda number: number not in places):
            beside = [places[other] for other in self.graph[number] if other in places]
            x, y = places.get(number) or (np.mean(beside, axis=0) if beside else (0.0, 0.0))
            away = np.where(free, (self.grid.x - x) ** 2 + (self.grid.y - y) ** 2, np.inf)
            start[number] = away.argmin()
            free[start[number]] = False
            places.setdefault(number, (float(x), float(y)))
        states, _ = self._improved(start[None])
        return np.asarray(states[0])

    def _start(self) -> list[int]:
        """Nodes at random points of the part of the grid that their side asks for."""
        grid, places = self.grid, list[int]()
        for side in self.sides:
            free = [point for point in range(len(grid.x)) if point not in places]
            if side == 0:
                wanted = [point for point in free if grid.x[point] == 0]
            else:
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
                if self.left_to_do < -_WORK:
                    return states, prices
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
