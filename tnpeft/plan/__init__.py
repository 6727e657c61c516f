"""Network to plan: in which order its cores are contracted, in which execution mode, and what that costs."""

from tnpeft.plan.dense import MODES, plan
from tnpeft.plan.model import Plan, Step
from tnpeft.plan.path import Path, find_path

__all__ = ["MODES", "Path", "Plan", "Step", "find_path", "plan"]
