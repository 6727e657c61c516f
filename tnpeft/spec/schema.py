"""What a spec file looks like."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tnpeft.documents.schema import FilePart, Schema
from tnpeft.spec.habits import value_of_param

__all__ = ["SPEC"]

Scalar = int | float | str


class SummandFile(FilePart):
    cores: list[str]
    scale: Scalar = 1


class CoreFile(FilePart):
    legs: str
    init: str | None = None
    frozen: bool = False
    shared: str | None = None
    origin: Literal["weight", "svd_u", "svd_s", "svd_v"] | None = Field(default=None, alias="from")
    of: str | list[str] | list[SummandFile] | None = None
    map: str | list[str] | None = None
    scale: Scalar = 1


class TermFile(FilePart):
    cores: list[str]
    weight: str
    scale: Scalar = 1


class SpecFile(FilePart):
    tnpeft: Literal[1, 2]
    name: str
    title: str = ""
    source: str = ""
    layers: str | list[str]
    params: dict[str, Scalar] = Field(default_factory=dict)
    bond: int | str | None = None
    sizes: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    factors: str | dict[int, list[int]] | None = None
    init: str | None = None
    cores: dict[str, str | CoreFile]
    weight: str
    terms: list[TermFile] | None = None
    scale: Scalar = 1
    compose: Literal["dora"] | None = None
    start: Literal["zero", "frozen_copy"]
    start_std: Scalar | None = None
    seed: int = 0


def _advice(path: tuple[str | int, ...], key: str, value: object) -> str:
    """What to write for an unknown key: a number beside `params` is probably meant as one of them."""
    params = value_of_param(key, value) if not path else ""
    return f"Write `{params}`." if params else ""


SPEC = Schema(
    what="spec",
    model=SpecFile,
    expected={
        "tnpeft": ("the language version 1 or 2", "Write `tnpeft: 1`, or `tnpeft: 2` where a core is derived."),
        "name": ("a word", "Write `name: my_adapter`; quote it if it looks like a number."),
        "title": ("a text", "Quote it."),
        "source": ("a text", "Quote it."),
        "layers": ("a layer kind or a list of them", "For example `layers: [Linear, Conv3d]`, or `any`."),
        "params": ("names with numbers", "For example `params: {r: 4, alpha: r}`."),
        "bond": ("a size", "For example `bond: r`."),
        "sizes": ("indices with sizes", "For example `sizes: {o: out_channels, i: in_channels}`."),
        "factors": ("a table's name, or numbers with their factors", "For example `factors: {32: [4, 4, 2]}`."),
        "init": ("an init", "For example `init: normal(0.02)`."),
        "cores": ("names with legs", "For example `cores: {up: o r, down: r i}`."),
        "weight": ("a pattern of open legs", "For example `weight: o i k...`."),
        "terms": ("a list of terms", "For example `terms: [{cores: [up, down], weight: o i}, ...]`."),
        "terms.cores": ("a list of cores' names", "For example `cores: [up, down]`."),
        "cores.of.cores": ("a list of cores' names", "For example `cores: [A, W]`."),
        "compose": ("`dora`", "Write `compose: dora`, or leave it out: the update is then added to the weight."),
        "scale": ("a number or an expression", "For example `scale: alpha / r`."),
        "start": ("`zero` or `frozen_copy`", "Write `start: zero` where one core is zeros, else `start: frozen_copy`."),
        "start_std": (
            "how many standard deviations of the weight T has at the start",
            "For example `start_std: 0.01`, with `start: frozen_copy`.",
        ),
        "seed": ("a whole number", "For example `seed: 0`."),
        "legs": ("the core's indices", 'For example `legs: o r`; `legs: ""` is a scalar.'),
        "frozen": ("`true` or `false`", "Write `frozen: true` for a core that is not trained."),
        "shared": ("`model` or a scope's name", "For example `shared: model`: one tensor for all adapted layers."),
        "of": (
            "a core, a list of cores, or a list of products with `cores`",
            "For example `of: R`, or `of: [A, W]`.",
        ),
        "map": ("a map or a list of maps", "For example `map: tanh`, or `map: [skew(e -> x y), cayley(x y)]`."),
        "from": ("`weight`, `svd_u`, `svd_s` or `svd_v`", "Write `from: weight` for the base weight itself, say."),
    },
    parts={
        "cores": ("its legs, or a mapping with `legs`", "For example `up: o r`, or `up: {legs: o r, init: zeros}`."),
        "params": ("a number or an expression", "For example `params: {r: 4, alpha: r}`."),
        "sizes": ("a size", "For example `sizes: {o: out_channels, i: in_channels}`."),
        "terms": ("a term with `cores` and `weight`", "For example `- {cores: [up, down], weight: o i}`."),
    },
    instead={"weight": "terms"},
    advice=_advice,
)
