"""The reference in `specs/README.md`, one page for each group of headings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from site_pages.links import ROOT, Links

__all__ = ["note_language", "write_language"]

SOURCE = "specs/README.md"
_PAGES = {
    "language/index.md": ("A first spec", "All keys"),
    "language/networks.md": ("Cores and indices", "Sizes", "Weight", "Inits", "Params and scale", "Start"),
    "language/layers.md": ("One file for every kind of layer", "Factors"),
    "language/cores.md": ("Frozen cores", "Shared cores", "Cores of the base weight", "Terms", "DoRA"),
    "language/derived.md": (
        "References and grouped legs",
        "Derived cores",
        "Maps",
        "Index cores",
        "Entries by their positions",
        "Starting at a value",
    ),
    "language/recipes.md": ("Recipes",),
    "language/files.md": ("YAML", "Editors", "Mistakes", "Limits"),
    "peers.md": ("Beside other code",),
}
_TITLES = {
    "language/networks.md": "Networks: cores, sizes, weight, inits",
    "language/layers.md": "Kinds of layers, and factors",
    "language/cores.md": "Frozen and shared cores, the base weight, terms, DoRA",
    "language/derived.md": "Version 2: derived cores, maps, index cores",
    "language/recipes.md": "Recipes",
    "language/files.md": "YAML, editors, mistakes, limits",
    "peers.md": "Beside other code",
}
_ELSEWHERE = {"Shipped specs": "gallery/index.md#all-specs"}  # the gallery is made from the same files


@dataclass(frozen=True)
class _Reference:
    head: str
    sections: dict[str, str]


def note_language(links: Links) -> None:
    """Say which page has which heading, before any text links there. A heading that no page has is a mistake."""
    reference = _read()
    known = {heading for headings in _PAGES.values() for heading in headings} | set(_ELSEWHERE)
    if known != set(reference.sections):
        odd = ", ".join(sorted(known ^ set(reference.sections)))
        raise ValueError(f"{SOURCE}: headings that the site's pages do not have, or have beyond it: {odd}")
    links.pages[SOURCE] = "language/index.md"
    for page, headings in _PAGES.items():
        links.anchors |= {(SOURCE, _anchor(heading)): page for heading in headings}
        for heading in headings:
            below = re.findall(r"^### (.*)$", reference.sections[heading], re.MULTILINE)
            links.anchors |= {(SOURCE, _anchor(title)): page for title in below}
    links.anchors |= {(SOURCE, _anchor(heading)): page for heading, page in _ELSEWHERE.items()}


def write_language(links: Links) -> None:
    """Write every page of `_PAGES`."""
    reference = _read()
    for page, headings in _PAGES.items():
        text = reference.head if page == "language/index.md" else f"# {_TITLES[page]}\n"
        alone = len(headings) == 1
        for heading in headings:
            text += ("" if alone else f"\n## {heading}\n") + reference.sections[heading]
        links.write(page, _without_marks(text), SOURCE)


def _read() -> _Reference:
    head, *parts = re.split(r"^## (.*)\n", (ROOT / SOURCE).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return _Reference(head, dict(zip(parts[::2], parts[1::2], strict=True)))


def _without_marks(text: str) -> str:
    return re.sub(r"^<!-- .* -->\n?", "", text, flags=re.MULTILINE)


def _anchor(heading: str) -> str:
    """As the site and the repository's host both name a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
