"""The README and the links that a package index shows; `url` in pyproject.toml is the project's address, or empty."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?://|#)([^)]+)\)")


class ProjectLinks(MetadataHookInterface):
    """Relative links lead nowhere on an index: with an address they become whole ones."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling: `readme` and `urls` are dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        url = self.config["url"].rstrip("/")
        metadata["readme"] = {"content-type": "text/markdown", "text": whole_links(text, url) if url else text}
        metadata["urls"] = {"Source": url, "Changes": f"{url}/blob/main/CHANGELOG.md"} if url else {}


def whole_links(text: str, url: str) -> str:
    """Pictures are read as they are (`raw`), pages as the host shows them (`blob`)."""
    return _LINK.sub(lambda found: f"{found[1]}{found[2]}{url}/{'raw' if found[1] else 'blob'}/main/{found[3]})", text)
