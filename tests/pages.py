"""The pages in `docs`: their blocks of code, and which of them need libraries that `make test` does without."""

from __future__ import annotations

import re
from pathlib import Path

import tnpeft

__all__ = ["HEAVY", "LIGHT", "PAGES", "run"]

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
LIGHT = [
    page for page in PAGES if page.stem in ("README", "parameters", "peft", "search", "specs_from_python", "starts")
]
HEAVY = [page for page in PAGES if page not in LIGHT]
"""tests/wide runs these."""


def run(page: Path) -> dict[str, object]:
    """Run a page's blocks of Python in their order and read its recipes; the names that are known then."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        assert tnpeft.Recipe.from_yaml(block, page.name).entries
    return names
