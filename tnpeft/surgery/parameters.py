"""Parameters that carry adapters beside layers: which can, their orientation, and the layers they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tnpeft.adapters.parked import LOOKUPS, ParameterLayer
from tnpeft.errors import Problem, clip
from tnpeft.execution import AdaptedParameter
from tnpeft.network import Layer
from tnpeft.network.look_alikes import kind_name, opaque
from tnpeft.network.orientation import ORIENTATIONS, orientation_of, oriented
from tnpeft.network.signature import kind_of
from tnpeft.surgery.checks import parts_problem, weight_problem
from tnpeft.surgery.tree import Slot, plain_modules, slots

__all__ = [
    "bases_of",
    "known_orientation",
    "parameter_layer",
    "parameter_problem",
    "standing",
    "table_layer",
]

_KNOWN: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.RNNBase, ("weight_ih", "weight_hh", "weight_hr")),
    (nn.RNNCellBase, ("weight_ih", "weight_hh")),
)
"""Classes of torch whose parameters of these names, or that begin so, are stored as `o i`."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def known_orientation(slot: Slot) -> str | None:
    """The orientation of a parameter whose owner is known."""
    known = any(isinstance(slot.owner, owner) and slot.key.startswith(keys) for owner, keys in _KNOWN)
    return "o i" if known else None


def standing(slot: Slot) -> ParameterLayer | None:
    """The layer that stands for a parameter which is adapted already, or None."""
    for module in slot.owner._modules.values():
        if isinstance(module, AdaptedParameter) and module.base.key == slot.key:
            return module.base
    return None


def parameter_layer(slot: Slot, signature: Any) -> ParameterLayer:
    """The layer that stands for a parameter: the one that is adapted already, or a new one."""
    known = standing(slot)
    fits = known is not None and known.signature == signature
    return known if known is not None and fits else ParameterLayer(slot.owner, slot.key, signature)


def table_layer(name: str, embedding: Any) -> ParameterLayer:
    """The layer that stands for an embedding: its inputs are one-hot rows, its outputs the rows' vectors."""
    slot = Slot(f"{name}.weight", embedding, "_parameters", "weight")
    return parameter_layer(slot, oriented(slot.tensor.shape, "i o"))


def bases_of(root: nn.Module, signatures: Mapping[str, Layer | None]) -> dict[str, nn.Module | ParameterLayer]:
    """The bases of adapters, by name: layers, and parameters with the given signatures."""
    modules = plain_modules(root)
    known = slots(root) if signatures.keys() - modules.keys() else {}
    bases: dict[str, nn.Module | ParameterLayer] = {}
    made: dict[tuple[int, str], ParameterLayer] = {}  # an owner that is reached by two names has one
    for name, signature in signatures.items():
        module = modules.get(name)
        if module is not None and not isinstance(module, LOOKUPS):
            bases[name] = module
        elif module is not None or (name in known and signature is not None):
            base = table_layer(name, module) if module is not None else parameter_layer(known[name], signature)
            bases[name] = made.setdefault((id(base.owner), base.key), base)
    return bases


def parameter_problem(slot: Slot, orientation: str | None) -> Problem | None:
    """Why a parameter cannot carry an adapter, or None if it can."""
    where = f"parameter '{slot.name}'"
    problem = _owner_problem(slot) or _tensor_problem(slot) or orientation_problem(slot, orientation)
    return None if problem is None else Problem(problem.what, problem.expected, problem.found, problem.fix, where)


def _owner_problem(slot: Slot) -> Problem | None:
    kind: type = type(slot.owner)
    owner = slot.name.rpartition(".")[0]
    found = f"that of the layer '{owner}'"
    if slot.key == "weight" and (kind_of(slot.owner) or opaque(kind) or isinstance(slot.owner, LOOKUPS)):
        return Problem("its owner", "no layer that can be adapted", found, f"Match '{owner}' as a layer (`match`).")
    if isinstance(slot.owner, (*_CONTAINERS, torch.jit.ScriptModule)):
        fix = "Hold the parameter in a module with a `forward` of its own."
        return Problem("its owner", "a module that a submodule can be added to", f"a {kind_name(kind)}", fix)
    return None


def _tensor_problem(slot: Slot) -> Problem | None:
    tensor: Any = slot.tensor
    if is_lazy(tensor):
        return Problem("its shape", "a known one", "none yet", "Run the model once, then attach.")
    if problem := parts_problem(slot.owner, [slot.key]):
        return replace(problem, what="its values")
    if tensor.ndim not in (2, 3):
        fix = "Match other parameters."
        return Problem("its axes", "2 (outputs and inputs), or 3 (a stack)", str(tensor.ndim), fix)
    return weight_problem(tensor)


def orientation_problem(slot: Slot, orientation: str | None) -> Problem | None:
    """Why an orientation does not fit a parameter."""
    shape = tuple(slot.tensor.shape)
    known = standing(slot)
    if known is not None and orientation not in (None, orientation_of(known.signature)):
        expected = f"`{orientation_of(known.signature)}`, as other adapters have it"
        fix = "Give it the same way round, or detach the other adapters first."
        return Problem("its orientation", expected, f"`{orientation}`", fix)
    fits = [each for each in ORIENTATIONS if len(each.split()) == len(shape)]
    if orientation in fits:
        return None
    expected = " or ".join(f"`{each}`" for each in fits) + f" for the shape {shape}"
    fix = f"Say which of its axes are outputs (`o`) and inputs (`i`): `parameters: {{'{slot.name}': {fits[0]}}}`."
    return Problem("its orientation", expected, "none" if orientation is None else clip(orientation), fix)
