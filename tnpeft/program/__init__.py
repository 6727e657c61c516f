"""From a plan to a program: pairwise contractions that are laid out once and run on tensors."""

from tnpeft.program.autocast import autocast_dtype, without_autocast
from tnpeft.program.clusters import BatchedCluster, Cluster, ClusterProgram, LayerClusters, build_clusters
from tnpeft.program.convolution import Geometry, convolve
from tnpeft.program.counts import counting
from tnpeft.program.delta import Delta, Program, Starts, Weight, build_program
from tnpeft.program.factored import (
    ChainProgram,
    ClusterGradients,
    ClusterMerge,
    FactoredUpdate,
    HybridLinear,
    build_chain,
    build_cluster_merge,
    chain_dtype,
    factored_update,
)
from tnpeft.program.kernels import is_lasting, versions
from tnpeft.program.observers import (
    needs_plain_ops,
    records_sizes,
    saved_tensor_hooks,
    saved_tensors_are_hooked,
    without_inference_gradients,
)

__all__ = [
    "BatchedCluster",
    "ChainProgram",
    "Cluster",
    "ClusterGradients",
    "ClusterMerge",
    "ClusterProgram",
    "Delta",
    "FactoredUpdate",
    "Geometry",
    "HybridLinear",
    "LayerClusters",
    "Program",
    "Starts",
    "Weight",
    "autocast_dtype",
    "build_chain",
    "build_cluster_merge",
    "build_clusters",
    "build_program",
    "chain_dtype",
    "convolve",
    "counting",
    "factored_update",
    "is_lasting",
    "needs_plain_ops",
    "records_sizes",
    "saved_tensor_hooks",
    "saved_tensors_are_hooked",
    "versions",
    "without_autocast",
    "without_inference_gradients",
]
