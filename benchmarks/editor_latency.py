"""How long after a keystroke does the page of `tnpeft edit` show mistakes, counts and the picture?

The spec is TenVOO-L with its ten cores. Three kinds of keystroke: another digit of a param, which leaves the network's
form; an index less, which changes it; a mistake, which shows no picture. `wall` begins at the keystroke and holds the
20 ms in which another one would replace it; `cpu` is this process's own time, which other work on the machine changes
little. With `--browser` (chromium, chromedriver and selenium) the keystrokes are made in the page of a server of its
own, and end when the new picture is painted.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

from tnpeft.editing.background import Refused
from tnpeft.editing.document import shipped_text
from tnpeft.editing.session import Session, View
from tnpeft.editing.tables import cores_html, mistakes_html, summary_html
from tnpeft.editing.trial import Trial

SPEC = "tenvoo_l"
COLUMNS = ("keystroke", "first answer, wall ms", "picture, wall ms", "90 %", "cpu ms", "least")
Change = Callable[[str, int], str]


def another_digit(text: str, number: int) -> str:
    return text.replace("{r: 4}", f"{{r: {2 + number % 6}}}")


def an_index_less(text: str, number: int) -> str:
    return text.replace("kw k l m", "kw k l").replace("o3 m n p", "o3 n p") if number % 2 else text


def a_mistake(text: str, number: int) -> str:
    return text.replace("kw k l m", f"kw k l m{number}")


KEYSTROKES: dict[str, Change] = {"digit": another_digit, "index": an_index_less, "mistake": a_mistake}


def main() -> None:
    options = common.parser(__doc__, "editor_latency.json")
    options.add_argument("--count", type=int, default=30, help="keystrokes of each kind")
    options.add_argument("--browser", action="store_true", help="measure the page in Chromium too")
    arguments = options.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    results = {name: asyncio.run(served(change, arguments.count)) for name, change in KEYSTROKES.items()}
    rows = [[name, *(f"{row.get(key, 0):.0f}" for key in ("first", "wall", "most", "cpu", "least"))]
            for name, row in results.items()]  # fmt: skip
    common.show(f"From a keystroke to the answer, {SPEC}, load {load}", COLUMNS, rows)
    found: dict[str, Any] = {"spec": SPEC, "load": load, "server": results}
    if arguments.browser:
        times = painted(arguments.count)
        found["browser"] = {"median": statistics.median(times), "least": min(times), "times": times}
        print(f"In Chromium, until it is painted: median {statistics.median(times):.0f} ms, least {min(times):.0f}")
    common.write(arguments.out, found)


class Nobody:
    """In place of the second process: what comes behind a picture is not measured."""

    async def ask(self, stage: str, text: str, trial: Trial) -> dict[str, Any]:
        raise Refused("")


async def served(change: Change, count: int) -> dict[str, float]:
    """Milliseconds from `edit` to the first view and to the picture; where there is none, to the mistakes."""
    text = shipped_text(SPEC)
    seen: list[tuple[float, float, bytes | None]] = []

    def show(view: View) -> None:
        mistakes_html(view.mistakes)
        if view.facts is not None:
            summary_html(view.facts), cores_html(view.facts)
        seen.append((time.perf_counter(), time.process_time(), view.svg))

    session = Session(text, "<spec>", Nobody(), show)  # type: ignore[arg-type]
    session.edit()
    await session.settled()
    first, wall, cpu = [], [], []
    for number in range(count):
        before = session.view.svg
        seen.clear()
        began, used = time.perf_counter(), time.process_time()
        session.edit(change(text, number))
        await session.settled()
        at, busy, _ = next((view for view in seen if view[2] is not before), seen[0])
        first.append(seen[0][0] - began)
        wall.append(at - began)
        cpu.append(busy - used)
    session.close()
    found = {"first": statistics.median(first), "wall": statistics.median(wall), "most": sorted(wall)[count * 9 // 10]}
    found |= {"cpu": statistics.median(cpu), "least": min(cpu)}
    return {name: 1e3 * seconds for name, seconds in found.items()}


def painted(count: int) -> list[float]:
    """Milliseconds in the page, from another digit until the new picture is painted."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "wide"))
    from browser import edited, opened

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with edited(folder, "mine.yaml", "--from", SPEC) as address, opened(address, folder) as page:
            time.sleep(10)  # what comes behind the first picture
            return page.keystrokes(count)


if __name__ == "__main__":
    main()
