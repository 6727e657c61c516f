"""How adapted layers compute: which mode a call runs in, what is kept meanwhile, and the layers themselves."""

from tnpeft.execution.build import compile
from tnpeft.execution.forward_pass import Batching, ForwardPass, ModelResults
from tnpeft.execution.layer_kinds import AdaptedConv, AdaptedConvTranspose, AdaptedLinear, wrap
from tnpeft.execution.layers import AdaptedLayer

__all__ = [
    "AdaptedConv",
    "AdaptedConvTranspose",
    "AdaptedLayer",
    "AdaptedLinear",
    "Batching",
    "ForwardPass",
    "ModelResults",
    "compile",
    "wrap",
]
