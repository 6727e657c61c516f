"""Network to plan: in which order its cores are contracted, in which execution mode, and what that costs."""

from tnpeft.plan.call import Axis, Call, nominal_call
from tnpeft.plan.dense import steps_of
from tnpeft.plan.memory import Memory
from tnpeft.plan.model import Link, Plan, Step
from tnpeft.plan.modes import MODES, check_mode, plan
from tnpeft.plan.path import Path, find_path
from tnpeft.plan.predict import Prediction, predict

__all__ = [
    "MODES",
    "Axis",
    "Call",
    "Link",
    "Memory",
    "Path",
    "Plan",
    "Prediction",
    "Step",
    "check_mode",
    "find_path",
    "nominal_call",
    "plan",
    "predict",
    "steps_of",
]
