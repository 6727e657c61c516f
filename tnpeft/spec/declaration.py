"""What a spec file declares, as immutable data: each part with its place in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position
from tnpeft.spec.derived import Derivation, Reference
from tnpeft.spec.expression import Expression
from tnpeft.spec.factorize import Table
from tnpeft.spec.inits import INDEX_INITS, Init
from tnpeft.spec.pattern import ELLIPSIS, Axes

__all__ = ["Core", "Declaration", "SizeRule", "Term"]


@dataclass(frozen=True)
class Core:
    """One core; `legs` are its indices in storage order, `k...` among them unexpanded.

    With sizes {o: 64, a: 8}, legs=("o", "a") stores shape (64, 8); `axes` has the legs of each stored axis.

    `shared` is `model`, or the scope whose layers share the tensor. `origin` says what is taken from the base weight:
    `weight` itself, with the `axes` of its pattern, or `svd_u`, `svd_s`, `svd_v`. Such a core is frozen. A core with a
    `derivation` is made of other cores and never stored.
    """

    name: str
    legs: tuple[str, ...]
    init: Init
    frozen: bool
    position: Position
    shared: str | None = None
    origin: str | None = None
    axes: Axes = ()
    places: Mapping[str, Position] = field(default_factory=dict, repr=False)  # of its legs
    derivation: Derivation | None = None

    @property
    def is_index(self) -> bool:
        """Whether it is an index core: it holds whole numbers, the places for a map's `at=`."""
        return self.init.name in INDEX_INITS


@dataclass(frozen=True)
class Term:
    """One term of the update: `scale` times the network of some cores, in the order of the file."""

    references: tuple[Reference, ...]
    weight: Axes
    scale: Expression
    position: Position  # of the pattern
    scale_position: Position | None = None
    label: str = "`weight`"
    places: Mapping[str, Position] = field(default_factory=dict, repr=False)  # of the open legs

    @property
    def cores(self) -> tuple[str, ...]:
        """The names of its cores, each once."""
        return tuple(dict.fromkeys(reference.core for reference in self.references))


@dataclass(frozen=True)
class SizeRule:
    """One line of `sizes`: several names unpack a tuple, or share one number."""

    names: tuple[str, ...]
    expression: Expression
    node: Node = field(repr=False)  # of the expression
    places: Mapping[str, Position] = field(default_factory=dict, repr=False)  # of the names


@dataclass(frozen=True, eq=False)
class Declaration:
    """An adapter's topology: cores, the indices that join them, and how open legs make the weight."""

    name: str
    title: str
    source: str
    layers: tuple[str, ...]
    params: Mapping[str, Expression]
    bond: Expression | None
    sizes: tuple[SizeRule, ...]
    factors: Table | None
    cores: tuple[Core, ...]
    terms: tuple[Term, ...]
    scale: Expression
    compose: str | None  # `dora`
    start: str  # `zero` or `frozen_copy`
    seed: int
    file: str
    text: str = field(repr=False)
    root: Node = field(repr=False)
    tables: Mapping[str, Table] = field(default_factory=dict, repr=False)  # those that `factors` names
    start_std: Expression | None = None  # of T at the start, in standard deviations of the weight

    @property
    def version(self) -> int:
        """The language's number, which the file begins with."""
        node = self.root.get("tnpeft")
        assert node is not None
        return int(node.value)

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes that its shared cores name, other than `model`; `attach` binds each to a regular expression."""
        return tuple(dict.fromkeys(core.shared for core in self.cores if core.shared not in (None, "model")))

    @cached_property
    def derivations(self) -> Mapping[str, Derivation]:
        """What each derived core is made of, by its name."""
        return {core.name: core.derivation for core in self.cores if core.derivation is not None}

    @property
    def sized(self) -> set[str]:
        """The names that have a size of their own, in `sizes` or as params; `k...` has the kernel's sizes."""
        return {*self.params, ELLIPSIS, *(name for rule in self.sizes for name in rule.names)}

    def place(self, key: str) -> Position:
        """Where the value of a key stands; the start of the file where the key is absent."""
        return (self.root.get(key) or self.root).position

    def __copy__(self) -> Declaration:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Declaration:
        return self

    @cached_property
    def content(self) -> tuple[object, ...]:
        """What a file says, without layout and comments. Keys compare in any order, all else in that of the file."""
        said = {str(key.value): value.plain() for key, value in self.root.items()}
        return (*(f"{key}: {said[key]!r}" for key in sorted(said) if key != "factors"), repr(self.factors))

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Declaration):
            return False
        same = (self.text, dict(self.tables)) == (other.text, dict(other.tables))
        return same or self.content == other.content
