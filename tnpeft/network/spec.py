"""The spec: what a file declares, read from text and bound to layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tnpeft.documents.nodes import read_bytes
from tnpeft.documents.writing import as_yaml
from tnpeft.network.bind import bind
from tnpeft.network.layer import Layer
from tnpeft.network.model import Network
from tnpeft.network.signature import layer_of
from tnpeft.spec.canonical import Canonical, canonical
from tnpeft.spec.declaration import Declaration
from tnpeft.spec.derived_checks import uses_second_half
from tnpeft.spec.factorize import Table
from tnpeft.spec.inits import registered_inits
from tnpeft.spec.library import find_shipped, label_of, shipped_tables
from tnpeft.spec.maps import registered_maps
from tnpeft.spec.reader import read_declaration

__all__ = ["Spec", "load_spec"]

# Networks that a spec remembers: more than the kinds of layers that a model has.
NETWORKS = 256
# Specs that stay parsed: more than ship, for what goes through all of them in turn would find none in a smaller table.
PARSED = 256


@dataclass(frozen=True, eq=False)
class Spec(Declaration):
    """An adapter's topology: cores, the indices that join them, and how open legs make the weight.

    It comes from `load_spec(name_or_path)`, `Spec.from_yaml(text)` or `Spec.build(...)`, which check all that does not
    depend on a layer. `bind` checks the rest.
    """

    @classmethod
    def from_yaml(
        cls,
        text: str | bytes,
        file: str = "<spec>",
        tables: Mapping[str, Table] | None = None,
        known_inits: bool = True,
    ) -> Spec:
        """Read a spec from YAML text.

        `file` names the text in errors; `tables` are factor tables that `factors: NAME` may name beside the shipped
        ones. `known_inits=False` is for text that was accepted before, that of a saved adapter, say. It may name an
        init that is not registered here, which is an error only when a core is drawn, and have a param without effect.
        Raises SpecError with every mistake found, each with its place.
        """
        declaration = read_declaration(text, file, {**shipped_tables(), **(tables or {})}, known_inits)
        return cls(**{each.name: getattr(declaration, each.name) for each in fields(declaration)})

    @classmethod
    def build(cls, *, file: str = "<spec>", tables: Mapping[str, Table] | None = None, **parts: Any) -> Spec:
        """A spec from Python: keyword arguments are the keys of a file; values are texts, numbers, lists and mappings.

            Spec.build(name="mine", layers="any", params={"r": 4}, sizes={"o": "out_channels", "i": "in_channels"},
                       cores={"up": {"legs": "o r", "init": "zeros"}, "down": "r i k..."}, weight="o i k...",
                       start="zero")

        The language version is the lowest that has all that is used, unless `tnpeft=` names one. The spec is checked as
        a file is. Raises SpecError with every mistake, each with its place in the text that `to_yaml` gives.
        """
        version = {} if "tnpeft" in parts else {"tnpeft": 2}
        spec = cls.from_yaml(as_yaml({**version, **parts}), file, tables)
        if not version or uses_second_half(spec):
            return spec
        return cls.from_yaml(as_yaml({"tnpeft": 1, **parts}), file, tables)

    def to_yaml(self) -> str:
        """The YAML text of this spec, from which `Spec.from_yaml` makes the same spec again.

        It is the text that the spec was read from; a factor table that does not ship with tnpeft is written into it.
        """
        shipped = shipped_tables()
        if all(shipped.get(name) == table for name, table in self.tables.items()):
            return self.text
        data = self.root.plain()
        return as_yaml({**data, "factors": {key: list(value) for key, value in (self.factors or {}).items()}})

    def canonical(self) -> Canonical:
        """The `form` and `hash` that this spec shares with specs of the same network under other names.

        Names of cores, indices, params and scopes do not matter, nor do `name`, `title`, `source` and `seed`. The order
        of cores and of terms does not matter, nor does that of legs where no init depends on it. Layers, sizes, inits,
        what trains and the start do matter.

        Equal forms mean equal networks. Equal networks may differ in form: expressions are compared as they are written
        (but for blanks and the names of indices), not by algebra; legs within a group have an order; and a product
        written as a derived core, say, has another form. Raises SpecError for networks with too many cores alike to be
        told apart.
        """
        return canonical(self)

    def bind(self, layer: Any, /, **params: Any) -> Network:
        """The network for one layer, with every size known and checked.

        `layer` is a `torch.nn` module, a `Layer`, or the name of a kind of layer. With a name, its `in_channels`,
        `out_channels` (or `in_features`, `out_features`), `kernel_size` and `groups` are passed along with the spec's
        own params: `spec.bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3, r=4)`. Raises BindError with
        every mistake found.
        """
        if isinstance(layer, (str, Layer)) or not {type(value) for value in params.values()} <= {int, float}:
            return bind(self, layer, params)
        layer = layer_of(layer)
        # Models have many layers alike. Of each size there is one network, and one plan of it.
        key = (layer, *[(name, type(value), value) for name, value in params.items()])
        network = self._networks.get(key)
        if network is None:
            network = self._networks[key] = bind(self, layer, params)
            if len(self._networks) > NETWORKS:
                self._networks.clear()
        return network

    @cached_property
    def _networks(self) -> dict[tuple[Any, ...], Network]:
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_from_parts, (self.text, self.file, dict(self.tables)))


def _from_parts(text: str, file: str, tables: Mapping[str, Table]) -> Spec:
    return Spec.from_yaml(text, file, tables, known_inits=False)  # a copy has its cores drawn already


def load_spec(name: str | Path) -> Spec:
    """A shipped spec by name (`tenvoo_l`) or a spec file by path.

    Raises SpecError with every mistake in the file, each with file, line and column.
    """
    path = find_shipped(name, "spec", "")
    return _parsed(read_bytes(path), label_of(path), (registered_inits(), registered_maps()))


@lru_cache(maxsize=PARSED)
def _parsed(text: bytes, file: str, _registered: object) -> Spec:
    """The spec of a text, parsed once: recipes name a spec several times, and programs attach it to several models."""
    return Spec.from_yaml(text, file)
