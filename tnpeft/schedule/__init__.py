"""Network to plan and what it becomes: operations on tensors with an order of legs, their memory and their time."""

from tnpeft.schedule.memory import Memory
from tnpeft.schedule.model import Plan
from tnpeft.schedule.modes import DEFAULT_MODE, MODES, best_plan, check_choices, check_mode, feasible_plans, plan
from tnpeft.schedule.predict import Prediction, predict

__all__ = [
    "DEFAULT_MODE",
    "MODES",
    "Memory",
    "Plan",
    "Prediction",
    "best_plan",
    "check_choices",
    "check_mode",
    "feasible_plans",
    "plan",
    "predict",
]
