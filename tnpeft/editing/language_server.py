"""`tnpeft lsp`: mistakes, hover and completion for editors that speak the Language Server Protocol. Needs pygls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lsprotocol import types
from pygls.lsp.server import LanguageServer

from tnpeft.editing.completion import complete
from tnpeft.editing.hover import hover_at
from tnpeft.editing.reading import Mistake, bound, mistakes_of, read_spec
from tnpeft.editing.trial import typical_trial
from tnpeft.errors import TnpeftError
from tnpeft.network import Layer, Network, Spec
from tnpeft.version import __version__

__all__ = ["language_server"]

_OURS = re.compile(r"^(tnpeft|cores|adapters)[ ]*:", re.MULTILINE)  # one of these keys makes a YAML file ours
_KINDS = {
    "key": types.CompletionItemKind.Property,
    "value": types.CompletionItemKind.EnumMember,
    "name": types.CompletionItemKind.Variable,
    "snippet": types.CompletionItemKind.Snippet,
}


class _LastGood:
    """For each document the last spec without a mistake, and its network on a layer."""

    def __init__(self, layer: Layer | None) -> None:
        self._layer = layer
        self.specs: dict[str, Spec] = {}
        self.networks: dict[str, Network] = {}

    def keep(self, uri: str, spec: Spec) -> tuple[Mistake, ...]:
        """Remember a spec; returns the mistakes that keep it off the layer that was asked for."""
        self.specs[uri] = spec
        layer = self._layer
        if layer is None or layer.kind not in spec.layers:
            try:
                layer = typical_trial(spec).layer()
            except TnpeftError:
                return ()
        network, mistakes = bound(spec, layer, {}, spec.file)
        if network is not None:
            self.networks[uri] = network
        return mistakes

    def forget(self, uri: str) -> None:
        self.specs.pop(uri, None)
        self.networks.pop(uri, None)


def language_server(layer: Layer | None = None) -> LanguageServer:
    """The server; sizes and shapes are those on `layer`, or on a typical one that the spec takes."""
    server = LanguageServer("tnpeft", f"v{__version__}")
    good = _LastGood(layer)

    def check(server: LanguageServer, params: Any) -> None:
        document = server.workspace.get_text_document(params.text_document.uri)
        found = _mistakes(document, good)
        diagnostics = [_diagnostic(mistake, document) for mistake in found]
        server.text_document_publish_diagnostics(
            types.PublishDiagnosticsParams(document.uri, diagnostics, version=document.version)
        )

    for event in (types.TEXT_DOCUMENT_DID_OPEN, types.TEXT_DOCUMENT_DID_CHANGE, types.TEXT_DOCUMENT_DID_SAVE):
        server.feature(event)(check)

    def close(server: LanguageServer, params: types.DidCloseTextDocumentParams) -> None:
        good.forget(params.text_document.uri)
        server.text_document_publish_diagnostics(types.PublishDiagnosticsParams(params.text_document.uri, []))

    def hover(server: LanguageServer, params: types.HoverParams) -> types.Hover | None:
        document = server.workspace.get_text_document(params.text_document.uri)
        if not _OURS.search(document.source):
            return None
        line, column = _place(document, params.position)
        found = hover_at(document.source, line, column, good.networks.get(document.uri))
        if found is None:
            return None
        span = _span(document, found.line, found.start, found.end)
        return types.Hover(types.MarkupContent(types.MarkupKind.PlainText, found.text), span)

    def completion(server: LanguageServer, params: types.CompletionParams) -> list[types.CompletionItem]:
        document = server.workspace.get_text_document(params.text_document.uri)
        if document.source.strip() and not _OURS.search(document.source):
            return []
        line, column = _place(document, params.position)
        found, cursor = complete(document.source, line, column, good.specs.get(document.uri))
        span = _span(document, line, cursor.start + 1, column)
        return [
            types.CompletionItem(
                item.label,
                kind=_KINDS[item.kind],
                documentation=item.detail or None,
                text_edit=types.TextEdit(span, item.text),
                sort_text=f"{number:04}",
            )
            for number, item in enumerate(found)
        ]

    server.feature(types.TEXT_DOCUMENT_DID_CLOSE)(close)
    server.feature(types.TEXT_DOCUMENT_HOVER)(hover)
    options = types.CompletionOptions(trigger_characters=[":", " ", "{", "["])
    server.feature(types.TEXT_DOCUMENT_COMPLETION, options)(completion)
    return server


def _mistakes(document: Any, good: _LastGood) -> tuple[Mistake, ...]:
    text: str = document.source
    if not _OURS.search(text):
        return ()
    if document.path is None or not Path(document.path).is_absolute():
        file = "<spec>"
    else:
        file = str(document.path)
    mistakes = mistakes_of(text, file)
    spec = None if mistakes else read_spec(text, file).spec
    return good.keep(document.uri, spec) if spec is not None else mistakes


def _diagnostic(mistake: Mistake, document: Any) -> types.Diagnostic:
    line, start, end = (mistake.line, mistake.column, mistake.end) if mistake.has_place else (1, 1, 2)
    span = _span(document, line, start, end)
    return types.Diagnostic(span, mistake.text, severity=types.DiagnosticSeverity.Error, source="tnpeft")


def _place(document: Any, position: types.Position) -> tuple[int, int]:
    """Line and column, in characters from 1, of a position in the editor's own units."""
    if position.line >= len(document.lines):  # the empty line after the last one
        return position.line + 1, 1
    found = document.position_codec.position_from_client_units(document.lines, position)
    return found.line + 1, found.character + 1


def _span(document: Any, line: int, start: int, end: int) -> types.Range:
    """A span of characters in a line, in the editor's own units."""
    span = types.Range(types.Position(line - 1, start - 1), types.Position(line - 1, end - 1))
    converted: types.Range = document.position_codec.range_to_client_units(document.lines, span)
    return converted
