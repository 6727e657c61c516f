"""What an adapter file holds and needs, without a model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tnpeft.documents.recognise import recognise
from tnpeft.errors import AdapterFileError, clip
from tnpeft.io.checks import number_problem
from tnpeft.io.files import FOREIGN, file_path, read, refuse, safetensors_of, specs_of
from tnpeft.io.foreign.archive import COPY_AGAIN
from tnpeft.io.foreign.source import HEADER, Source, open_source, tensors_of, weights_of
from tnpeft.io.inspection import InspectedLayer, Inspection
from tnpeft.io.manifest import FITTED_AS, FORMAT, LayerEntry, Manifest, dtype_name
from tnpeft.network import Spec
from tnpeft.recipe.report import reasons_of
from tnpeft.surgery import AdapterRecord

__all__ = ["inspect"]

_METHODS = {"lora": "LoRA", "hada": "LoHa", "loha": "LoHa", "lokr": "LoKr", "tenvoo": "TenVOO", "quanta": "QuanTA"}
_SLOT = re.compile(
    r"(?P<layer>.+?)\.(?P<slot>(?P<method>lora|hada|loha|lokr|tenvoo|quanta)_.*|alpha|dora_scale|w_norm|diff|diff_b)"
)
# The factors of a LoRA update, the one that meets the input first, and all whose first axis is a rank.
_FACTORS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_embedding_A", "lora_embedding_B"))
_SECOND = (*(down for down, _ in _FACTORS), "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
# What an adapted model's state dict has beside the base's tensors, and whose it is.
_CORE = re.compile(
    r"(?:.+\.)?(?:adapters\._?(?P<name>[^.]+)\.(?:core|start|dora)_[^.]+|_tnpeft_of_(?P<of>[^.:]+):[^.]+)"
)
_CONFIG = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "alpha",
    "target_modules",
    "target_parameters",
    "modules_to_save",
)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """What an adapter file holds and needs: tnpeft's own, PEFT's folder, a LyCORIS file, the TenVOO paper's `.pth`.

    No model is needed. Of other safetensors and torch files the tensors are listed. No code of a file is run, and a
    safetensors checkpoint is not read whole. Raises AdapterFileError for what is none of these, or damaged.
    """
    path = file_path(path)
    kind = recognise(path)
    if kind is not None and kind.name == "adapter":
        return _of_ours(path)
    if kind is not None and kind.name == "text" and path.suffix in (".yaml", ".yml"):
        fix = "`tnpeft show` shows a spec, `tnpeft check` checks it."
        raise refuse(path, "adapter file", "a complete safetensors or torch file", "a text file", fix)
    if kind is not None and kind.name == "safetensors":
        headed = _headed(path)
        if not any(_SLOT.fullmatch(key) for key in headed):
            return _of_checkpoint(path, headed)
    try:
        source = open_source(path, None)
    except AdapterFileError as error:
        if kind is None or kind.name not in ("safetensors", "torch"):
            raise
        tensors, *_ = tensors_of(path)  # raises where it is no file of tensors at all
        adapts = any(_SLOT.fullmatch(key) for key in tensors)
        problems = tuple(map(str, error.problems)) if adapts else ()
        return _of_checkpoint(path, _tensors_of(tensors), problems)
    return _of_foreign(path, source)


def _of_ours(path: Path) -> Inspection:
    manifest, tensors = read(path)
    specs = specs_of(path, manifest)
    layers = tuple(_layers(path, manifest, specs, tensors))
    record = AdapterRecord(manifest.name, tuple(manifest.layers), manifest.trained, manifest.statistics, manifest.about)
    problem = number_problem(tensors, manifest.layers)
    settings = {
        "name": manifest.name,
        "scale": manifest.scale,
        "specs": [spec.name for spec in specs],
        "language": sorted({spec.version for spec in specs}),
        "library": f"tnpeft {manifest.library}",
        "file_format": FORMAT if "digests" in manifest.model_fields_set else f"before {FORMAT}",
        "statistics": [names[0] for names in manifest.statistics],
    }
    return Inspection(
        str(path),
        "tnpeft",
        path.stat().st_size,
        sum(tensor.numel() for tensor in tensors.values()),
        sum(layer.trained for layer in layers)
        + sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("trained.")),
        layers,
        {key: value for key, value in settings.items() if value != []},
        {reason: tuple(names) for reason, names in reasons_of(record).items()},
        {},
        {name: str(entry) for name, entry in manifest.base.items()},
        _digest({name: entry.model_dump(mode="json") for name, entry in manifest.base.items()}),
        _digest(manifest.digests) if manifest.digests else None,
        () if problem is None else (str(problem),),
        _counted(dtype_name(tensor.dtype) for tensor in tensors.values()),
    )


def _layers(
    path: Path, manifest: Manifest, specs: list[Spec], tensors: Mapping[str, Tensor]
) -> Iterator[InspectedLayer]:
    keys: dict[str, dict[str, Tensor]] = {layer: {} for layer in manifest.layers}
    for key, tensor in tensors.items():
        owner = key.removeprefix("layers.").rpartition(".")[0]  # no core's name has a dot
        if key.startswith("layers.") and owner in keys:
            keys[owner][key.rpartition(".")[2]] = tensor
    for name, entry in manifest.layers.items():
        if entry.spec not in range(len(specs)):
            raise refuse(path, "metadata", "that of an adapter", f"a layer {clip(name)} without a spec", FOREIGN)
        yield _layer(manifest, name, entry, specs[entry.spec], keys[name])


def _layer(
    manifest: Manifest, name: str, entry: LayerEntry, spec: Spec, tensors: Mapping[str, Tensor]
) -> InspectedLayer:
    cores = {f"core_{core.name}" for core in spec.cores if not core.frozen} | {"dora_magnitude"}
    trained = sum(tensor.numel() for key, tensor in tensors.items() if key in cores)
    weight = manifest.base.get(f"{name}.weight", manifest.base.get(name))
    return InspectedLayer(
        name,
        spec.name,
        entry.params,
        None if weight is None else weight.shape,
        trained,
        sum(tensor.numel() for tensor in tensors.values()) - trained,
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        entry.mode,
        entry.choices,
        tuple(entry.drawn),
        manifest.digests.get(f"{name}.weight", manifest.digests.get(name)),
        _fitted_as(manifest, name),
    )


def _fitted_as(manifest: Manifest, name: str) -> str | None:
    told = manifest.about.get(FITTED_AS)
    found = told.get(name) if isinstance(told, Mapping) else None
    return clip(found)[1:-1] if isinstance(found, str) else None


def _of_foreign(path: Path, source: Source) -> Inspection:
    configs = source.headers if source.config is None else {"": source.config}
    settings = {
        f"{prefix}{key}": config[key] for prefix, config in configs.items() for key in _CONFIG if _says(config.get(key))
    }
    tensors = _tensors_of(source.tensors)
    if source.format == "diffusers" and not configs and not any(map(_is_alpha, tensors)):
        settings["alpha"] = "not told: the rank"
    return _of_source(path, source.format, tensors, settings)


def _of_checkpoint(path: Path, tensors: Mapping[str, _Tensor], problems: tuple[str, ...] = ()) -> Inspection:
    """A state dict: of a base, of an adapted model, or of what adapters add to it (a Trainer's without the base)."""
    found = [match for key in tensors if (match := _CORE.fullmatch(key))]
    names = list(dict.fromkeys(match["name"] or match["of"] for match in found))
    whole = len(found) < len(tensors)
    if names:
        how = "on a model with the same adapters attached, `load_state_dict`"
        how = how if whole else how.replace("`load_state_dict`", "`load_state_dict(..., strict=False)`")
        return _of_source(path, "checkpoint" if whole else "cores", tensors, {"adapters": names, "to_load_it": how})
    return _of_source(path, "checkpoint", tensors, {}, problems)


def _says(value: object) -> bool:
    return value is not None and value != [] and not (isinstance(value, float) and not math.isfinite(value))


class _Tensor(NamedTuple):
    """What is told of a tensor; `alpha` is the value of one that is a layer's alpha."""

    shape: tuple[int, ...]
    dtype: str
    alpha: float | None = None


def _of_source(
    path: Path,
    kind: str,
    tensors: Mapping[str, _Tensor],
    settings: Mapping[str, Any],
    problems: tuple[str, ...] = (),
) -> Inspection:
    slots: dict[str, dict[str, _Tensor]] = {}
    methods: dict[str, str] = {}
    others: dict[str, tuple[int, ...]] = {}
    for key, tensor in tensors.items():
        match = _SLOT.fullmatch(key)
        if match is None:
            others[key] = tensor.shape
            continue
        slots.setdefault(match["layer"], {})[match["slot"]] = tensor
        if match["method"]:
            methods.setdefault(match["layer"], _METHODS[match["method"]])
    layers = tuple(_foreign_layer(name, methods.get(name), found) for name, found in slots.items())
    weights = weights_of(path)
    return Inspection(
        str(path),
        kind,
        weights.stat().st_size,
        _elements(tensor.shape for tensor in tensors.values()),
        sum(layer.trained for layer in layers),
        layers,
        settings,
        others=others,
        problems=problems,
        dtypes=_counted(tensor.dtype for tensor in tensors.values()),
        metadata=_metadata(weights),
    )


def _foreign_layer(name: str, method: str | None, tensors: Mapping[str, _Tensor]) -> InspectedLayer:
    shapes = {slot: tensor.shape for slot, tensor in tensors.items()}
    dora = any("dora_scale" in slot or "magnitude" in slot for slot in shapes)
    spec = (method or "a full update") + " with DoRA" * dora
    into = {slot.split(".")[0]: shape for slot, shape in shapes.items() if len(shape) > 1}
    params: dict[str, float] = {}
    if ranks := {into[slot][0] for slot in _SECOND if slot in into}:
        params["r"] = min(ranks)
    if (alpha := tensors.get("alpha")) is not None and alpha.alpha is not None:
        params["alpha"] = alpha.alpha
    weight = next(((*into[up][:1], *into[down][1:]) for down, up in _FACTORS if {down, up} <= into.keys()), None)
    if "lora_mid" in into:  # a core between the two has the kernel
        weight = None
    frozen = _elements(shape for slot, shape in shapes.items() if "weights2" in slot)
    trained = _elements(shape for slot, shape in shapes.items() if slot != "alpha") - frozen
    return InspectedLayer(name, spec, params, weight or shapes.get("diff"), trained, frozen, shapes)


def _tensors_of(tensors: Mapping[str, Tensor]) -> dict[str, _Tensor]:
    return {
        key: _Tensor(tuple(tensor.shape), dtype_name(tensor.dtype), _number(tensor) if _is_alpha(key) else None)
        for key, tensor in tensors.items()
    }


def _is_alpha(key: str) -> bool:
    return key.rpartition(".")[2] == "alpha"


def _number(tensor: Tensor) -> float | None:
    """The value of a tensor that holds one finite number."""
    value = float(tensor) if tensor.numel() == 1 else math.nan
    return value if math.isfinite(value) else None


def _headed(path: Path) -> dict[str, _Tensor]:
    """What the header of a safetensors file tells; no tensor is read."""
    with safetensors_of(path, damaged=COPY_AGAIN) as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        return {
            key: _Tensor(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype().lower()))
            for key, part in parts.items()
        }


def _metadata(path: Path) -> dict[str, str]:
    """The texts in a file's header that say something of their own."""
    kind = recognise(path)
    if kind is None or kind.name != "safetensors":
        return {}
    with safetensors_of(path, damaged=COPY_AGAIN) as file:
        texts = file.metadata() or {}
    return {key: texts[key] for key in sorted(texts) if key not in ("format", HEADER)}


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _counted(names: Iterable[str]) -> dict[str, int]:
    """How often each name is there, the most frequent first."""
    return dict(Counter(names).most_common())


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
