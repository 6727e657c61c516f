"""The page: YAML on the left, the picture on the right, facts on the network below. Needs NiceGUI."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from nicegui import ui

from tnpeft.editing.background import Background
from tnpeft.editing.document import Document, shipped_text
from tnpeft.editing.facts import attach_line
from tnpeft.editing.reading import Mistake
from tnpeft.editing.session import Session, View
from tnpeft.editing.tables import (
    cores_html,
    costs_html,
    directions_html,
    mistakes_html,
    spread_html,
    summary_html,
)
from tnpeft.editing.trial_fields import TrialFields
from tnpeft.errors import TnpeftError
from tnpeft.spec import list_specs

__all__ = ["Page"]

ASSETS = Path(__file__).parent / "assets"
_EXPORTS = {"svg": "image/svg+xml", "png": "image/png", "pdf": "application/pdf"}


class Page:
    """One open page and its session."""

    def __init__(self, document: Document, background: Background, url: str, text: str) -> None:
        self.document = document
        self.session = Session(text, document.label, background, self.show)
        self._shown_svg: bytes | None = None
        self._shown_mistakes: tuple[Mistake, ...] | None = None
        self._url = url
        self._build()
        self.session.edit()

    def close(self) -> None:
        self.session.close()

    # What is on the page.

    def _build(self) -> None:
        ui.add_head_html(f'<link rel="stylesheet" href="{self._url}/assets/page.css">')
        ui.query("body").classes("tn-body")
        with ui.element("header").classes("tn-bar"):
            self._build_bar()
        with ui.element("main").classes("tn-main"):
            with ui.element("section").classes("tn-left").props('aria-label="YAML"'):
                self._build_editor()
            with ui.element("section").classes("tn-right-side").props('aria-label="Network"'):
                self._build_network()
        ui.add_body_html(f'<script type="module" src="{self._url}/assets/page.js"></script>')
        ui.run_javascript(f"window.tnEditor = {self.editor.id}; window.tnStart?.({self.editor.id})")

    def _build_bar(self) -> None:
        ui.label("tnpeft edit").classes("tn-title")
        self.file = ui.label().classes("tn-file").mark("file")
        self._show_file()
        ui.space()
        names = list(list_specs())
        start = ui.select(names, label="New from", with_input=True, on_change=self._start_from)
        start.classes("tn-start").props("dense outlined options-dense").mark("new-from")
        save = ui.button("Save", on_click=self._save).props("dense no-caps unelevated").classes("tn-save")
        save.set_enabled(self.document.path is not None)
        with ui.button("Export").props("dense no-caps outline").classes("tn-export"), ui.menu():
            for suffix in _EXPORTS:
                ui.menu_item(suffix.upper(), lambda suffix=suffix: self._export(suffix))
            ui.menu_item("YAML", self._download)
        ui.button("Copy attach", on_click=self._copy).props("dense no-caps outline").classes("tn-copy")
        toggle = ui.button("◐", on_click=self._toggle).props('dense flat aria-label="Dark or light"')
        toggle.classes("tn-dark")

    def _build_editor(self) -> None:
        self.editor = ui.codemirror(
            self.session.view.text, language="YAML", on_change=lambda event: self._typed(event.value), indent="  "
        ).classes("tn-editor")
        self.problems = ui.html("", sanitize=False).classes("tn-mistakes").props("role=status aria-live=polite")

    def _build_network(self) -> None:
        with ui.element("figure").classes("tn-picture") as self.figure:
            self.image = ui.element("img").props('alt="The network"').mark("picture")
        self.fields = TrialFields(lambda trial: self.session.edit(trial=trial))
        self.attach = ui.code("", language="python").classes("tn-attach")
        self.parts: dict[str, ui.html] = {}
        for name, title in (
            ("summary", "Parameters"),
            ("cores", "Cores"),
            ("costs", "Path and modes"),
            ("spread", "Start"),
            ("directions", "Directions"),
        ):
            with ui.element("section").classes(f"tn-part tn-{name}"):
                ui.label(title).classes("tn-heading")
                self.parts[name] = ui.html("", sanitize=False).classes("tn-content")

    # What the session says.

    def show(self, view: View) -> None:
        """Show a view; what did not change is left as it is."""
        if view.mistakes != self._shown_mistakes:
            self._shown_mistakes = view.mistakes
            self.problems.set_content(mistakes_html(view.mistakes))
            self.editor.run_method("setDecorations", _underlined(view.text, view.mistakes))
        if view.spec is not None:
            self.fields.show(view)
        self.figure.classes(remove="tn-stale") if view.is_current else self.figure.classes("tn-stale")
        if view.svg is not None and view.svg is not self._shown_svg:
            self._shown_svg = view.svg
            self.image.props["src"] = "data:image/svg+xml;base64," + base64.b64encode(view.svg).decode()
            self.image.props["data-version"] = str(hash(view.svg))
        if view.facts is not None and view.network is not None:
            self._fill("summary", summary_html(view.facts), view.is_current)
            self._fill("cores", cores_html(view.facts), view.is_current)
            self.attach.set_content(attach_line(self._name(view), view.network, view.trial))
        for stage, html in (("costs", costs_html), ("spread", spread_html), ("directions", directions_html)):
            slow = view.slow[stage]
            self._fill(stage, html(slow), slow.current)
        self._show_file()

    def _fill(self, name: str, content: str, current: bool) -> None:
        part = self.parts[name]
        if part.content != content:
            part.set_content(content)
        part.classes(remove="tn-stale") if current else part.classes("tn-stale")

    def _show_file(self) -> None:
        document = self.document
        if document.path is None:
            self.file.set_text("no file: download the text to keep it")
            return
        unsaved = self.session.view.text != document.text
        self.file.set_text(f"{document.path.name}{' (not saved)' if unsaved else ''}")

    def _name(self, view: View) -> str:
        """The name for the `attach` line: the file, or the shipped name if the text is that spec's."""
        if self.document.path is not None:
            return str(self.document.path)
        assert view.network is not None
        return f"{view.network.spec.name}.yaml"

    # What the user does.

    def _typed(self, text: str) -> None:
        self.session.edit(text)

    def _start_from(self, event: Any) -> None:
        if event.value is None:
            return
        text = shipped_text(event.value)
        self.editor.set_value(text)
        self.session.edit(text, new=True)
        event.sender.set_value(None)

    async def _save(self) -> None:
        text = self.session.view.text
        try:
            if not self.document.save(text):
                chosen = await self._ask()
                if chosen == "over":
                    self.document.save(text, over_changes=True)
                elif chosen == "reload":
                    self.editor.set_value(self.document.reload())
                    self.session.edit(self.document.text)
                if chosen != "over":
                    return
        except TnpeftError as error:
            ui.notify(str(error), type="negative")
            return
        self._show_file()
        ui.notify(f"saved {self.document.path}", type="positive")

    async def _ask(self) -> str | None:
        with ui.dialog() as dialog, ui.card():
            ui.label("The file has changed on the disk since this page read it.")
            with ui.row():
                ui.button("Write over it", on_click=lambda: dialog.submit("over")).props("no-caps color=negative")
                ui.button("Read it again", on_click=lambda: dialog.submit("reload")).props("no-caps")
                ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("no-caps flat")
        chosen = await dialog
        dialog.delete()
        return str(chosen) if chosen else None

    async def _export(self, suffix: str) -> None:
        view = self.session.view
        if view.network is None:
            ui.notify("There is no picture yet.", type="warning")
            return
        data = await self.session.export(suffix)
        ui.download.content(data, f"{view.network.spec.name}.{suffix}", _EXPORTS[suffix])

    def _download(self) -> None:
        view = self.session.view
        name = self.document.path.name if self.document.path else f"{view.spec.name if view.spec else 'spec'}.yaml"
        ui.download.content(view.text, name, "application/yaml")

    def _copy(self) -> None:
        view = self.session.view
        if view.network is None:
            ui.notify("There is no network yet.", type="warning")
            return
        ui.clipboard.write(attach_line(self._name(view), view.network, view.trial))
        ui.notify("attach line copied", type="positive")

    def _toggle(self) -> None:
        ui.run_javascript("tnDark()")


def _underlined(text: str, mistakes: tuple[Mistake, ...]) -> list[dict[str, Any]]:
    """The marks under mistakes, with their offsets in the text."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    marks = []
    for mistake in mistakes:
        if mistake.has_place and mistake.line < len(starts):
            first = starts[mistake.line - 1] + mistake.column - 1
            last = min(starts[mistake.line - 1] + mistake.end - 1, len(text))
            if first < last:
                attributes = {"title": mistake.text}
                marks.append(
                    {"kind": "mark", "from": first, "to": last, "class": "tn-mistake", "attributes": attributes}
                )
    return marks
