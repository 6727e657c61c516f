"""Plan to program: straight-line torch code of pairwise contractions."""

from tnpeft.program.applied import (
    ChainProgram,
    ClusterGradients,
    Completions,
    FactoredUpdate,
    build_chain,
    build_completion,
    factored_update,
)
from tnpeft.program.clusters import BatchedCluster, Cluster, ClusterProgram, LayerClusters, build_clusters
from tnpeft.program.convolution import Geometry, convolve
from tnpeft.program.deltas import BatchedDelta, Weight, weight_of
from tnpeft.program.execute import is_lasting, writes_of
from tnpeft.program.model import Program, build_program
from tnpeft.program.observers import needs_plain_ops, records_sizes, saved_tensors_are_hooked
from tnpeft.program.total import Constants, autocast_dtype, without_autocast

__all__ = [
    "BatchedCluster",
    "BatchedDelta",
    "ChainProgram",
    "Cluster",
    "ClusterGradients",
    "ClusterProgram",
    "Completions",
    "Constants",
    "FactoredUpdate",
    "Geometry",
    "LayerClusters",
    "Program",
    "Weight",
    "autocast_dtype",
    "build_chain",
    "build_clusters",
    "build_completion",
    "build_program",
    "convolve",
    "factored_update",
    "is_lasting",
    "needs_plain_ops",
    "records_sizes",
    "saved_tensors_are_hooked",
    "weight_of",
    "without_autocast",
    "writes_of",
]
