"""The table of peers: what each spec is in other libraries and in its authors' code, and what agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tnpeft.documents.nodes import read_file
from tnpeft.spec.library import shipped_folder

__all__ = ["FACTS", "Peer", "peer_rows", "peers_of", "peers_table"]

FACTS = {"value": "value", "count": "count", "init": "first values"}
_FILES = ("peft", "lycoris", "authors")


@dataclass(frozen=True)
class Peer:
    """A tuner of a library and a spec that is the same, or why there is none (`spec` is then empty).

    `agrees` names what is the same: `value`, `count`, `init`; `test` is the pytest function that shows the value.
    """

    library: str
    tuner: str
    spec: str
    agrees: tuple[str, ...]
    note: str
    test: str

    @property
    def facts(self) -> str:
        """What agrees, in words."""
        return ", ".join(FACTS[fact] for fact in self.agrees) or "nothing"


def peer_rows() -> tuple[Peer, ...]:
    """Every row of `specs/peers`, library by library."""
    return tuple(
        row for name in _FILES for row in _rows(read_file(shipped_folder() / "peers" / f"{name}.yaml").plain())
    )


def _rows(table: dict[str, Any]) -> Iterator[Peer]:
    library = " ".join(str(table[key]) for key in ("library", "version") if key in table)
    for tuner, rows in table["tuners"].items():
        for row in rows:
            test = row.get("test", table["test"]) if "spec" in row else ""
            agrees, note = tuple(row.get("agrees", ())), row.get("note") or row.get("why", "")
            yield Peer(library, tuner, row.get("spec", ""), agrees, note, test)


def peers_of(spec: str, rows: tuple[Peer, ...]) -> str:
    """The code that a spec was compared with, and what agrees."""
    return "; ".join(f"{row.library}, {row.tuner}: {row.facts}" for row in rows if row.spec == spec)


def peers_table(rows: tuple[Peer, ...]) -> Iterator[str]:
    """A table in Markdown for each library, with a row for each of its tuners and each spec that is the same."""
    for library in dict.fromkeys(row.library for row in rows):
        yield f"### {library[0].upper()}{library[1:]}\n"
        yield "| name there | spec | value | count | first values | what differs, or why no spec can express it |"
        yield "|-|-|-|-|-|-|"
        for row in rows:
            if row.library == library:
                spec = f"[`{row.spec}`]({row.spec}.yaml)" if row.spec else ""
                marks = " | ".join("yes" if fact in row.agrees else "no" if row.spec else "" for fact in FACTS)
                yield f"| {row.tuner} | {spec} | {marks} | {row.note} |"
        yield ""
