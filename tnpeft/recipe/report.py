"""The report of what trains: per layer, in total, and as a share of the model."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.errors import listed
from tnpeft.recipe.targets import fused_attention
from tnpeft.surgery import AdapterRecord, base_tensors, layers_of, plain_parameters, record_of

__all__ = ["REASONS", "LayerReport", "Report", "SharedReport", "printed", "reasons_of", "report_of"]

REASONS = ("bias", "norm", "also")
_ONLY_IF_ANY = ("skipped", "passed", "fused", "dropout")


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer; all counts are elements.

    `weight` counts the base layer's weight, `cores` what trains of its update, without cores that an earlier layer
    holds. `mode` is the execution mode that was asked for, `chosen` the mode in which the layer ran, if it is another.
    """

    name: str
    layer: str
    spec: str
    params: Mapping[str, float]
    mode: str
    chosen: str | None
    cores: int
    bias: int
    weight: int

    @property
    def runs(self) -> str:
        """The mode in words, e.g. `auto: hybrid`."""
        return f"{self.mode}: {self.chosen}" if self.chosen else self.mode


@dataclass(frozen=True)
class SharedReport:
    """One tensor that several layers share: the core, the first layer, which holds it, and how many layers use it."""

    core: str
    spec: str
    shape: tuple[int, ...]
    trained: bool
    holder: str
    layers: int

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape)) or "scalar"
        users = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        kind = "shared" if self.trained else "shared, frozen"
        return f"{kind}: {self.spec}.{self.core} ({shape}) of '{self.holder}' by {users}"


