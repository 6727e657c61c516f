"""The spec: a YAML file, read and checked, as immutable data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tnpeft.errors import Position
from tnpeft.spec.expression import Expression
from tnpeft.spec.factorize import Table
from tnpeft.spec.inits import Init
from tnpeft.spec.pattern import Axes

if TYPE_CHECKING:
    from tnpeft.network import Network

__all__ = ["Core", "SizeRule", "Spec", "Term"]

_FROZEN = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Core(BaseModel):
    """One core; `legs` are its indices in storage order, `k...` among them unexpanded.

    With sizes {o: 64, a: 8}, legs=("o", "a") stores shape (64, 8).

    `shared` is `model`, or the scope whose layers have one tensor for all. `origin` is what is taken from the base
    weight: `weight` itself, with its `axes` of legs, or `svd_u`, `svd_s`, `svd_v`; such a core is frozen.
    """

    model_config = _FROZEN

    name: str
    legs: tuple[str, ...]
    init: Init
    frozen: bool = False
    position: Position
    shared: str | None = None
    origin: Literal["weight", "svd_u", "svd_s", "svd_v"] | None = None
    axes: Axes = ()


class Term(BaseModel):
    """One term of the update: `scale` times the network of some cores (by name, in file order)."""

    model_config = _FROZEN

    cores: tuple[str, ...]
    weight: Axes
    scale: Expression
    position: Position
    scale_position: Position | None = None
    label: str = "`weight`"


class SizeRule(BaseModel):
    """One line of `sizes`: several names unpack a tuple, or share one number."""

    model_config = _FROZEN

    names: tuple[str, ...]
    expression: Expression
    position: Position


class Spec(BaseModel):
    """An adapter's topology: cores, the indices that join them, and how open legs make the weight.

    Comes from `load_spec(name_or_path)` or `Spec.from_yaml(text)`, never half checked: what does
    not depend on a layer has been verified, and `bind` verifies the rest.
    """

    model_config = _FROZEN

    name: str
    title: str = ""
    source: str = ""
    layers: tuple[str, ...]
    params: Mapping[str, Expression]
    bond: Expression | None
    sizes: tuple[SizeRule, ...]
    factors: Table | None
    cores: tuple[Core, ...]
    terms: tuple[Term, ...]
    scale: Expression
    compose: Literal["dora"] | None = None
    start: Literal["zero", "frozen_copy"]
    seed: int
    text: str = Field(repr=False)
    file: str
    places: Mapping[str, Position] = Field(default_factory=dict, repr=False)
    tables: Mapping[str, Table] = Field(default_factory=dict, repr=False)

    @classmethod
    def from_yaml(
        cls,
        text: str | bytes,
        file: str = "<spec>",
        tables: Mapping[str, Table] | None = None,
        known_inits: bool = True,
    ) -> Spec:
        """Read a spec from YAML text.

        `file` names the text in errors; `tables` are factor tables that `factors: NAME` may name
        beside the shipped ones. Without `known_inits` the text is one that was accepted before, of a saved
        adapter, say: an init may be one that nobody has registered here, whose function is missed when a core
        is drawn, and a param may do nothing. Raises SpecError with every mistake found,
        each with its place.
        """
        spec: Spec = _hooks["read"](text, file, tables, known_inits)
        return spec

    def bind(self, layer: Any, /, **params: Any) -> Network:
        """The network for one layer, with every size known and checked.

        `layer` is a `torch.nn` module, a `Layer`, or a kind by name; a kind takes `in_channels`,
        `out_channels` (or `in_features`, `out_features`), `kernel_size` and `groups` beside the
        spec's own params: `spec.bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3, r=4)`.
        Raises BindError with every mistake found.
        """
        network: Network = _hooks["bind"](self, layer, params)
        return network

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes that its shared cores name, but for `model`; `attach` binds each to a regular expression."""
        return tuple(dict.fromkeys(core.shared for core in self.cores if core.shared not in (None, "model")))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_from_parts, (self.text, self.file, dict(self.tables)))

    def __copy__(self) -> Spec:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Spec:
        return self

    def __hash__(self) -> int:
        return hash((self.text, self.file))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and (self.text, dict(self.tables)) == (other.text, dict(other.tables))


def _from_parts(text: str, file: str, tables: Mapping[str, Table]) -> Spec:
    return Spec.from_yaml(text, file, tables, known_inits=False)  # a copy has its cores drawn already


# `read` is filled by the reader, which builds specs, and `bind` by the network room, which stands to
# the right of this one: a call may go right, an import may not.
_hooks: dict[str, Callable[..., Any]] = {}


def provide(name: str, function: Callable[..., Any]) -> None:
    """Give the method `name` of `Spec` its body."""
    _hooks[name] = function
