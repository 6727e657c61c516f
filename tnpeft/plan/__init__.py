"""Network to plan: in which order its cores are contracted, in which execution mode, and what that costs."""

from tnpeft.plan.call import Axis, Call, nominal_call
from tnpeft.plan.dense import steps_of
from tnpeft.plan.memory import PAIRS, Memory
from tnpeft.plan.model import Link, Plan, Step
from tnpeft.plan.modes import DEFAULT_MODE, MODES, best_plan, check_choices, check_mode, feasible_plans, plan
from tnpeft.plan.path import Path, find_path
from tnpeft.plan.predict import Prediction, predict

__all__ = [
    "DEFAULT_MODE",
    "MODES",
    "PAIRS",
    "Axis",
    "Call",
    "Link",
    "Memory",
    "Path",
    "Plan",
    "Prediction",
    "Step",
    "best_plan",
    "check_choices",
    "check_mode",
    "feasible_plans",
    "find_path",
    "nominal_call",
    "plan",
    "predict",
    "steps_of",
]
