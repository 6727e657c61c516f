"""Plan to program: straight-line torch code of pairwise contractions."""

from tnpeft.program.clusters import BatchedCluster, Cluster, ClusterProgram, LayerClusters, build_clusters
from tnpeft.program.convolution import Geometry, convolve
from tnpeft.program.deltas import BatchedDelta, Weight, weight_of
from tnpeft.program.factored import (
    ChainProgram,
    ClusterGradients,
    ClusterMerge,
    FactoredUpdate,
    build_chain,
    build_cluster_merge,
    factored_update,
)
from tnpeft.program.kernels import is_lasting, versions
from tnpeft.program.model import Program, build_program
from tnpeft.program.observers import needs_plain_ops, records_sizes, saved_tensors_are_hooked
from tnpeft.program.total import Constants, autocast_dtype, without_autocast

__all__ = [
    "BatchedCluster",
    "BatchedDelta",
    "ChainProgram",
    "Cluster",
    "ClusterGradients",
    "ClusterMerge",
    "ClusterProgram",
    "Constants",
    "FactoredUpdate",
    "Geometry",
    "LayerClusters",
    "Program",
    "Weight",
    "autocast_dtype",
    "build_chain",
    "build_cluster_merge",
    "build_clusters",
    "build_program",
    "convolve",
    "factored_update",
    "is_lasting",
    "needs_plain_ops",
    "records_sizes",
    "saved_tensors_are_hooked",
    "versions",
    "weight_of",
    "without_autocast",
]
