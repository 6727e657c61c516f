"""The built site: strict, nothing loaded from outside, opened in a browser; and the notebooks, executed."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import ROOT

pytest.importorskip("zensical", reason="`make docs` and `make test-wide` install it, from Python 3.11 on")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Jupyter, on its own behalf

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MAX_NOTEBOOK_BYTES = 150_000
# The theme's script would load these for pages with a diagram, a lightbox, runnable code or a repository.
WANTED_BY_FEATURES = ("mermaid", "glightbox", "pyodide", "ace-builds", "resize-observer-polyfill", "api.github.com")


class Loads(HTMLParser):
    """What a page loads by itself, and marks that would make the theme's script load more."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.classes |= set((attributes.get("class") or "").split())
        if tag in ("img", "script", "iframe", "source", "video", "object", "embed"):
            self.addresses += [attributes[name] or "" for name in ("src", "srcset", "data") if name in attributes]
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(attributes.get("href") or "")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs" / "build_site.py"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "html"


def outside(text: str) -> list[str]:
    return re.findall(r"(?:https?:)?//[\w.-]+\.[\w./@-]+", text)


def test_pages_load_nothing_from_outside(html: Path):
    for page in html.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.addresses
        assert not [address for address in loads.addresses if outside(address)], page
        assert not loads.classes & {"mermaid", "glightbox", "md-source"}, page


def test_style_sheets_and_scripts_load_nothing_from_outside(html: Path):
    for sheet in html.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        targets = re.findall(r"(?:url\(|@import )[\"']?(?!data:)([^)\"']+)", text)
        assert not [target for target in targets if outside(target)], sheet
    for script in html.rglob("*.js"):
        named = outside(script.read_text(encoding="utf-8"))
        known = ("w3.org/", "//i.test", *WANTED_BY_FEATURES)  # names of XML, and the end of a regular expression
        unknown = [name for name in named if not any(word in name for word in known)]
        assert not unknown, script


def test_links_to_other_hosts_are_written_in_the_texts(html: Path):
    """None is the theme's or the builder's."""
    written = "".join(path.read_text(encoding="utf-8") for path in (html.parent / "pages").rglob("*.md"))
    for page in html.rglob("*.html"):
        for link in re.findall(r'href="?(https?://[^"\s>]+)', page.read_text(encoding="utf-8")):
            assert link.rstrip("/") in written, (page, link)


def test_texts_name_no_path_of_this_machine(html: Path):
    for page in (*html.rglob("*.html"), html / "search.json"):
        assert str(ROOT) not in page.read_text(encoding="utf-8"), page


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(BROWSER is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("page", ["index.html", "gallery/index.html", "api/attach_and_train.html"])
def test_a_browser_without_a_network_shows_it(html: Path, page: str, tmp_path: Path):
    log = tmp_path / "net.json"
    with served(html) as address:
        command = [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--log-net-log={log}",
            "--virtual-time-budget=4000",
            "--dump-dom",
            f"{address}/{page}",
        ]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        events = log.read_text(encoding="utf-8", errors="replace")
    # What the page asks for; the browser's own requests have another initiator.
    asked = [url for by, url in re.findall(r'"initiator":"([^"]*)"[^\n]*?"url":"([^"]+)"', events) if by == address]
    assert "<h1" in shown
    assert asked
    assert not [url for url in asked if not url.startswith(address)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_kept_small(notebook: Path, monkeypatch: pytest.MonkeyPatch):
    from run_notebooks import executed

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    kept = json.loads(notebook.read_text(encoding="utf-8"))
    again = executed(notebook)
    assert notebook.stat().st_size <= MAX_NOTEBOOK_BYTES
    assert not re.search(r"/(?:work|home|root|tmp|Users)/", notebook.read_text(encoding="utf-8"))
    for cell, other in zip(kept["cells"], again.cells, strict=True):
        for output, fresh in zip(cell.get("outputs", []), other.get("outputs", []), strict=True):
            assert output["output_type"] == fresh["output_type"]
            assert "".join(output.get("text", "")) == fresh.get("text", "")
            assert set(output.get("data", {})) == set(fresh.get("data", {}))
