"""One HTML page with everything inside it: it opens without a network, in light and in dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_lab.study.tables import Table, as_html
from ddpm_lab.support.durable import write_whole

__all__ = ["Picture", "Section", "write_page"]

DENSITY = 1.5  # pictures have this many pixels for one of the page
WIDE = 1112  # pixels of a screen from which on plots stand beside each other

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #52606d; --paper: #ffffff; --panel: #f6f8fa;
  --line: #dfe4ea; --accent: #0072b2; --note: #fff7e0; --note-line: #e0b84c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a9b4bf; --paper: #161b22; --panel: #1e252d;
  --line: #343c46; --accent: #56b4e9; --note: #2c2617; --note-line: #a8862b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header { max-width: 1300px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 52px 0 8px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { max-width: 78ch; margin: 8px 0; }
.meta { color: var(--soft); font-size: 14px; }
.caveat { background: var(--note); border-left: 4px solid var(--note-line); padding: 10px 16px; margin: 18px 0;
  max-width: 84ch; border-radius: 0 6px 6px 0; font-size: 15px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 18px 0 0; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: 14px 0 10px; }
.hint { display: none; color: var(--soft); font-size: 13px; margin: 10px 0 -8px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 5px 6px; text-align: right; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom; }
thead th.group { text-align: center; color: var(--ink); border-bottom: 2px solid var(--line); }
thead th:first-child, tbody th { text-align: left; font-weight: 500; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr:hover { background: var(--panel); }
tbody tr.reference th, tbody tr.reference td { color: var(--soft); font-style: italic; }
.first { border-left: 1px solid var(--line); }
.best { font-weight: 700; }
.pm { color: var(--soft); font-weight: 400; font-size: 11.5px; }
ul.notes { margin: 4px 0 0; padding-left: 18px; color: var(--soft); font-size: 13.5px; max-width: 100ch; }
figure { margin: 18px 0 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
figcaption { color: var(--soft); font-size: 13.5px; margin-top: 6px; max-width: 100ch; }
details { margin: 14px 0; }
summary { cursor: pointer; color: var(--accent); font-size: 14.5px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; font-size: 14px; margin: 12px 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 14px; border-radius: 6px; overflow: auto; font-size: 12.5px;
  max-height: 480px; }
footer { height: 60px; }
@media (max-width: 699px) {
  main, header { padding-left: 16px; padding-right: 16px; }
  .hint { display: block; }
  .scroll { border-right: 2px solid var(--accent); }
  .scroll table tr > :first-child { position: sticky; left: 0; background: var(--paper); z-index: 1;
    min-width: 96px; max-width: 40vw; white-space: normal; box-shadow: 1px 0 0 var(--line); padding-right: 8px; }
}
@media print { nav, details { display: none; } h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""
HINT = '<p class="hint">Scroll a table sideways for its other columns &rarr;</p>'


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the page, the same for dark and for narrow screens, and what it shows."""

    path: Path
    caption: str
    dark: bytes | None = None
    narrow: bytes | None = None
    narrow_dark: bytes | None = None


@dataclass
class Section:
    """A heading with its text, tables and pictures; `details` are tables that open on request."""

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)


def write_page(
    path: Path,
    title: str,
    lead: str,
    caveat: str,
    sections: Sequence[Section],
    facts: Sequence[tuple[str, str]],
    settings: str,
) -> None:
    """Write the page; `facts` are the machine and the versions, `settings` the whole configuration as text."""
    links = "".join(f'<a href="#{each.key}">{html.escape(each.title)}</a>' for each in sections)
    body = "".join(_section(each) for each in sections)
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    warning = f'<p class="caveat">{html.escape(caveat)}</p>' if caveat else ""
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>'
        f'<header><h1>{html.escape(title)}</h1><p class="meta">{html.escape(lead)}</p>{warning}'
        f'<nav>{links}<a href="#setup">Setup</a></nav></header>'
        f'<main>{body}<section id="setup"><h2>Setup</h2><dl>{rows}</dl>'
        f"<details><summary>All settings</summary><pre>{html.escape(settings)}</pre></details></section></main>"
        "<footer></footer></body></html>\n"
    )
    write_whole(path, text.encode())


def _section(section: Section) -> str:
    text = "".join(f"<p>{html.escape(each)}</p>" for each in section.text)
    tables = "".join(HINT + as_html(table) + _notes(table) for table in section.tables)
    pictures = "".join(_figure(each) for each in section.pictures)
    details = "".join(f"<h3>{html.escape(table.title)}</h3>{HINT}{as_html(table)}" for table in section.details)
    if details:
        details = f"<details><summary>Every metric, one table for each data set</summary>{details}</details>"
    return (
        f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>{text}{tables}{details}{pictures}</section>'
    )


def _notes(table: Table) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _figure(picture: Picture) -> str:
    narrow, dark = f"(max-width: {WIDE - 1}px)", "(prefers-color-scheme: dark)"
    others = ((f"{narrow} and {dark}", picture.narrow_dark), (narrow, picture.narrow), (dark, picture.dark))
    sources = "".join(
        f'<source media="{media}" srcset="{_embedded(png)}" {_size(png)}>' for media, png in others if png is not None
    )
    png, caption = picture.path.read_bytes(), html.escape(picture.caption)
    return (
        f'<figure><picture>{sources}<img src="{_embedded(png)}" {_size(png)} alt="{caption}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _size(png: bytes) -> str:
    """Width and height on the page, from the header of the file."""
    width, height = (round(int.from_bytes(png[at : at + 4], "big") / DENSITY) for at in (16, 20))
    return f'width="{width}" height="{height}"'


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
