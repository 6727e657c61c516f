"""The order in which a network is contracted: to its delta weight, or cluster by cluster with its layer's input."""

from tnpeft.planning.call import Axis, Call, nominal_call
from tnpeft.planning.path import Path, find_path
from tnpeft.planning.steps import Link, Step, steps_of

__all__ = ["Axis", "Call", "Link", "Path", "Step", "find_path", "nominal_call", "steps_of"]
