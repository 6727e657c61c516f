"""Whether an encoder tells two domains apart: a permutation test on the features of real volumes."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import permutation_test

from ddpm_lab.evaluation.metrics import Products, rbf_kernels

__all__ = ["LEVEL", "PERMUTATIONS", "p_value"]

PERMUTATIONS = 9999
LEVEL = 0.05  # a larger p-value: the encoder does not see what sets a domain apart


def p_value(one: torch.Tensor, other: torch.Tensor, seed: int, permutations: int = PERMUTATIONS) -> float | None:
    """How often volumes dealt anew to sets of these sizes are as far apart as the two sets, (n, d) and (m, d).

    Far apart in the unbiased squared MMD with the standard Gaussian kernel (Gretton et al. 2012), whose width depends
    on all volumes together and so on no deal. The given deal counts as one of them: p = (1 + how many) / (1 +
    permutations). Where there are fewer deals than that, each is looked at once. None for sets of less than two.
    """
    first, second = len(one), len(other)
    if min(first, second) < 2:
        return None
    kernels = rbf_kernels(Products.of(one, other))
    upper = torch.cat([kernels.inner, kernels.cross], dim=1)
    lower = torch.cat([kernels.cross.T, kernels.outer], dim=1)
    values = torch.cat([upper, lower]).numpy().copy()
    np.fill_diagonal(values, 0.0)  # pairs of a volume with itself are no pairs
    total = values.sum()

    def statistic(chosen: np.ndarray, rest: np.ndarray, axis: int = -1) -> np.ndarray:
        """The MMD of some deals, each with the places of the volumes that it puts into the first set."""
        member = np.zeros((*chosen.shape[:-1], first + second))
        np.put_along_axis(member, chosen, 1.0, axis=-1)
        sums = member @ values
        inner = np.einsum("...k,...k->...", sums, member)
        across = sums.sum(-1) - inner
        outer = total - 2 * across - inner
        found = inner / (first * (first - 1)) + outer / (second * (second - 1)) - 2 * across / (first * second)
        return np.asarray(found)

    places = np.arange(first), np.arange(first, first + second)
    found = permutation_test(
        places,
        statistic,
        permutation_type="independent",
        vectorized=True,
        n_resamples=permutations,
        batch=1000,
        alternative="greater",
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)
