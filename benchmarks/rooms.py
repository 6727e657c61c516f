"""The rooms of the package and what they import, drawn from the code: `docs/rooms.svg`.

    python benchmarks/rooms.py            draw it anew
    python benchmarks/rooms.py --check    say whether the picture is current

Rooms are in the order in which they may import. Each row is a room, and each dot a room that it imports; the dot's size
is the number of files that do. If all dots are left of the diagonal, rooms import only downwards. Imports for types and
inside functions count too.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tnpeft"
PICTURE = ROOT / "docs" / "rooms.svg"
_SIDE, _LEFT, _TOP = 26, 130, 110


def imports_between_rooms() -> Counter[tuple[str, str]]:
    """For each pair of rooms how many files of the first import the second."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        names = {
            node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tnpeft.")
        }
        counts.update((room, other) for other in {name.split(".")[1] for name in names} - {room})
    return counts


def order(counts: Counter[tuple[str, str]]) -> list[str]:
    """Every room after those that it imports, as far as that can be; of several the first by name."""
    left = sorted({room for pair in counts for room in pair})
    done: list[str] = []
    while left:
        waits = {
            room: sum(other in left and other != room for importer, other in counts if importer == room)
            for room in left
        }
        done.append(min(left, key=lambda room: (waits[room], room)))
        left.remove(done[-1])
    return done


def drawn(counts: Counter[tuple[str, str]], rooms: Sequence[str]) -> str:
    """The picture as SVG, dark text on light and light on dark, by the reader's setting."""
    size = _SIDE * len(rooms)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + size + 20}" height="{_TOP + size + 20}" '
        'font-family="sans-serif" font-size="13">',
        "<title>Rooms of tnpeft: each row imports the columns with a dot</title>",
        "<style>text{fill:#222}line{stroke:#ccc}circle{fill:#2a6fb0}circle.up{fill:#c0392b}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}line{stroke:#555}circle{fill:#6aaef0}}</style>",
    ]
    for place, room in enumerate(rooms):
        middle = _SIDE * place + _SIDE // 2
        parts += [
            f'<text x="{_LEFT - 10}" y="{_TOP + middle + 4}" text-anchor="end">{room}</text>',
            f'<text transform="translate({_LEFT + middle + 4},{_TOP - 10}) rotate(-60)">{room}</text>',
            f'<line x1="{_LEFT}" x2="{_LEFT + size}" y1="{_TOP + middle}" y2="{_TOP + middle}"/>',
            f'<line y1="{_TOP}" y2="{_TOP + size}" x1="{_LEFT + middle}" x2="{_LEFT + middle}"/>',
        ]
    for (room, other), count in sorted(counts.items()):
        row, column = rooms.index(room), rooms.index(other)
        x, y = _LEFT + _SIDE * column + _SIDE // 2, _TOP + _SIDE * row + _SIDE // 2
        kind = ' class="up"' if column > row else ""
        label = f"{count} file{'s' if count > 1 else ''} of {room} import{'' if count > 1 else 's'} {other}"
        radius = min(11.0, 3 + count**0.5)
        parts.append(f'<circle{kind} cx="{x}" cy="{y}" r="{radius:.1f}"><title>{label}</title></circle>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--check", action="store_true", help="draw nothing; exit with 1 if the picture is not current")
    options.add_argument("--out", type=Path, default=PICTURE, help="SVG file to write")
    arguments = options.parse_args()
    counts = imports_between_rooms()
    picture = drawn(counts, order(counts))
    if arguments.check:
        current = arguments.out.is_file() and arguments.out.read_text(encoding="utf-8") == picture
        sys.stdout.write("current\n" if current else f"{arguments.out} is not: run `python benchmarks/rooms.py`\n")
        sys.exit(0 if current else 1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
