"""Adapters as modules: the cores of a network, and the layers that carry them."""

from tnpeft.modules.adapter import Adapter
from tnpeft.modules.build import compile
from tnpeft.modules.execution import EXECUTIONS, Execution
from tnpeft.modules.inits import is_drawn
from tnpeft.modules.layers import AdaptedConv, AdaptedConvTranspose, AdaptedLayer, AdaptedLinear, wrap
from tnpeft.modules.sharing import Captured, Sharing

__all__ = [
    "EXECUTIONS",
    "AdaptedConv",
    "AdaptedConvTranspose",
    "AdaptedLayer",
    "AdaptedLinear",
    "Adapter",
    "Captured",
    "Execution",
    "Sharing",
    "compile",
    "is_drawn",
    "wrap",
]
