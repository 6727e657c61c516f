"""What an adapter file holds and needs, without a model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from tnpeft.documents.recognise import recognise
from tnpeft.errors import AdapterFileError, clip
from tnpeft.io.checks import number_problem
from tnpeft.io.files import FOREIGN, file_path, read, refuse, safetensors_of, specs_of
from tnpeft.io.foreign.archive import COPY_AGAIN
from tnpeft.io.foreign.source import Source, open_source, tensors_of, weights_of
from tnpeft.io.manifest import FORMAT, LayerEntry, Manifest
from tnpeft.network import Spec
from tnpeft.recipe.report import printed, reasons_of
from tnpeft.surgery import AdapterRecord

__all__ = ["COLUMNS", "InspectedLayer", "Inspection", "inspect"]

COLUMNS = {"layer": "left", "weight": "left", "spec": "left", "params": "left", "mode": "left"}
COLUMNS |= {"trains": "right", "frozen": "right"}
_FORMATS = {
    "tnpeft": "an adapter of tnpeft",
    "peft": "an adapter of PEFT",
    "diffusers": "an adapter of diffusers",
    "lycoris": "an adapter of LyCORIS",
    "kohya": "an adapter with kohya's names",
    "comfyui": "an adapter with ComfyUI's names",
    "tenvoo": "an adapter of the TenVOO paper's code",
    "cores": "what adapters of tnpeft add to a model's state dict, without the base",
    "checkpoint": "a checkpoint, not an adapter",
}
_METHODS = {"lora": "LoRA", "hada": "LoHa", "loha": "LoHa", "lokr": "LoKr", "tenvoo": "TenVOO", "quanta": "QuanTA"}
_SLOT = re.compile(
    r"(?P<layer>.+?)\.(?P<slot>(?P<method>lora|hada|loha|lokr|tenvoo|quanta)_.*|alpha|dora_scale|w_norm|diff|diff_b)"
)
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
_SHOWN = 6  # names in one line


@dataclass(frozen=True)
class InspectedLayer:
    """One adapted layer of a file.

    `spec` is the spec's name; for other libraries' files, the method's. `weight` is the shape of the base weight, which
    those files do not have. `trained` and `frozen` count elements in the file. `drawn` are cores that the seed gives
    again.
    """

    name: str
    spec: str
    params: Mapping[str, float]
    weight: tuple[int, ...] | None
    trained: int
    frozen: int
    tensors: Mapping[str, tuple[int, ...]]
    mode: str | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    digest: str | None = None

    @property
    def row(self) -> tuple[str, ...]:
        """Its cells in a table of layers."""
        params = " ".join(f"{name}={value:g}" for name, value in self.params.items())
        weight = "" if self.weight is None else " x ".join(map(str, self.weight))
        mode = (self.mode or "") + f" ({len(self.choices)} chosen)" * bool(self.choices)
        return self.name, weight, self.spec, params, mode, f"{self.trained:,}", f"{self.frozen:,}"


@dataclass(frozen=True)
class Inspection:
    """What a file holds: its format (one of `load_foreign`, "tnpeft", "cores" or "checkpoint"), layers and tensors.

    `elements` counts all of its numbers, `parameters` those that trained. `trained` has the parameters that trained
    beside the cores, by `bias`, `norm` and `also`. `others` are tensors of another library's file that belong to no
    layer's update, with their shapes. `base` names every tensor that a model must have to load the file, with type and
    shape. `fingerprint` is the SHA-256 of that list, `digest` that of the adapted weights' values.
    """

    path: str
    format: str
    bytes: int
    elements: int
    parameters: int
    layers: tuple[InspectedLayer, ...]
    settings: Mapping[str, Any]
    trained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    digest: str | None = None
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return asdict(self)

    @property
    def title(self) -> str:
        return f"{self.path}: {_FORMATS[self.format]}, {self.bytes:,} bytes"

    @property
    def facts(self) -> dict[str, str]:
        """What is printed along with the table of layers: a text for each heading."""
        facts = {name.replace("_", " "): _text(value) for name, value in self.settings.items()}
        if self.layers:
            facts["layers"] = f"{len(self.layers)}"
            facts["parameters"] = f"{self.parameters:,} train"
        facts |= {f"trained: {reason}": _names(names) for reason, names in self.trained.items() if names}
        if self.others:
            elements = sum(map(math.prod, self.others.values()))
            facts["other tensors"] = f"{len(self.others)}, {elements:,} elements: {_names(self.others)}"
        if self.base:
            tensors = _names(f"{name} {shape}" for name, shape in self.base.items())
            facts["to load it"] = f"a model of {len(self.base)} tensors: {tensors}"
        facts |= {"fingerprint": self.fingerprint} if self.fingerprint else {}
        facts |= {"digest": self.digest} if self.digest else {}
        return facts

    def __str__(self) -> str:
        rows = Table(box=None, pad_edge=False)
        for heading, side in COLUMNS.items():
            rows.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
        for layer in self.layers:
            rows.add_row(*layer.row)
        facts = [f"{name:<18}{fact}" for name, fact in self.facts.items()]
        lines = [printed(rows, markup=False)] if self.layers else []
        return "\n".join(line.rstrip() for line in [self.title, *lines, *facts, *self.problems])


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
        shapes = _shapes(path)
        if not any(_SLOT.fullmatch(key) for key in shapes):
            return _of_checkpoint(path, shapes)
    try:
        source = open_source(path, None)
    except AdapterFileError as error:
        if kind is None or kind.name not in ("safetensors", "torch"):
            raise
        tensors, *_ = tensors_of(path)  # raises where it is no file of tensors at all
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        adapts = any(_SLOT.fullmatch(key) for key in shapes)
        problems = tuple(map(str, error.problems)) if adapts else ()
        return _of_checkpoint(path, shapes, problems)
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
    )


def _of_foreign(path: Path, source: Source) -> Inspection:
    shapes = {key: tuple(tensor.shape) for key, tensor in source.tensors.items()}
    config = source.config or {}
    return _of_source(path, source.format, shapes, {key: config[key] for key in _CONFIG if _says(config.get(key))})


def _of_checkpoint(path: Path, shapes: Mapping[str, tuple[int, ...]], problems: tuple[str, ...] = ()) -> Inspection:
    """A state dict: of a base, of an adapted model, or of what adapters add to it (a Trainer's without the base)."""
    found = [match for key in shapes if (match := _CORE.fullmatch(key))]
    names = list(dict.fromkeys(match["name"] or match["of"] for match in found))
    whole = len(found) < len(shapes)
    if names:
        how = "on a model with the same adapters attached, `load_state_dict`"
        how = how if whole else how.replace("`load_state_dict`", "`load_state_dict(..., strict=False)`")
        return _of_source(path, "checkpoint" if whole else "cores", shapes, {"adapters": names, "to_load_it": how})
    return _of_source(path, "checkpoint", shapes, {}, problems)


def _says(value: object) -> bool:
    return value is not None and value != [] and not (isinstance(value, float) and not math.isfinite(value))


def _of_source(
    path: Path,
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, Any],
    problems: tuple[str, ...] = (),
) -> Inspection:
    slots: dict[str, dict[str, tuple[int, ...]]] = {}
    methods: dict[str, str] = {}
    others: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        match = _SLOT.fullmatch(key)
        if match is None:
            others[key] = shape
            continue
        slots.setdefault(match["layer"], {})[match["slot"]] = shape
        if match["method"]:
            methods.setdefault(match["layer"], _METHODS[match["method"]])
    layers = []
    for layer, tensors in slots.items():
        dora = any("dora_scale" in slot or "magnitude" in slot for slot in tensors)
        method = methods.get(layer, "a full update") + " with DoRA" * dora
        frozen = _elements({slot: shape for slot, shape in tensors.items() if "weights2" in slot or slot == "alpha"})
        layers.append(InspectedLayer(layer, method, {}, None, _elements(tensors) - frozen, frozen, tensors))
    size = weights_of(path).stat().st_size
    elements, parameters = _elements(shapes), sum(layer.trained for layer in layers)
    return Inspection(
        str(path), kind, size, elements, parameters, tuple(layers), settings, {}, others, problems=problems
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in the header of a safetensors file; no tensor is read."""
    with safetensors_of(path, damaged=COPY_AGAIN) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping


def _elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _names(names: Any) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return _names(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
