"""A notebook as a page: its texts, its code, and what running it printed and drew."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

__all__ = ["page_of"]


def page_of(notebook: Path, folder: Path) -> str:
    """The page's text; pictures are written to `folder`."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = [_cell(cell, f"{notebook.stem}-{number}", folder) for number, cell in enumerate(cells)]
    return "\n".join(parts)


def _cell(cell: dict[str, Any], name: str, folder: Path) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return f"{text}\n"
    outputs = [_output(output, name, folder) for output in cell["outputs"]]
    return "\n".join([f"```python\n{text}\n```\n", *outputs])


def _output(output: dict[str, Any], name: str, folder: Path) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```\n"
    data = output["data"]
    if "image/png" in data:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(base64.b64decode(data["image/png"]))
        return f"![What the code above draws]({name}.png)\n"
    if "image/svg+xml" in data:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_text("".join(data["image/svg+xml"]), encoding="utf-8")
        return f"![What the code above draws]({name}.svg)\n"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```\n"
