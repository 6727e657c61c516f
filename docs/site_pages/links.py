"""Links between the repository's texts become links between the site's pages."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

__all__ = ["ROOT", "Links", "outside_code"]

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"(^```.*?^```[^\n]*$|^~~~.*?^~~~[^\n]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\(|(?:href|src)=\")([^)\"\s]+)([)\"])")
_OUTSIDE = re.compile(r"[a-z]+:")
_LINKED_TEXT = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def outside_code(text: str, change: re.Pattern[str], put: Callable[[re.Match[str]], str]) -> str:
    """`change` replaced outside fenced code by what `put` returns."""
    parts = _FENCE.split(text)
    parts[::2] = [change.sub(put, part) for part in parts[::2]]
    return "".join(parts)


@dataclass
class Links:
    """Where each source stands in the site.

    `pages` maps a file or folder of the repository to its page. `anchors` maps a heading of a text that becomes several
    pages to the page that has it. A file that is no page is copied to `files/`. A folder that is none is named, without
    a link.
    """

    target: Path
    pages: dict[str, str] = field(default_factory=dict)
    anchors: dict[tuple[str, str], str] = field(default_factory=dict)

    def rewritten(self, text: str, source: str, page: str) -> str:
        """The text of `source`, a path in the repository, as the site's `page` has it."""

        def named(found: re.Match[str]) -> str:
            mark, words, link = found.groups()
            return found[0] if mark or self._target(link, source) is not None else words

        def linked(found: re.Match[str]) -> str:
            before, link, after = found.groups()
            place = self._target(link, source)
            return found[0] if place is None else f"{before}{_relative(place, page)}{after}"

        return outside_code(outside_code(text, _LINKED_TEXT, named), _LINK, linked)

    def write(self, page: str, text: str, source: str) -> None:
        """Write a page whose links are those of `source`."""
        path = self.target / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.rewritten(text, source, page), encoding="utf-8")

    def _target(self, link: str, source: str) -> str | None:
        """The page (with its anchor) or copied file that a link leads to; None for a folder without a page."""
        if _OUTSIDE.match(link):
            return link
        path, _, anchor = link.partition("#")
        wanted = os.path.normpath(PurePosixPath(source).parent / path) if path else source
        page = self.anchors.get((wanted, anchor), self.pages.get(wanted)) if anchor else self.pages.get(wanted)
        if page is not None:
            return f"{page}#{anchor}" if anchor and "#" not in page else page
        if (ROOT / wanted).is_dir():
            return None
        return self._copied(wanted, source)

    def _copied(self, wanted: str, source: str) -> str:
        path = ROOT / wanted
        if not path.is_file():
            raise ValueError(f"{source}: a link leads to {wanted}, which is no file")
        if path.suffix == ".md":
            raise ValueError(
                f"{source}: a link leads to {wanted}, which `_TEXTS` in site_pages/assemble.py does not name"
            )
        place = f"files/{wanted}"
        (self.target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.target / place)
        return place


def _relative(place: str, page: str) -> str:
    if _OUTSIDE.match(place):
        return place
    path, mark, anchor = place.partition("#")
    here = path == page and mark
    return ("" if here else os.path.relpath(path, PurePosixPath(page).parent)) + mark + anchor
