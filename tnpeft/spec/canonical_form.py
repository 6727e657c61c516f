"""The canonical form of a labelled graph: equal for two graphs exactly if one is the other with nodes renamed.

Colour refinement (Weisfeiler-Leman) splits nodes as far as labels and neighbours can. If some remain alike, one after
another is singled out, and the least of the resulting forms is taken. Symmetries found on the way save branches that
they map to others (McKay & Piperno, J. Symb. Comp. 2014).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tnpeft.errors import Problem, SpecError

__all__ = ["canonical_form"]

Edge = tuple[int, int, str]
Form = tuple[tuple[str, ...], tuple[Edge, ...]]

MAX_LEAVES = 2_000  # forms looked at


def canonical_form(labels: Sequence[str], edges: Sequence[Edge]) -> str:
    """The form as one line of JSON: labels in canonical order, and directed edges with their labels.

    Raises SpecError for a graph with more nodes alike than can be told apart in `MAX_LEAVES` trials.
    """
    return json.dumps(_Search(labels, edges).run(), separators=(",", ":"))


class _Search:
    def __init__(self, labels: Sequence[str], edges: Sequence[Edge]) -> None:
        self.labels, self.edges = labels, edges
        self.out: list[list[tuple[str, int]]] = [[] for _ in labels]
        self.into: list[list[tuple[str, int]]] = [[] for _ in labels]
        for source, target, label in edges:
            self.out[source].append((label, target))
            self.into[target].append((label, source))
        self.leaves: list[tuple[Form, list[int], list[int]]] = []  # the first one and the least: form, order, fixed
        self.symmetries: list[list[int]] = []
        self.count = 0

    def run(self) -> Form:
        names = {label: number for number, label in enumerate(sorted(set(self.labels)))}
        self._search(self._refined([names[label] for label in self.labels]), [])
        return self.leaves[-1][0]

    def _refined(self, colours: list[int]) -> list[int]:
        """The coarsest split in which nodes of a colour have neighbours of the same colours; numbers tell no names."""
        count = len(set(colours))
        while True:
            signatures = [
                (
                    colour,
                    tuple(sorted((label, colours[node]) for label, node in self.out[place])),
                    tuple(sorted((label, colours[node]) for label, node in self.into[place])),
                )
                for place, colour in enumerate(colours)
            ]
            known = {signature: number for number, signature in enumerate(sorted(set(signatures)))}
            colours = [known[signature] for signature in signatures]
            if len(known) == count:
                return colours
            count = len(known)

    def _search(self, colours: list[int], fixed: list[int]) -> int:
        """Look at all forms below; returns the level to go back to."""
        cells: dict[int, list[int]] = {}
        for node, colour in enumerate(colours):
            cells.setdefault(colour, []).append(node)
        alike = [cell for _, cell in sorted(cells.items()) if len(cell) > 1]
        if not alike:
            return self._leaf(colours, fixed)
        tried: list[int] = []
        for node in min(alike, key=len):
            if tried and not self._orbit(node, fixed).isdisjoint(tried):
                continue
            single = [2 * colour + (place != node) for place, colour in enumerate(colours)]
            back = self._search(self._refined(single), [*fixed, node])
            if back < len(fixed):
                return back
            tried.append(node)
        return len(fixed)

    def _leaf(self, order: list[int], fixed: list[int]) -> int:
        """Every node has a number of its own: a form. One that is known shows a symmetry."""
        self.count += 1
        if self.count > MAX_LEAVES:
            fix = "Compare specs of fewer equal cores."
            raise SpecError(Problem("canonical form", f"at most {MAX_LEAVES} trials", "more nodes alike", fix))
        labels = [""] * len(order)
        for node, number in enumerate(order):
            labels[number] = self.labels[node]
        form = (tuple(labels), tuple(sorted((order[a], order[b], label) for a, b, label in self.edges)))
        for known, other, prefix in self.leaves:
            if form == known:
                nodes = {number: node for node, number in enumerate(other)}
                self.symmetries.append([nodes[number] for number in order])
                return next(
                    (level for level, pair in enumerate(zip(fixed, prefix, strict=False)) if pair[0] != pair[1]),
                    len(fixed),
                )
        if not self.leaves or form < self.leaves[-1][0]:
            self.leaves = [*self.leaves[:1], (form, order, fixed)]
        return len(fixed)

    def _orbit(self, node: int, fixed: list[int]) -> set[int]:
        """Where the known symmetries that leave the fixed nodes alone can take a node."""
        maps = [symmetry for symmetry in self.symmetries if all(symmetry[place] == place for place in fixed)]
        orbit, waiting = {node}, [node]
        while waiting:
            place = waiting.pop()
            for symmetry in maps:
                for image in (symmetry[place], symmetry.index(place)):
                    if image not in orbit:
                        orbit.add(image)
                        waiting.append(image)
        return orbit
