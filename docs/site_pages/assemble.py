"""Every page of the site, in a folder: the repository's texts, and what is made from specs and docstrings."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from site_pages.api import write_api
from site_pages.gallery import note_gallery, write_gallery
from site_pages.language import note_language, write_language
from site_pages.links import ROOT, Links
from site_pages.notebooks import write_notebook

__all__ = ["CONFIG", "assemble"]

HERE = Path(__file__).parent
CONFIG = HERE / "mkdocs.yml"
_TEXTS = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "examples/results/README.md": "results.md",
    "examples/bundle/docs/README.md": "bundle.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}


def assemble(folder: Path) -> None:
    """Write `folder/mkdocs.yml` and `folder/pages`; what was there before goes."""
    shutil.rmtree(folder, ignore_errors=True)
    links = Links(folder / "pages")
    texts = _TEXTS | {
        f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"
    }
    notebooks = {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    links.pages |= texts | notebooks | {"docs": "pages.md", "examples": "examples.md", "benchmarks": "benchmarks.md"}
    note_language(links)
    note_gallery(links)
    for source, page in texts.items():
        links.write(page, (ROOT / source).read_text(encoding="utf-8"), source)
    for source in notebooks:
        write_notebook(links, source)
    write_language(links)
    write_gallery(links)
    write_api(links)
    _check_navigation(links.target)
    code = os.path.relpath(ROOT, folder)  # whose docstrings are read
    (folder / CONFIG.name).write_text(CONFIG.read_text(encoding="utf-8").replace("../..", code), encoding="utf-8")
    shutil.copyfile(HERE / "style.css", links.target / "style.css")


def _check_navigation(target: Path) -> None:
    """Every page but those of the gallery's specs stands in the navigation, which names no other."""
    named = re.findall(r"^ +- .*: (\S+\.md)$", CONFIG.read_text(encoding="utf-8"), re.MULTILINE)
    written = {path.relative_to(target).as_posix() for path in target.rglob("*.md")}
    pages = {page for page in written if not page.startswith("gallery/") or page == "gallery/index.md"}
    if odd := sorted(pages ^ set(named)):
        raise ValueError(f"{CONFIG.name}: pages that `nav` lacks, or that nobody writes: {', '.join(odd)}")
