"""What a page shows below the picture, as HTML; every text of a user's file is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tnpeft.editing.facts import Facts
from tnpeft.editing.reading import Mistake
from tnpeft.editing.session import Slow

__all__ = ["cores_html", "costs_html", "directions_html", "mistakes_html", "spread_html", "summary_html"]

_MODES = ("mode", "forward", "backward", "step", "FLOPs", "peak", "saved", "")
_MOST_SHOWN = 12  # mistakes


def summary_html(facts: Facts) -> str:
    """The parameter count with its formula, scale, start and einsum."""
    formula = f" = {facts.formula}" if facts.formula else ""
    rows = [
        ("parameters", f"<strong>{facts.parameters:,}</strong>{escape(formula)}"),
        ("of the weight", f"{facts.share:.2%} of {facts.weight}"),
        ("scale", f"{facts.scale:.6g}"),
        ("start", escape(facts.start) + (f", compose: {escape(facts.compose)}" if facts.compose else "")),
        ("einsum", f"<code>{escape(facts.einsum)}</code>"),
    ]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows) + "</dl>"


def cores_html(facts: Facts) -> str:
    return _table(("core", "legs", "shape", "init", "elements"), facts.cores, right=(4,))


def costs_html(slow: Slow) -> str:
    """The contraction path, and time and memory of each mode."""
    if slow.answer is None:
        return _waiting(slow)
    answer = slow.answer
    table = _table(_MODES, answer["rows"], right=(1, 2, 3, 4, 5, 6))
    return f"<p>auto: {escape(answer['auto'])}</p>{table}<pre>{escape(answer['path'])}</pre>"


def spread_html(slow: Slow) -> str:
    """Standard deviations of T and of the first step, relative to the weight's."""
    if slow.answer is None:
        return _waiting(slow)
    if not slow.answer:
        return "<p>No start on this layer.</p>"
    row: dict[str, Any] = slow.answer
    ratio = f"{row['network_ratio']:.3g}" if row["start"] == "frozen_copy" else "starts at 0"
    steps = sorted(row["steps"].items(), key=lambda item: -item[1])
    whole = sum(row["steps"].values()) or 1.0
    shares = ", ".join(f"{name} {share / whole:.0%}" for name, share in steps[:4] if share)
    columns = ("std W", "std T / std W", "first step / std W", "by core")
    table = _table(columns, [(f"{row['weight']:.3g}", ratio, f"{row['step_ratio']:.2g}", shares)], right=(0, 1, 2))
    advice = f"<p>{escape(row['advice'])}</p>" if row["advice"] else ""
    note = f"The first step is Adam's, at learning rate {row['rate']:g}, for a random gradient."
    return f"{table}<p class='tn-note'>{note}</p>{advice}"


def directions_html(slow: Slow) -> str:
    """The share of directions in which the first steps move."""
    return _waiting(slow) if slow.answer is None else f"<p>{escape(slow.answer['text'])}</p>"


def mistakes_html(mistakes: Sequence[Mistake]) -> str:
    """Each mistake with its line, which can be clicked."""
    rows = [
        f"<li data-line='{mistake.line}' data-column='{mistake.column}' tabindex='0'>"
        + (f"<b>{mistake.line}:{mistake.column}</b> " if mistake.has_place else "")
        + f"{escape(mistake.text)}</li>"
        for mistake in mistakes[:_MOST_SHOWN]
    ]
    if len(mistakes) > _MOST_SHOWN:
        rows.append(f"<li>and {len(mistakes) - _MOST_SHOWN} more</li>")
    return f"<ul>{''.join(rows)}</ul>" if rows else ""


def _waiting(slow: Slow) -> str:
    return f"<p>{escape(slow.refused)}</p>" if slow.refused else "<p>computing ...</p>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marks = (" class='tn-right'" if number in right else "" for number in range(len(cells)))
        inner = (f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<div class='tn-scroll'><table><thead>{row(columns, 'th')}</thead><tbody>{body}</tbody></table></div>"
