"""Plan to program: straight-line torch code of pairwise contractions."""

from tnpeft.program.applied import (
    ChainProgram,
    ClusterGradients,
    Completions,
    FactoredUpdate,
    build_chain,
    build_completion,
)
from tnpeft.program.clusters import ClusterProgram, LayerClusters, StartValues, build_clusters
from tnpeft.program.convolution import Geometry, convolve
from tnpeft.program.model import Program, build_program
from tnpeft.program.total import Constants, without_autocast

__all__ = [
    "ChainProgram",
    "ClusterGradients",
    "ClusterProgram",
    "Completions",
    "Constants",
    "FactoredUpdate",
    "Geometry",
    "LayerClusters",
    "Program",
    "StartValues",
    "build_chain",
    "build_clusters",
    "build_completion",
    "build_program",
    "convolve",
    "without_autocast",
]
