"""How adapted layers compute: which mode a call runs in, what is kept meanwhile, and the layers themselves."""

from tnpeft.execution.build import compile
from tnpeft.execution.forward_pass import ForwardPass, ModelResults
from tnpeft.execution.layers import AdaptedConv, AdaptedConvTranspose, AdaptedLayer, AdaptedLinear, wrap

__all__ = [
    "AdaptedConv",
    "AdaptedConvTranspose",
    "AdaptedLayer",
    "AdaptedLinear",
    "ForwardPass",
    "ModelResults",
    "compile",
    "wrap",
]
