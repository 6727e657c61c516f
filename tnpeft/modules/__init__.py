"""Adapters as modules: the cores of a network, and the layers that carry them."""

from tnpeft.modules.adapter import Adapter
from tnpeft.modules.build import compile
from tnpeft.modules.dispatch import Calling, Running
from tnpeft.modules.forward_pass import Batches, ForwardPass, Member
from tnpeft.modules.inits import is_drawn
from tnpeft.modules.layers import AdaptedConv, AdaptedConvTranspose, AdaptedLayer, AdaptedLinear, wrap
from tnpeft.modules.results import ResultCache
from tnpeft.modules.room import memory_limit, memory_problems
from tnpeft.modules.sharing import Captured, Sharing

__all__ = [
    "AdaptedConv",
    "AdaptedConvTranspose",
    "AdaptedLayer",
    "AdaptedLinear",
    "Adapter",
    "Batches",
    "Calling",
    "Captured",
    "ForwardPass",
    "Member",
    "ResultCache",
    "Running",
    "Sharing",
    "compile",
    "is_drawn",
    "memory_limit",
    "memory_problems",
    "wrap",
]
