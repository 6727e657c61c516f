"""What is trained and saved: the cores of a network as a module, and tensors that are kept beside a layer's own."""

from tnpeft.adapters.adapter import Adapter
from tnpeft.adapters.inits import is_drawn
from tnpeft.adapters.memory_need import memory_limit, memory_problems
from tnpeft.adapters.places import place_problem
from tnpeft.adapters.sharing import Captured, Sharing

__all__ = [
    "Adapter",
    "Captured",
    "Sharing",
    "is_drawn",
    "memory_limit",
    "memory_problems",
    "place_problem",
]
