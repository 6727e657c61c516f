"""Reading LyCORIS's (and kohya's) adapters: LoCon, LoHa and LoKr, an alpha for each layer, and what else trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tnpeft.io.foreign.beside import with_biases
from tnpeft.io.foreign.formats import INCOMPLETE, MADE_FOR, PEFT_SLOTS, clip_key, unsupported
from tnpeft.io.foreign.key_names import check_layers, underscored, where_to_load
from tnpeft.io.foreign.layer_tensors import LayerTensors, tensors_of_layer, update_of, wide
from tnpeft.io.foreign.layer_update import Foreign, LayerUpdate
from tnpeft.io.foreign.source import Source
from tnpeft.network import layer_of

__all__ = ["read_lycoris"]

_SLOT = re.compile(
    r"(?P<module>.+)\.((?P<method>lora|hada|lokr)_(?P<slot>up|down|mid|[wt][12](_[ab])?)(\.weight)?"
    r"|(?P<peft>lora_(A|B|magnitude_vector))(\.(?!weight$|bias$)\w+)?(?P<leaf>\.weight|\.bias)?"
    r"|(?P<beside>alpha|dora_scale)|(?P<trained>[wb]_norm|diff(_b)?))"
)
# Blocks of Stable Diffusion's and Flux's own code, which diffusers calls otherwise.
_ORIGINAL = ("input_blocks", "middle_block", "output_blocks", "joint_blocks", "double_blocks", "single_blocks")
_TRAINED = {"w_norm": "weight", "b_norm": "bias", "diff": "weight", "diff_b": "bias"}  # what is added to which


def read_lycoris(source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> Foreign:
    """The parts by layer, and norms and whole layers that trained too. Raises AdapterFileError."""
    found = {key: match for key in source.tensors if (match := _SLOT.fullmatch(key))}
    if len(found) < len(source.tensors) or not found:
        raise unsupported(source.path, [source.called(key) for key in source.tensors if key not in found])
    layers = underscored(
        dict.fromkeys(match["module"] for match in found.values()),
        (name for name, module in modules.items() if module._parameters),
        source.place,
    )
    slots: dict[str, LayerTensors] = {}
    methods: dict[str, set[str]] = {}
    trained: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for key, match in found.items():
        name, tensor = _module(source, key, match["module"], layers[match["module"]], modules), source.tensors[key]
        if match["trained"]:
            parameter = f"{name}.{_TRAINED[match['trained']]}"
            trained[parameter] = _sum(source, key, tensor, parameter, parameters)
            continue
        if match["leaf"] == ".bias":
            biases[name] = wide(source.path, source.called(key), tensor)
            continue
        slot = PEFT_SLOTS[match["peft"]] if match["peft"] else match["slot"] or match["beside"]
        tensors_of_layer(slots, source.path, name, match["module"]).add(slot, source.called(key), tensor)
        methods.setdefault(name, set()).update({"lora" if match["peft"] else match["method"]} - {None})
    check_layers(source, slots, modules)
    parts = {name: _part(slots[name], methods[name], modules[name]) for name in slots}
    return Foreign(parts, trained | with_biases(source, parts, biases, trained, parameters))


def _sum(source: Source, key: str, change: Tensor, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """A parameter of the base model with its change, which is what the file stores."""
    base, change = parameters.get(name), wide(source.path, source.called(key), change)
    if base is None or base.shape != change.shape:
        found = "none" if base is None else f"{tuple(base.shape)}"
        what = f"tensor '{clip_key(source.called(key))}', of the parameter '{name}'"
        raise source.refuse(what, f"{tuple(change.shape)}", found, MADE_FOR)
    return base.detach().cpu().to(torch.promote_types(base.dtype, change.dtype)) + change


def _module(source: Source, key: str, written: str, found: str | tuple[str, ...] | None, modules: Iterable[str]) -> str:
    fix = MADE_FOR
    what = f"tensor '{clip_key(source.called(key))}'"
    if found is None:
        if any(name in key for name in _ORIGINAL) and not any(
            name in module for name in _ORIGINAL for module in modules
        ):
            fix = "It has the names of the original code: load it in diffusers, and save it with `save_lora_adapter`."
            raise source.refuse(what, "a layer of this model", "no such layer", fix)
        expected = "a layer of this model"
        if "." in written:
            fix = where_to_load(written, [module[len(source.place) :] for module in modules])
        else:
            expected += ", its `.` written as `_`"
        raise source.refuse(what, expected, "no such layer", fix)
    if isinstance(found, tuple):
        several = " and ".join(f"'{name}'" for name in found)
        fix = "Rename one of the two in the model."
        raise source.refuse(what, "one layer of this model", f"{several}, which are written alike", fix)
    return found


def _part(slots: LayerTensors, methods: set[str], module: nn.Module) -> LayerUpdate:
    if len(methods) != 1:
        found = " and ".join(sorted(methods)) or f"`{next(iter(slots.tensors))}` alone"
        raise slots.refuse("tensors", "those of one method", found, INCOMPLETE)
    (method,) = methods
    if slots.tensors.get("t1") is not None and method == "lokr":
        raise slots.refuse("`lokr_t1`", "no such tensor", "one", "LyCORIS reads none either: remove it.")
    layer = layer_of(module)
    part = update_of("loha" if method == "hada" else method, slots, layer, _scale(slots))
    if slots.tensors.get("magnitude") is not None:
        return replace(part, magnitude=slots.need("magnitude").flatten())
    magnitude = slots.tensors.get("dora_scale")
    if magnitude is None:
        return part
    if magnitude.numel() != layer.out_channels or magnitude.shape[0] != layer.out_channels:
        fix = "LyCORIS's `wd_on_out=False` is not in the language of specs: merge it there."
        expected = f"one number for each of {layer.out_channels} output channels"
        raise slots.refuse("`dora_scale`", expected, f"the shape {tuple(magnitude.shape)}", fix)
    return replace(part, magnitude=magnitude.flatten())


def _scale(slots: LayerTensors) -> Callable[[int | None], float]:
    """alpha / rank; an alpha of 0, or none, means the rank. LoKr's two whole factors are not scaled."""
    alpha = slots.tensors.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not bool(alpha.isfinite())):
        raise slots.refuse("`alpha`", "one finite number", f"{alpha.flatten()[:4].tolist()}", "Mend or remove it.")

    def scale(rank: int | None) -> float:
        value = 0.0 if alpha is None else float(alpha)
        return value / rank if rank and value else 1.0

    return scale
