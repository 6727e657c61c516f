"""What `inspect` found in a file, as data and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from tnpeft.errors import clip
from tnpeft.recipe.report import printed

__all__ = ["InspectedLayer", "Inspection"]

_COLUMNS = {"layer": "left", "weight": "left", "taken for": "left", "spec": "left", "params": "left", "mode": "left"}
_COLUMNS |= {"trains": "right", "frozen": "right"}
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
_SHOWN = 6  # names in one line
_MARGIN = 18  # of the facts, if their names are no longer


@dataclass(frozen=True)
class InspectedLayer:
    """One adapted layer of a file.

    `spec` is the spec's name; for other libraries' files, the method's, and `params` are the rank and alpha that they
    state. `weight` is the shape of the base weight, if the file has it. `trained` and `frozen` count elements in the
    file. `drawn` are cores that the seed gives again. `fitted_as` is the layer that `tnpeft fit` took the weight for,
    if it had no model.
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
    fitted_as: str | None = None

    @property
    def row(self) -> tuple[str, ...]:
        """Its cells in a table of layers."""
        params = " ".join(f"{name}={value:g}" for name, value in self.params.items())
        weight = "" if self.weight is None else " x ".join(map(str, self.weight))
        mode = (self.mode or "") + f" ({len(self.choices)} chosen)" * bool(self.choices)
        counts = f"{self.trained:,}", f"{self.frozen:,}"
        return self.name, weight, self.fitted_as or "", self.spec, params, mode, *counts


@dataclass(frozen=True)
class Inspection:
    """What a file holds: its format (one of `load_foreign`, "tnpeft", "cores" or "checkpoint"), layers and tensors.

    `elements` counts all of its numbers, `parameters` those that trained. `dtypes` counts the tensors of each type.
    `metadata` has the header of another library's file. `trained` has the parameters that trained beside the cores, by
    `bias`, `norm` and `also`. `others` are tensors of another library's file that belong to no layer's update, with
    their shapes. `base` names every tensor that a model must have to load the file, with type and shape. `fingerprint`
    is the SHA-256 of that list, `digest` that of the adapted weights' values.
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
    dtypes: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return asdict(self)

    @property
    def title(self) -> str:
        return f"{self.path}: {_FORMATS[self.format]}, {self.bytes:,} bytes"

    @property
    def facts(self) -> dict[str, str]:
        """What is printed along with the table of layers: a text for each heading."""
        facts = {_label(name): _text(value) for name, value in self.settings.items()}
        facts |= {"dtype": _dtypes(self.dtypes)} if self.dtypes else {}
        if self.layers:
            facts["layers"] = f"{len(self.layers)}"
            facts["parameters"] = f"{self.parameters:,} train"
        facts |= {f"trained: {reason}": _names(names) for reason, names in self.trained.items() if names}
        if self.others:
            elements = sum(map(math.prod, self.others.values()))
            facts["other tensors"] = f"{len(self.others)}, {elements:,} elements: {_names(self.others)}"
        if self.metadata:
            said = _names(f"{key}={clip(value, 40)[1:-1]}" for key, value in self.metadata.items())
            facts["metadata"] = f"{len(self.metadata)}: {said}"
        if self.base:
            tensors = _names(f"{name} {shape}" for name, shape in self.base.items())
            facts["to load it"] = f"a model of {len(self.base)} tensors: {tensors}"
        facts |= {"fingerprint": self.fingerprint} if self.fingerprint else {}
        facts |= {"digest": self.digest} if self.digest else {}
        return facts

    @property
    def lines(self) -> list[str]:
        """The facts as text, one a line."""
        margin = max(_MARGIN, *(len(name) + 2 for name in self.facts)) if self.facts else _MARGIN
        return [f"{name:<{margin}}{fact}" for name, fact in self.facts.items()]

    @property
    def columns(self) -> dict[str, str]:
        """The headings of `rows`, each with the side that its column keeps to."""
        return {heading: side for heading, side in _COLUMNS.items() if heading in self._told}

    @property
    def rows(self) -> list[list[str]]:
        """A row for each layer, without the columns of which the file says nothing."""
        told = self._told
        return [[cell for heading, cell in zip(_COLUMNS, layer.row, strict=True) if heading in told]
                for layer in self.layers]  # fmt: skip

    @property
    def _told(self) -> set[str]:
        cells = zip(*(layer.row for layer in self.layers), strict=True)
        return {heading for heading, column in zip(_COLUMNS, cells, strict=False) if any(column)}

    def __str__(self) -> str:
        rows = Table(box=None, pad_edge=False)
        for heading, side in self.columns.items():
            rows.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
        for row in self.rows:
            rows.add_row(*row)
        lines = [printed(rows, markup=False)] if self.layers else []
        return "\n".join(line.rstrip() for line in [self.title, *lines, *self.lines, *self.problems])


def _names(names: Any) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return _names(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _label(name: str) -> str:
    """A setting's name in words; what stands before a dot is a name in the file."""
    part, dot, own = name.rpartition(".")
    return part + dot + own.replace("_", " ")


def _dtypes(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} ({number})" for name, number in dtypes.items())
