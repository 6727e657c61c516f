"""Where a fit starts: from singular vectors if the network is a tree, else from random cores."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from tnpeft.fitting.contract import Labels, Operand, contract
from tnpeft.fitting.mapped import MappedProblem
from tnpeft.fitting.problem import Cores, Problem, Term

__all__ = ["random_start", "tree_start"]

SCALES = 5  # of random cores behind maps that are not linear: 1, 1/2, ...
DENSE_SVD = 2**20  # elements up to which singular vectors come from the matrix itself


def random_start(problem: Problem, seed: int) -> Cores:
    """Normal cores, the same on any machine, scaled so that the network is about as large as the target.

    Behind nonlinear maps the right scale is not known: successive seeds take several.
    """
    generator = torch.Generator().manual_seed(seed)
    cores = {}
    for name, shape in problem.shapes.items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        cores[name] = drawn.to(problem.target.device)
    if problem.curved:
        return {name: core * 2.0 ** -(seed % SCALES) for name, core in cores.items()}
    size = float(torch.linalg.vector_norm(problem.value(cores)))
    wanted = float(torch.linalg.vector_norm(problem.target))
    if not size or not wanted or not math.isfinite(size):
        return cores
    factor = (wanted / size) ** (1 / len(cores))
    return {name: core * factor for name, core in cores.items()}


def tree_start(problem: Problem) -> Cores | None:
    """Singular vectors, core by core from the leaves inwards; None if the network is no tree.

    For two cores this is the best fit there is. For more it is the truncated higher-order decomposition, which is exact
    if the target is such a network. Parts that no bond joins count as joined by a bond of size one.
    """
    if isinstance(problem, MappedProblem):
        factors = tree_start(problem.inner) if problem.stored(problem.inner.zeros) is not None else None
        return None if factors is None else problem.stored(factors)
    term = problem.terms[0]
    if len(problem.terms) > 1 or not _is_plain(problem, term):
        return None
    waiting, rest = dict(term.free), (problem.target, problem.rows)
    found: Cores = {}
    while len(waiting) > 1:
        leaf = next((name for name in waiting if len(_neighbours(waiting, name)) < 2), None)
        if leaf is None:
            return None
        labels = waiting.pop(leaf)
        bond = tuple(label for label in labels if any(label in other for other in waiting.values()))
        found[leaf], rest = _cut(rest, labels, bond, problem.shapes[leaf])
    (name, labels) = next(iter(waiting.items()))
    found[name] = contract([rest], labels)
    return {name: found[name].contiguous() for name in problem.shapes}


def _is_plain(problem: Problem, term: Term) -> bool:
    """Whether each row is in one core and every other label in two, apart from masks."""
    places = Counter(label for labels in term.free.values() for label in labels)
    masks = all(set(labels) <= set(problem.rows) and _is_padding(tensor) for tensor, labels in term.fixed)
    rows = all(places[label] == 1 for label in problem.rows)
    plain = all(count == 2 for label, count in places.items() if label not in problem.rows)
    return masks and rows and plain


def _is_padding(tensor: Tensor) -> bool:
    """Whether it keeps the first entries as they are and drops the others, of which the target has none."""
    flat = tensor.flatten()
    return bool(((flat == 0) | (flat == 1)).all() and (flat.diff() <= 0).all())


def _neighbours(waiting: dict[str, Labels], name: str) -> list[str]:
    return [other for other, labels in waiting.items() if other != name and not set(labels).isdisjoint(waiting[name])]


def _cut(rest: Operand, labels: Labels, bond: Labels, shape: tuple[int, ...]) -> tuple[Tensor, Operand]:
    """Split a leaf off: its core, in the order of its legs, and what is left, which holds the bond instead."""
    tensor, axes = rest
    sizes = dict(zip((*axes, *labels), (*tensor.shape, *shape), strict=True))
    own = tuple(label for label in labels if label not in bond)
    others = tuple(label for label in axes if label not in own)
    matrix = contract([rest], (*own, *others)).reshape(math.prod(sizes[label] for label in own), -1)
    left, right = _split(matrix, math.prod(sizes[label] for label in bond))
    core = left.reshape([sizes[label] for label in (*own, *bond)])
    remains = right.reshape([sizes[label] for label in (*bond, *others)])
    return contract([(core, (*own, *bond))], labels), (remains, (*bond, *others))


def _split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best matrix of a rank as two factors; surplus rank is zero in the right one."""
    rows, columns = matrix.shape
    if matrix.numel() <= DENSE_SVD:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        left, right = u[:, :rank], s[:rank, None] * vh[:rank]
    elif rows <= columns:
        left = torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
        right = left.T @ matrix
    else:
        right = torch.linalg.eigh(matrix.T @ matrix)[1].flip(1)[:, :rank].T
        left = matrix @ right.T
    missing = rank - left.shape[1]
    if missing > 0:
        # Not zero on both sides, where no later step could ever move them.
        spare = left.new_ones(rows, missing) / math.sqrt(rows)
        left, right = torch.cat([left, spare], 1), torch.cat([right, right.new_zeros(missing, columns)])
    return left, right
