"""How adapted layers compute: the mode of each call, the results that are kept, and the layers themselves."""

from tnpeft.execution.batch_rows import Rows
from tnpeft.execution.build import compile
from tnpeft.execution.forward_pass import Batching, ForwardPass, ModelResults
from tnpeft.execution.layer_kinds import AdaptedConv, AdaptedConv1D, AdaptedConvTranspose, AdaptedLinear, wrap
from tnpeft.execution.layers import AdaptedLayer
from tnpeft.execution.opaque import AdaptedOpaque
from tnpeft.execution.parameters import AdaptedParameter

__all__ = [
    "AdaptedConv",
    "AdaptedConv1D",
    "AdaptedConvTranspose",
    "AdaptedLayer",
    "AdaptedLinear",
    "AdaptedOpaque",
    "AdaptedParameter",
    "Batching",
    "ForwardPass",
    "ModelResults",
    "Rows",
    "compile",
    "wrap",
]
