"""From data to adapters: fits to full updates, an adapter of a checkpoint, the rank of a budget, ranks that shrink."""

from tnpeft.fitting.budget import Budget, BudgetRow, budget
from tnpeft.fitting.extract import ExtractedLayer, Extraction, Unexplained, check_tensors, extract
from tnpeft.fitting.fit import Fit, fit, fit_adapter
from tnpeft.fitting.truncation import Truncation, truncate

__all__ = [
    "Budget",
    "BudgetRow",
    "ExtractedLayer",
    "Extraction",
    "Fit",
    "Truncation",
    "Unexplained",
    "budget",
    "check_tensors",
    "extract",
    "fit",
    "fit_adapter",
    "truncate",
]
