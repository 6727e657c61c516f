"""`tnpeft lsp`: the language server, on stdin and stdout."""

from __future__ import annotations

from tnpeft.cli.arguments import parse_layer
from tnpeft.errors import need

__all__ = ["serve_editors"]


def serve_editors(layer: str | None) -> None:
    """Serve until the editor ends it."""
    need("pygls", "lsp")
    chosen = None if layer is None else parse_layer(layer)
    from tnpeft.editing.language_server import language_server

    language_server(chosen).start_io()
