"""From data to adapters: fitting a spec to a full update, extracting an adapter from a checkpoint, meeting a budget."""

from tnpeft.fitting.fit import Fit, fit, fit_adapter

__all__ = ["Fit", "fit", "fit_adapter"]
