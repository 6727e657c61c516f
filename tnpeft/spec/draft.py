"""What could be read of a spec file, part by part, before its parts are checked against each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position
from tnpeft.spec.expression import Expression
from tnpeft.spec.factorize import Table
from tnpeft.spec.inits import Init
from tnpeft.spec.pattern import Axes

__all__ = ["Draft", "DraftCore", "DraftRule", "DraftTerm"]


@dataclass
class DraftCore:
    name: str
    legs: tuple[str, ...]
    places: dict[str, Position]
    init: Init | None  # None: it was wrong, and reported
    names_init: bool
    frozen: bool
    position: Position
    shared: str | None = None
    origin: str | None = None
    axes: Axes = ()  # how the legs of `from: weight` make the weight


@dataclass
class DraftRule:
    names: tuple[str, ...]
    expression: Expression
    position: Position
    places: dict[str, Position]
    node: Node


@dataclass
class DraftTerm:
    cores: tuple[str, ...]
    weight: Axes
    weight_places: dict[str, Position]
    scale: Expression
    position: Position  # of the pattern
    scale_position: Position | None = None
    label: str = "`weight`"


@dataclass
class Draft:
    """What could be read of a file. `whole` is False where a part is missing, so that checks over all parts wait."""

    file: str
    text: str
    root: Node
    name: str = ""
    title: str = ""
    source: str = ""
    layers: tuple[str, ...] = ()
    params: dict[str, Expression] = field(default_factory=dict)
    param_places: dict[str, Position] = field(default_factory=dict)
    bond: Expression | None = None
    sizes: list[DraftRule] = field(default_factory=list)
    factors: Table | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    cores: list[DraftCore] = field(default_factory=list)
    terms: list[DraftTerm] = field(default_factory=list)
    scale: Expression | None = None
    compose: str | None = None
    start: str | None = None
    seed: int = 0
    places: dict[str, Position] = field(default_factory=dict)  # of values, by key
    whole: dict[str, bool] = field(default_factory=lambda: {"params": True, "sizes": True, "cores": True})
