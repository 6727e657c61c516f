"""From a network to its plan, and to operations on tensors with an order of legs, with their memory and time."""

from tnpeft.schedule.memory import Memory
from tnpeft.schedule.model import Plan
from tnpeft.schedule.modes import DEFAULT_MODE, MODES, best_plan, check_choices, check_mode, feasible_plans, plan
from tnpeft.schedule.predict import Prediction, predict
from tnpeft.schedule.side import Side, side_of

__all__ = [
    "DEFAULT_MODE",
    "MODES",
    "Memory",
    "Plan",
    "Prediction",
    "Side",
    "best_plan",
    "check_choices",
    "check_mode",
    "feasible_plans",
    "plan",
    "predict",
    "side_of",
]
