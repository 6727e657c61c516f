"""The search for networks: a space of them, Optuna's samplers, and what each captures of full fine-tunes."""

from tnpeft.searching.report import search_report
from tnpeft.searching.results import Candidate, Finetune, Search
from tnpeft.searching.search import search

__all__ = ["Candidate", "Finetune", "Search", "search", "search_report"]