@dataclass(frozen=True)
class Report:
    """The trainable parameters of one adapter; counts are elements, `share` is of the base model's.

    `skipped` are the layers of the spec's kinds that `match="all"` left out, each with the reason. `passed` counts the
    modules of other kinds that have weights, by kind. `fused` are attention modules of which only the output projection
    is adapted: their q, k and v weights belong to no layer. `dropout` says what training drops, and in how many layers.
    """

    name: str
    layers: tuple[LayerReport, ...]
    shared: tuple[SharedReport, ...]
    cores: int
    bias: int
    norm: int
    also: int
    trained: int
    base: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    passed: Mapping[str, int] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    dropout: Mapping[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.trained / self.base if self.base else 0.0

    @property
    def notes(self) -> list[str]:
        """Lines on dropout, on each tensor that layers share, on the layers skipped for each reason, and so on."""
        reasons: dict[str, list[str]] = {}
        for layer, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(layer)
        lines = [f"skipped: {listed(layers)} ({reason})" for reason, layers in reasons.items()]
        if self.passed:
            counts = ", ".join(f"{number:,} {kind}" for kind, number in self.passed.items())
            lines.append(f"passed over, of kinds that `all` does not take: {counts}")
        if self.fused:
            lines.append(
                f"left out: q, k and v of {listed(self.fused)} (MultiheadAttention: out_proj alone is adapted)"
            )
        dropped = [
            f"dropout in training: {said}, of {number} layer{'s' * (number != 1)}"
            for said, number in self.dropout.items()
        ]
        return [*dropped, *map(str, self.shared), *lines]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        data = {**asdict(self), "share": self.share}
        return {key: value for key, value in data.items() if value or key not in _ONLY_IF_ANY}

    def __rich__(self) -> Table:
        title = f"Adapter '{self.name}': {self.trained:,} of {self.base:,} parameters train ({self.share:.3%})"
        table = Table(title=title, title_justify="left", show_footer=True)
        table.add_column("layer", footer=f"{len(self.layers)} layers", overflow="fold")
        table.add_column("kind", overflow="fold")
        for heading in ("spec", "params", "mode"):
            table.add_column(heading)
        weight, bias = (sum(getattr(row, part) for row in self.layers) for part in ("weight", "bias"))
        for heading, total in (("weight", weight), ("cores", self.cores), ("bias", bias)):
            table.add_column(heading, justify="right", footer=f"{total:,}")
        for row in self.layers:
            params = " ".join(f"{name}={value:g}" for name, value in row.params.items())
            counts = (f"{count:,}" for count in (row.weight, row.cores, row.bias))
            table.add_row(row.name, row.layer, row.spec, params, row.runs, *counts)
        sums = (("cores", self.cores), ("biases", self.bias), ("norms", self.norm), ("also", self.also))
        lines = [", ".join(f"{label} {count:,}" for label, count in sums if count or label == "cores")]
        table.caption = "\n".join(lines + self.notes)
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        return printed(self)


def printed(content: object, width: int = 140, markup: bool = True) -> str:
    """What rich prints for `content`, as plain text."""
    stream = io.StringIO()
    Console(
        file=stream, width=width, color_system=None, force_terminal=False, force_jupyter=False, markup=markup
    ).print(content)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def report_of(model: nn.Module, name: str) -> Report:
    """The report of an attached adapter. Raises AttachError for an unknown name."""
    record = record_of(model, name)
    parameters = plain_parameters(model)
    reasons = reasons_of(record)
    counts = {reason: _numel(parameters[key] for key in keys) for reason, keys in reasons.items()}
    biases = set(reasons["bias"])
    rows = []
    layers = layers_of(model, name)
    adapters = {layer: adapted.adapter(name) for layer, adapted in layers.items()}
    for layer, adapter in adapters.items():
        network = adapter.network
        bias = f"{layer}.bias"
        own = parameters[bias].numel() if bias in biases else 0
        weight = network.layer.numel
        rows.append(
            LayerReport(
                layer,
                str(network.layer),
                network.spec.name,
                dict(network.params),
                adapter.mode,
                layers[layer].chosen(name),
                sum(parameter.numel() for parameter in adapter.trained.values()),
                own,
                weight,
            )
        )
    cores = sum(row.cores for row in rows)
    base = _numel(tensor for tensor in base_tensors(model).values() if isinstance(tensor, nn.Parameter))
    bias_count, norm, also = (counts[reason] for reason in REASONS)
    trained = cores + bias_count + norm + also
    skipped = record.about.get("skipped", {})
    whole = [*reasons["also"], *adapters]
    fused = tuple(each for each in fused_attention(model, adapters) if not _trains_whole(each, whole))
    passed = _counts(record.about.get("passed"))
    shared = _shared(adapters)
    dropout = dict(Counter(str(adapter.dropout) for adapter in adapters.values() if adapter.dropout))
    counts_of = (cores, bias_count, norm, also, trained, base)
    return Report(name, tuple(rows), shared, *counts_of, skipped, passed, fused, dropout)


def _trains_whole(attention: str, names: Iterable[str]) -> bool:
    """Whether the q, k and v weights of an attention module are adapted or train beside the cores."""
    return any(name.rpartition(".")[0] == attention and name.endswith("_weight") for name in names)


def _counts(told: object) -> dict[str, int]:
    """The counts in a record, which may come from a file and hold anything."""
    found = told if isinstance(told, Mapping) else {}
    return {key: value for key, value in found.items() if isinstance(key, str) and type(value) is int}


def reasons_of(record: AdapterRecord) -> dict[str, list[str]]:
    """The parameters that train beside the cores, each once, by role: `bias`, `norm` or `also`.

    The record says what trains. Its `about`, which may come from a file and hold anything, only sorts it.
    """
    told = record.about.get("trained")
    sorted_: dict[str, list[str]] = {reason: [] for reason in REASONS}
    left = dict.fromkeys(names[0] for names in record.trained)
    first = {name: names[0] for names in record.trained for name in names}
    for reason in REASONS:
        names = told.get(reason) if isinstance(told, Mapping) else None
        for name in names if isinstance(names, list | tuple) else ():
            if isinstance(name, str) and first.get(name) in left:
                del left[first[name]]
                sorted_[reason].append(name)
    sorted_["also"] += left
    return sorted_


def _shared(adapters: Mapping[str, Adapter]) -> tuple[SharedReport, ...]:
    """Every tensor of a shared core, in the order of the layers that hold them."""
    names = {id(adapter): layer for layer, adapter in adapters.items()}
    users: Counter[tuple[str, str]] = Counter()
    for adapter in adapters.values():
        holders = {core.name: adapter.shared.get(core.name, adapter) for core in adapter.network.cores if core.shared}
        users.update((names[id(holder)], core) for core, holder in holders.items())
    rows = []
    for (holder, name), number in users.items():
        network = adapters[holder].network
        core = next(core for core in network.cores if core.name == name)
        rows.append(SharedReport(name, network.spec.name, core.shape, not core.frozen, holder, number))
    return tuple(rows)


def _numel(tensors: Iterable[Tensor]) -> int:
    """Elements, tied tensors once."""
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())
