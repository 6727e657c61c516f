"""`tnpeft list --markdown`: the shipped specs as the table that `specs/README.md` holds."""

from __future__ import annotations

import re
from pathlib import Path

from tnpeft.cli.arguments import parse_layer
from tnpeft.cli.list_specs import short_layers
from tnpeft.cli.output import Output, UsageError
from tnpeft.cli.peers import Peer, peer_rows, peers_of, peers_table
from tnpeft.documents.files import replace_files
from tnpeft.documents.paths import is_file
from tnpeft.errors import Problem
from tnpeft.network import Spec, load_spec
from tnpeft.spec import list_specs
from tnpeft.spec.legs import cores_by_name, legs_of
from tnpeft.spec.library import shipped_folder

__all__ = ["BEGIN", "COLUMNS", "END", "catalogue", "cells", "update_catalogue"]

BEGIN, END = "<!-- specs: begin -->", "<!-- specs: end -->"
_COUNT = re.compile(r"^# Count: (\S+) has ([\d,]+) parameters", re.MULTILINE)
_PEERS = """\
## Beside other code

The tables compare every tuner of PEFT, every module of LyCORIS and authors' code with specs; [peers](peers) has the
same as YAML. Value: the same stored tensors give the same update to 1e-5. Count: as many numbers train. First values:
they are equal; random ones have the same distribution. Tests check every row."""
COLUMNS = ("spec", "layers", "formula", "parameters", "for example", "start", "marks", "compared with", "source")


def catalogue() -> str:
    """The table in Markdown: a row for each shipped spec, then the pictures, all from the files themselves."""
    specs, peers = [load_spec(name) for name in list_specs()], peer_rows()
    lines = [
        f"{len(specs)} specs; the table is made by `make catalogue`.",
        "",
        _row(COLUMNS),
        _row("-" * len(COLUMNS)),
    ]
    lines += [_row(cells(spec, peers)) for spec in specs]
    pictures = [spec.name for spec in specs if (shipped_folder() / "pictures" / f"{spec.name}.svg").is_file()]
    if pictures:
        lines += ["", *(_picture(name) for name in pictures)]
    lines += ["", _PEERS, "", *peers_table(peers)]
    return "\n".join(lines)


def update_catalogue(output: Output, name: str) -> None:
    """Put the table between the marks in a text file, and print whether that changed the file."""
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8") if is_file(path) else ""
    except (OSError, ValueError):
        text = ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        fix = f"Write the lines {BEGIN} and {END} where the table should stand."
        raise UsageError(Problem("--markdown", "a text file with the two marks", "none", fix, name))
    updated = f"{before}{BEGIN}\n{catalogue()}\n{END}{after}"
    if updated != text:
        replace_files({path: updated.encode()}, _unwritten)
    output.say(f"{name}: {'updated' if updated != text else 'as it was'}")


def _unwritten(path: Path, reason: str) -> UsageError:
    fix = "Choose a file that can be written to."
    return UsageError(Problem("--markdown", "to be written", reason, fix, str(path)))


def _row(cells: tuple[str, ...] | str) -> str:
    return f"| {' | '.join(cells)} |" if not isinstance(cells, str) else f"|{'|'.join(cells)}|"


def _picture(name: str) -> str:
    return f'<a href="pictures/{name}.svg" title="{name}"><img src="pictures/{name}.svg" alt="{name}" width="240"></a>'


def cells(spec: Spec, peers: tuple[Peer, ...]) -> tuple[str, ...]:
    """A spec's row, with the columns of `COLUMNS`, in Markdown."""
    counted = _COUNT.search(spec.text)
    layer, number = counted.groups() if counted else ("", "")
    formula = spec.bind(parse_layer(layer)).formula if layer else ""
    return (
        f"[`{spec.name}`]({spec.name}.yaml)",
        short_layers(spec),
        f"`{_formula(spec)}`",
        f"`{formula}`",
        f"{number} ({layer})",
        spec.start,
        ", ".join(_marks(spec)),
        peers_of(spec.name, peers),
        spec.source,
    )


def _formula(spec: Spec) -> str:
    """The formula in the file: the first comment that has one, with the lines on which it continues."""
    comments = [line[2:].strip() for line in spec.text.splitlines() if line.startswith("# ")]
    comments = [line for line in comments if not line.startswith("yaml-language-server")]
    formula: list[str] = []
    for line in comments:
        if formula and not (formula[-1].endswith((":", "over all bonds of")) or _continues(formula[-1], line)):
            break
        formula.append(line)
    return " ".join(formula).replace("|", "\\|")


def _continues(above: str, line: str) -> bool:
    """Whether a formula continues: its next line starts with a core and its legs."""
    return bool(re.match(r"[a-z]\w*\[", line)) and not above.endswith(".")


def _marks(spec: Spec) -> list[str]:
    """What a reader should know beyond cores and bonds."""
    marks = []
    if any(core.frozen and core.origin is None for core in spec.cores):
        marks.append("frozen")
    maps = dict.fromkeys(call.name for derivation in spec.derivations.values() for call in derivation.maps)
    if spec.derivations:
        marks.append(f"derived: {' '.join(maps)}" if maps else "derived")
    if any(core.is_index for core in spec.cores):
        marks.append("index cores")
    shared = list(dict.fromkeys(core.shared for core in spec.cores if core.shared is not None))
    marks += [f"shared: {' '.join(shared)}"] if shared else []
    origins = dict.fromkeys(core.origin for core in spec.cores if core.origin is not None)
    marks += [f"from: {' '.join(map(str, origins))}"] if origins else []
    if len(spec.terms) > 1:
        marks.append(f"{len(spec.terms)} terms")
    if spec.compose is not None:
        marks.append(f"compose: {spec.compose}")
    if _has_hyperedge(spec):
        marks.append("hyperedge")
    return marks


def _has_hyperedge(spec: Spec) -> bool:
    """Whether an index occurs in more than two places of a term."""
    for term in spec.terms:
        known = cores_by_name(spec)
        places = [leg for reference in term.references for leg in legs_of(reference, known)]
        places += [leg for axis in term.weight for leg in axis]
        if any(places.count(leg) > 2 for leg in places):
            return True
    return False
