"""Some rows of a delta weight that is stored (in, out), as embeddings look them up: never the whole of it.

    rows[n, o] = scale * sum over bonds of core_1[.., i(n), ..] core_2[.., o, ..] ...

Each core that has legs of the input is gathered at the rows' positions first, and has one leg for all rows instead;
what is contracted then has the size of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tnpeft.network import BoundCore, Layer, Network
from tnpeft.program.delta import Program, build_program
from tnpeft.schedule import plan

__all__ = ["delta_rows"]

_ROW = "row"
_STORED = (1, 0)  # of (out, rows), the rows vary slowest


def delta_rows(network: Network, cores: Sequence[Tensor], start: Sequence[Tensor], rows: Tensor) -> Tensor:
    """(rows, out): the delta weight at some positions of the input; `start` are the frozen copies, if there are any.

    The network is that of a Linear layer, and depends on nothing but its cores.
    """
    count = min(_rounded(len(rows)), network.layer.in_channels) if len(rows) <= network.layer.in_channels else len(rows)
    padded = torch.nn.functional.pad(rows, (0, count - len(rows)))
    program = _program(network, count)
    first = program.start([*_gathered(network, start, padded)]) if start else None
    (delta,) = program.deltas([*_gathered(network, cores, padded)], first)
    return delta.T[: len(rows)]


def _rounded(count: int) -> int:
    """The next power of two: programs are few."""
    return 1 << max(count - 1, 15).bit_length()


@lru_cache(maxsize=256)
def _program(network: Network, count: int) -> Program:
    row = _ROW
    while row in network.sizes:
        row += "_"
    return build_program(plan(_of_rows(network, row, count)), _STORED)


def _of_rows(network: Network, row: str, count: int) -> Network:
    """The network in which all legs of the input are one, of the rows."""
    inputs = {leg for term in network.terms for leg in term.weight[1]}
    return replace(
        network,
        layer=Layer("Linear", count, network.layer.out_channels),
        sizes={**network.sizes, row: count},
        cores=tuple(_core_of_rows(core, inputs, row, count) for core in network.cores),
        terms=tuple(replace(term, weight=(term.weight[0], (row,))) for term in network.terms),
    )


def _core_of_rows(core: BoundCore, inputs: set[str], row: str, count: int) -> BoundCore:
    left = [(leg, size) for leg, size in zip(core.legs, core.shape, strict=True) if leg not in inputs]
    if len(left) == len(core.legs):
        return core
    legs, shape = (row, *(leg for leg, _ in left)), (count, *(size for _, size in left))
    return replace(core, legs=legs, shape=shape)


def _gathered(network: Network, cores: Sequence[Tensor], rows: Tensor) -> Iterator[Tensor]:
    """Each core at the rows' positions, whose leg comes first; those without legs of the input as they are."""
    digits = _digits(network, rows)
    for core, tensor in zip(network.cores, cores, strict=True):
        axes = [axis for axis, leg in enumerate(core.legs) if leg in digits]
        if not axes:
            yield tensor
            continue
        rest = [axis for axis in range(tensor.dim()) if axis not in axes]
        folded = tensor.permute(*axes, *rest).reshape(-1, *(tensor.shape[axis] for axis in rest))
        place: Tensor = rows.new_zeros(())
        for axis in axes:
            place = place * tensor.shape[axis] + digits[core.legs[axis]]
        yield folded.index_select(0, place)


def _digits(network: Network, rows: Tensor) -> dict[str, Tensor]:
    """(rows,) for each leg of the input: its value at each row, row-major in the weight's pattern."""
    digits: dict[str, Tensor] = {}
    for term in network.terms:
        left = rows
        for leg in reversed(term.weight[1]):
            digits[leg] = left % network.sizes[leg]
            left = left // network.sizes[leg]
    return digits
