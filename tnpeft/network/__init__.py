"""A spec bound to a layer: a bipartite graph of cores and indices with every size known."""

from tnpeft.network.bind import param_problems
from tnpeft.network.layer import Layer
from tnpeft.network.model import BoundCore, BoundInit, BoundTerm, Network
from tnpeft.network.signature import layer_of
from tnpeft.network.spec import Spec, load_spec

__all__ = ["BoundCore", "BoundInit", "BoundTerm", "Layer", "Network", "Spec", "layer_of", "load_spec", "param_problems"]
