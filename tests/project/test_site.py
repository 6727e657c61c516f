"""The site's pages, before they are built: links rewritten, code that a test runs. tests/wide builds them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, check_command, commands
from site_pages.api import PAGES as API
from site_pages.assemble import assemble
from site_pages.links import Links

import tnpeft

TESTED = [*PAGES, ROOT / "README.md", ROOT / "specs" / "README.md", *(ROOT / "notebooks").glob("*.ipynb")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assemble(folder)
    return folder / "pages"


def test_every_spec_has_a_page_with_its_picture_formula_and_file(site: Path):
    index = (site / "gallery" / "index.md").read_text(encoding="utf-8")
    assert f"All {len(tnpeft.list_specs())} specs" in index
    for name in tnpeft.list_specs():
        text = (site / "gallery" / f"{name}.md").read_text(encoding="utf-8")
        assert f"]({name}.md)" in index
        assert (site / "files" / "specs" / "pictures" / f"{name}.svg").is_file()
        assert f"![{name}](../files/specs/pictures/{name}.svg)" in text
        assert "| update | `" in text
        assert tnpeft.load_spec(name).text.strip() in text


def test_a_spec_s_page_has_its_row_of_the_table_of_truth(site: Path):
    text = (site / "gallery" / "lora.md").read_text(encoding="utf-8")
    assert re.search(r"^\| PEFT [\d.]+ \| LORA \| yes \| yes \| yes \|", text, re.MULTILINE)
    assert "Beside other code" not in (site / "gallery" / "tenvoo_l.md").read_text(encoding="utf-8")


def test_the_language_is_whole(site: Path):
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "language").glob("*.md"))
    source = (ROOT / "specs" / "README.md").read_text(encoding="utf-8").partition("## Shipped specs")[0]
    assert sorted(blocks(source, "yaml")) == sorted(blocks(pages, "yaml"))


def test_every_public_name_stands_in_the_api(site: Path):
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.md"))
    assert set(re.findall(r"^::: tnpeft\.(\w+)$", text, re.MULTILINE)) >= set(tnpeft.__all__) - {"__version__"}
    assert len(API) == len([*(site / "api").glob("*.md")]) - 1


def test_all_python_on_the_site_is_run_by_a_test_and_commands_can_be_typed(site: Path):
    known = "\n".join(path.read_text(encoding="utf-8") for path in TESTED)
    for path in site.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "notebooks":  # of these, the notebook runs
            for block in blocks(text, "python"):
                assert block in known, path
        for line in commands(text):
            check_command(line)


def test_links_become_pages_copies_or_plain_words(tmp_path: Path):
    links = Links(
        tmp_path,
        {"docs/a.md": "a.md", "specs/README.md": "language/index.md"},
        {("specs/README.md", "maps"): "language/maps.md"},
    )
    text = (
        "[a](../docs/a.md#x) [m](README.md#maps) [all](README.md) [folder](peers) [file](lora.yaml) [out](https://example.org)\n"
        "![p](pictures/lora.svg)\n```\n[code](nowhere.md)\n```\n"
    )
    assert links.rewritten(text, "specs/README.md", "language/index.md") == (
        "[a](../a.md#x) [m](maps.md#maps) [all](index.md) folder [file](../files/specs/lora.yaml) [out](https://example.org)\n"
        "![p](../files/specs/pictures/lora.svg)\n```\n[code](nowhere.md)\n```\n"
    )
    assert (tmp_path / "files" / "specs" / "lora.yaml").read_text() == (ROOT / "specs" / "lora.yaml").read_text()
    with pytest.raises(ValueError, match=r"docs/a\.md: a link leads to docs/gone\.md, which is no file"):
        links.rewritten("[gone](gone.md)", "docs/a.md", "a.md")
