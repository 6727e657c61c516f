"""From data to adapters: fitting a spec to a full update, extracting an adapter from a checkpoint, meeting a budget."""

from tnpeft.fitting.budget import Budget, BudgetRow, budget
from tnpeft.fitting.extract import ExtractedLayer, Extraction, Unexplained, check_tensors, extract
from tnpeft.fitting.fit import Fit, fit, fit_adapter

__all__ = [
    "Budget",
    "BudgetRow",
    "ExtractedLayer",
    "Extraction",
    "Fit",
    "Unexplained",
    "budget",
    "check_tensors",
    "extract",
    "fit",
    "fit_adapter",
]
