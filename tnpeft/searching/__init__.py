"""The search for networks: a space of them, Optuna's samplers, and what each captures of full fine-tunes."""

from tnpeft.searching.search import Candidate, Search, search

__all__ = ["Candidate", "Search", "search"]
