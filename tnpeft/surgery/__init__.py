"""Putting compiled adapters on a model, switching them and taking them off.

Every name is that of the plain model, as if nothing were adapted (`plain_modules`,
`plain_parameters`). An attach is

    modules = plain_modules(model)              # "" and every name a module is reached by
    layer_problem(name, modules[name])          # a Problem where a layer cannot be adapted, else None
    adapter = Adapter(spec.bind(modules[name], **params), modules[name], seed=seed, name=name, mode=mode)
    install(model, "default", {name: adapter}, trained=["conv.bias"], about={"recipe": ...})

and `names_of`, `scales_of`, `record_of`, `adapters_of`, `trained_of`, `statistics_of` tell what is attached.
They and the switches find the adapted model inside wrappers such as DistributedDataParallel.
"""

from tnpeft.surgery.adapted_model import AdaptedModel, AdapterRecord, adapted, find
from tnpeft.surgery.anchor import anchor
from tnpeft.surgery.checks import SUPPORTED, is_layer, is_opaque, layer_problem, model_problems
from tnpeft.surgery.detach import detach
from tnpeft.surgery.install import install, replace_adapters
from tnpeft.surgery.passes import accumulating
from tnpeft.surgery.queries import (
    adapters_of,
    base_tensors,
    layers_of,
    names_of,
    parameter_groups,
    plain_keys,
    plain_state_dict,
    record_of,
    scales_of,
    statistics_of,
    trained_of,
)
from tnpeft.surgery.refill import refill
from tnpeft.surgery.rows import rows
from tnpeft.surgery.serving import Served, serving
from tnpeft.surgery.switch import activate, base_shown, disabled, merge, scale_problem, unmerge
from tnpeft.surgery.trained import norm_statistics
from tnpeft.surgery.tree import plain_modules, plain_name, plain_parameters

__all__ = [
    "SUPPORTED",
    "AdaptedModel",
    "AdapterRecord",
    "Served",
    "accumulating",
    "activate",
    "adapted",
    "adapters_of",
    "anchor",
    "base_shown",
    "base_tensors",
    "detach",
    "disabled",
    "find",
    "install",
    "is_layer",
    "is_opaque",
    "layer_problem",
    "layers_of",
    "merge",
    "model_problems",
    "names_of",
    "norm_statistics",
    "parameter_groups",
    "plain_keys",
    "plain_modules",
    "plain_name",
    "plain_parameters",
    "plain_state_dict",
    "record_of",
    "refill",
    "replace_adapters",
    "rows",
    "scale_problem",
    "scales_of",
    "serving",
    "statistics_of",
    "trained_of",
    "unmerge",
]
