"""Fits, tangent spaces, an adapter from a checkpoint, the rank for a budget, and truncation."""

from tnpeft.fitting.budget import Budget, BudgetRow, budget
from tnpeft.fitting.extract import ExtractedLayer, Extraction, Unexplained, check_tensors, extract
from tnpeft.fitting.fit import Fit, fit, fit_adapter
from tnpeft.fitting.tangent import TangentSpace, tangent_space, tangent_space_of
from tnpeft.fitting.truncation import Truncation, truncate

__all__ = [
    "Budget",
    "BudgetRow",
    "ExtractedLayer",
    "Extraction",
    "Fit",
    "TangentSpace",
    "Truncation",
    "Unexplained",
    "budget",
    "check_tensors",
    "extract",
    "fit",
    "fit_adapter",
    "tangent_space",
    "tangent_space_of",
    "truncate",
]
