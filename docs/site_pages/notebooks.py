"""A notebook as a page: its texts, its code, and what running it printed and drew."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from site_pages.links import ROOT, Links

__all__ = ["write_notebook"]

_PICTURES: dict[str, tuple[str, Callable[[str], bytes]]] = {
    "image/png": ("png", base64.b64decode),
    "image/svg+xml": ("svg", str.encode),
}


def write_notebook(links: Links, source: str) -> None:
    """Write the page of a notebook, and beside it the pictures that the notebook holds."""
    page = links.pages[source]
    cells = json.loads((ROOT / source).read_text(encoding="utf-8"))["cells"]
    stem = source.removesuffix(".ipynb")
    parts = [part for number, cell in enumerate(cells) for part in _cell(links, cell, f"{stem}-{number}")]
    links.write(page, "\n".join(parts), source)


def _cell(links: Links, cell: dict[str, Any], name: str) -> list[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [f"{text}\n"]
    return [f"```python\n{text}\n```\n", *(_output(links, output, name) for output in cell["outputs"])]


def _output(links: Links, output: dict[str, Any], name: str) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```\n"
    data = output["data"]
    for kind, (suffix, decoded) in _PICTURES.items():
        if kind in data:
            picture = f"{name}.{suffix}"
            links.pages[picture] = picture
            path = links.target / picture
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(decoded("".join(data[kind])))
            return f"![What the code above draws]({path.name})\n"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```\n"
