"""Adapters as modules: the cores of a network, and the layers that carry them."""

from tnpeft.modules.adapter import Adapter
from tnpeft.modules.build import compile
from tnpeft.modules.execution import EXECUTIONS, Execution
from tnpeft.modules.layers import AdaptedConv, AdaptedConvTranspose, AdaptedLayer, AdaptedLinear, wrap

__all__ = [
    "EXECUTIONS",
    "AdaptedConv",
    "AdaptedConvTranspose",
    "AdaptedLayer",
    "AdaptedLinear",
    "Adapter",
    "Execution",
    "compile",
    "wrap",
]
