"""Reading LyCORIS's (and kohya's) adapters: LoCon, LoHa and LoKr, one alpha for each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from tnpeft.io.files import refuse
from tnpeft.io.foreign.names import underscored
from tnpeft.io.foreign.parts import Foreign, Part
from tnpeft.io.foreign.slots import Slots, loha_part, lokr_part, lora_part
from tnpeft.io.foreign.source import Source, clip_key, unsupported
from tnpeft.network import layer_of
from tnpeft.surgery import layer_problem

__all__ = ["read_lycoris"]

_SLOT = re.compile(
    r"(?P<module>.+)\.(?P<slot>alpha|dora_scale|lora_(up|down|mid)\.weight|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?)"
)
_METHODS = {"lora": lora_part, "hada": loha_part, "lokr": lokr_part}


def read_lycoris(source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> Foreign:
    """The parts by layer. Raises AdapterFileError."""
    found = {key: _SLOT.fullmatch(key) for key in source.tensors}
    unknown = [key for key, match in found.items() if match is None]
    if unknown or not found:
        raise unsupported(source.path, unknown)
    layers = underscored(
        dict.fromkeys(match["module"] for match in found.values() if match),
        (name for name, module in modules.items() if module._parameters),
    )
    slots: dict[str, Slots] = {}
    methods: dict[str, set[str]] = {}
    for key, match in found.items():
        assert match is not None
        name = _module(source, key, layers[match["module"]], modules)
        method, _, slot = match["slot"].removesuffix(".weight").rpartition("_") if _is_lora(match) else _split(match)
        slots.setdefault(name, Slots(source.path, name)).add(slot, key, source.tensors[key])
        if method:
            methods.setdefault(name, set()).add(method)
    return Foreign({name: _part(slots[name], methods.get(name, set()), modules[name]) for name in slots})


def _is_lora(match: re.Match[str]) -> bool:
    return match["slot"].startswith("lora_")


def _split(match: re.Match[str]) -> tuple[str, str, str]:
    """`hada_w1_a` → hada and w1_a; `alpha` belongs to every method."""
    slot = match["slot"]
    method, line, rest = slot.partition("_")
    return (method, line, rest) if method in _METHODS else ("", "", slot)


def _module(source: Source, key: str, found: str | tuple[str, ...] | None, modules: Mapping[str, nn.Module]) -> str:
    fix = "Load the file onto the model it was made for."
    what = f"tensor '{clip_key(key)}'"
    if found is None:
        raise refuse(source.path, what, "a layer of this model, its `.` written as `_`", "no such layer", fix)
    if isinstance(found, tuple):
        several = " and ".join(f"'{name}'" for name in found)
        fix = "Rename one of the two in the model."
        raise refuse(source.path, what, "one layer of this model", f"{several}, which are written alike", fix)
    if problem := layer_problem(found, modules[found]):
        raise refuse(source.path, f"layer '{found}', {problem.what}", problem.expected, problem.found, problem.fix)
    return found


def _part(slots: Slots, methods: set[str], module: nn.Module) -> Part:
    fix = "The file is incomplete: copy it again, or save the adapter once more."
    if len(methods) != 1:
        found = " and ".join(sorted(methods)) or f"`{next(iter(slots.tensors))}` alone"
        raise slots.refuse("tensors", "those of one method", found, fix)
    (method,) = methods
    if slots.get("t1") is not None and method == "lokr":
        raise slots.refuse("`lokr_t1`", "no such tensor", "one", "LyCORIS reads none either: remove it.")
    layer = layer_of(module)
    part = _METHODS[method](slots, layer, _scale(slots))
    magnitude = slots.get("dora_scale")
    if magnitude is None:
        return part
    if magnitude.numel() != layer.out_channels or magnitude.shape[0] != layer.out_channels:
        fix = "LyCORIS's `wd_on_out=False` is not in the language of specs: merge it there."
        expected = f"one number for each of {layer.out_channels} output channels"
        raise slots.refuse("`dora_scale`", expected, f"the shape {tuple(magnitude.shape)}", fix)
    return replace(part, magnitude=magnitude.flatten())


def _scale(slots: Slots) -> Callable[[int | None], float]:
    """alpha / rank; an alpha of 0, or none, means the rank. LoKr's two whole factors are not scaled."""
    alpha = slots.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not bool(alpha.isfinite())):
        raise slots.refuse("`alpha`", "one finite number", f"{alpha.flatten()[:4].tolist()}", "Mend or remove it.")

    def scale(rank: int | None) -> float:
        value = 0.0 if alpha is None else float(alpha)
        return value / rank if rank and value else 1.0

    return scale
