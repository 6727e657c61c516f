"""A column of a table: how its numbers are printed, and which of them is the best beyond doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ddpm_lab.evaluation.paired import Difference, Numbers, compare
from ddpm_lab.study.results import METRICS, Cell, Metric

__all__ = ["NOTHING", "Column", "set_intervals", "set_powers"]

NOTHING = "-"


@dataclass
class Column:
    """The cells of one metric on one data set, by row, and the numbers behind them."""

    metric: Metric
    cells: list[Cell | None] = field(default_factory=list)
    numbers: list[Numbers] = field(default_factory=list)
    confidence: float = 0.95
    unseen: bool = False  # the encoder does not tell this data set from the source: nothing is compared
    power: int = 0  # numbers are printed in units of ten to this power
    intervals: bool = True  # printed beside the numbers

    @property
    def sizes(self) -> list[float]:
        if self.unseen:
            return []
        return [abs(cell.mean) for cell in self.cells if cell is not None and cell.mean]

    @property
    def decimals(self) -> int:
        if self.metric.unit == "%":
            return 1
        return 2 if self.power else 3

    def text(self, row: int) -> str:
        cell = self.cells[row]
        if cell is None or self.unseen:
            return NOTHING
        scale, sign = 10.0**self.power, "+" if self.metric.unit == "%" else ""
        text = f"{cell.mean / scale:{sign}.{self.decimals}f}"
        return text if cell.half is None or not self.intervals else f"{text} ± {cell.half / scale:.{self.decimals}f}"

    def order(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows that have a number, the best first."""
        means = {row: cell.mean for row in rows if (cell := self.cells[row]) is not None}
        return sorted(means, key=lambda row: means[row] if self.metric.less else -means[row])

    def difference(self, one: int, other: int) -> Difference | None:
        """One row less another, paired by seed and volume; None where too few seeds have both."""
        return compare(self.numbers[one], self.numbers[other], self.confidence)

    def best(self, competitors: Sequence[int], base: int) -> set[int]:
        """The best row, if its paired difference from the next excludes zero and the base is not better."""
        order = self.order(competitors)
        if len(order) < 2 or self.unseen:
            return set()
        first = order[0]
        found = self.difference(first, order[1])
        return {first} if found is not None and found.clear and self._beats(first, base) else set()

    def _beats(self, row: int, base: int) -> bool:
        """Whether a row is better than the base, which changes no error."""
        own, other = self.cells[row], self.cells[base]
        assert own is not None
        if self.metric.part:
            return own.mean < 0
        return other is None or (own.mean < other.mean if self.metric.less else own.mean > other.mean)


def set_powers(columns: Sequence[Column]) -> None:
    """One unit for each metric: a middle number of all its columns has one digit before the point."""
    for metric in METRICS:
        own = [column for column in columns if column.metric == metric]
        sizes = sorted(size for column in own for size in column.sizes)
        if not sizes or not metric.marked:
            continue
        # The middle one, so that a method which diverged does not cost the others their digits.
        power = math.floor(math.log10(sizes[len(sizes) // 2]))
        for column in own:
            column.power = power if power < -1 else 0


def set_intervals(columns: Sequence[Column]) -> bool:
    """Whether every number of a table has an interval; where one has none, none is printed."""
    known = all(cell is None or cell.half is not None for column in columns for cell in column.cells)
    for column in columns:
        column.intervals = known
    return known
