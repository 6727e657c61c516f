"""Network to plan: in which order its cores are contracted, in which execution mode, and what that costs."""

from tnpeft.planning.call import Axis, Call, nominal_call
from tnpeft.planning.memory import PAIRS, Memory
from tnpeft.planning.model import Plan
from tnpeft.planning.modes import DEFAULT_MODE, MODES, best_plan, check_choices, check_mode, feasible_plans, plan
from tnpeft.planning.path import Path, find_path
from tnpeft.planning.predict import Prediction, predict
from tnpeft.planning.steps import Link, Step, steps_of

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
