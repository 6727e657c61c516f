"""The forms of PEFT's folders beside its layers: embeddings, parameters, and modules that are saved whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from tnpeft.adapters.base_weight import never_called
from tnpeft.adapters.distributed import whole
from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import Problem, listed
from tnpeft.io.foreign.formats import MERGE
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.peft_places import WRAPPED, is_turned
from tnpeft.network import Layer

__all__ = [
    "as_peft_has_it",
    "form_problems",
    "is_table",
    "names_of_parameters",
    "saved_modules",
    "tensors_of",
    "written_names",
]

_UNCALLED = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""What PEFT cannot save whole: nobody calls it."""


def is_table(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an adapter of this name stands on an embedding."""
    return isinstance(modules.get(name), LOOKUPS)


def names_of_parameters(parts: Mapping[str, LayerUpdate], modules: Mapping[str, nn.Module]) -> list[str]:
    """The parts that stand on parameters."""
    return [name for name in parts if name not in modules]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def written_names(
    names: Collection[str], parts: Mapping[str, LayerUpdate], modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """The modules' names in PEFT's keys, of parts and of other names: behind the wrappers of the parameters' owners.

    For a part that stands on a parameter it is its wrapper: the last one of an owner is the outermost.
    """
    owned: dict[str, list[str]] = {}
    for name in names_of_parameters(parts, modules):
        owned.setdefault(_owner(name), []).append(name)
    for owner, those in owned.items():
        order = [f"{owner}.{key}" for key in modules[owner]._parameters]
        those.sort(key=order.index)
    written: dict[str, str] = {}
    for name in names:
        inner = name
        for owner, those in owned.items():
            if name in those:
                inner = owner + WRAPPED * (len(those) - 1 - those.index(name))
            elif name.startswith(f"{owner}."):
                inner = owner + WRAPPED * len(those) + name[len(owner) :]
        written[name] = inner
    return written


def as_peft_has_it(part: LayerUpdate, layer: Layer, owner: nn.Module) -> LayerUpdate:
    """The cores of a parameter's update in PEFT's orientation; those of a stack in one matrix each."""
    up, down = part.tensors["up"], part.tensors["down"]
    if layer.turned != is_turned(layer.stored_shape, owner):
        up, down = down.mT, up.mT
    if layer.slices:
        down = down.reshape(-1, down.shape[-1])  # (e, r, i) to (e r, i)
        up = up.permute(1, 2, 0).reshape(up.shape[1], -1)  # (e, o, r) to (o, r e)
    return replace(part, tensors={"up": up, "down": down})


def form_problems(
    parts: Mapping[str, LayerUpdate],
    layers: Mapping[str, Layer],
    modules: Mapping[str, nn.Module],
    parameters: Collection[str],
) -> Iterator[Problem]:
    """Why PEFT cannot hold adapters of embeddings and parameters; `parameters` are all names of parameters."""
    those = names_of_parameters(parts, modules)
    owners = {_owner(name) for name in those}
    for name, part in parts.items():
        if is_table(name, modules):
            kind = type(modules[name]).__name__
            if part.topology != "lora" or isinstance(modules[name], nn.EmbeddingBag):
                found = f"{part.topology} on {kind}"
                yield Problem("PEFT's embeddings", "LoRA on an `nn.Embedding`", found, MERGE, f"layer '{name}'")
        elif name in modules:
            if found := never_called(modules[name]) or "":
                expected = "a layer that is called: its LoRA has no effect on others"
                yield Problem("PEFT's layers", expected, found, MERGE, f"layer '{name}'")
        elif fault := _parameter_fault(name, part, layers[name], modules, owners, parameters):
            yield Problem("PEFT's `target_parameters`", *fault, MERGE, f"parameter '{name}'")
    turned = [name for name in parts if name in modules and not is_table(name, modules) and layers[name].turned]
    if those and turned:
        expected = "none beside layers that are stored the other way round"
        yield Problem("PEFT's `target_parameters`", expected, f"'{those[0]}' beside '{turned[0]}'", MERGE)


def _parameter_fault(
    name: str,
    part: LayerUpdate,
    layer: Layer,
    modules: Mapping[str, nn.Module],
    owners: Collection[str],
    parameters: Collection[str],
) -> tuple[str, str] | None:
    """What PEFT expects of an adapted parameter, and what is found instead."""
    owner = _owner(name)
    if part.topology != "lora" or part.magnitude is not None:
        return "LoRA without magnitudes", "DoRA" if part.magnitude is not None else part.topology
    if not owner:
        return "a parameter of a module inside the model", "one of the model itself"
    if outer := next((other for other in owners if owner.startswith(f"{other}.")), None):
        return "owners that do not hold each other", f"one inside of '{outer}', which owns others"
    if more := [other for other in parameters if other.endswith(f".{name}")]:
        return "a name that no longer one ends with", f"also {listed(more)}"
    transposed = layer.slices == 1 and getattr(modules[owner], "is_transposed", False)
    if transposed and layer.in_channels != layer.out_channels:
        return "several slices of (inputs, outputs)", "one, which it adds the wrong way round"
    return None


def saved_modules(
    names: Collection[str], parts: Mapping[str, LayerUpdate], modules: Mapping[str, nn.Module]
) -> tuple[list[str], list[Problem]]:
    """The modules that PEFT must save whole to save some tensors, and why it cannot.

    PEFT takes every module whose name ends with one of these, with or without a dot before it.
    """
    causes = {_owner(name): _owner(name) for name in names}  # of each module, the one that is meant
    more = dict(causes)
    while more:
        ends = tuple(name for name in more if name)
        ending = (other for other in modules if other.endswith(ends) and other not in causes) if ends else ()
        more = {other: next(name for name in more if name and other.endswith(name)) for other in ending}
        causes |= more
    outermost = sorted(name for name in causes if not any(name.startswith(f"{other}.") for other in causes if other))
    faults = {name: _fault_of_saved(name, parts, modules) for name in outermost}
    expected = "a module of its own, which nothing else adapts"
    problems = []
    for name, fault in faults.items():
        if fault is not None:
            also = "" if causes[name] == name else f", and PEFT takes each whose name ends with '{causes[name]}'"
            problems.append(Problem("PEFT's `modules_to_save`", expected, fault + also, MERGE, f"module '{name}'"))
    return outermost, problems


def _fault_of_saved(name: str, parts: Mapping[str, LayerUpdate], modules: Mapping[str, nn.Module]) -> str | None:
    """Why a module cannot be saved whole."""
    if isinstance(modules[name], _UNCALLED):
        return f"a {type(modules[name]).__name__}, which nobody calls"
    if not name:
        return "the model itself"
    owners = {_owner(part) for part in names_of_parameters(parts, modules)}
    inside = [part for part in parts if part == name or part.startswith(f"{name}.")]
    around = [owner for owner in owners if name.startswith(f"{owner}.")]
    return f"one with an adapter on '{(inside or around)[0]}'" if inside or around else None


def tensors_of(saved: Collection[str], trained: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of the modules that are saved whole, as they were trained or as the base has them."""
    inside = [name for name in base if any(name.startswith(f"{module}.") for module in saved)]
    return {name: trained[name] if name in trained else _on_cpu(base[name]) for name in inside}


def _on_cpu(tensor: Tensor) -> Tensor:
    """All of a tensor's values, where there are any."""
    tensor = whole(tensor.detach())
    return tensor if tensor.device.type == "meta" else tensor.cpu()
