"""`tnpeft edit`: a spec in the browser."""

from __future__ import annotations

from tnpeft.cli.output import Output
from tnpeft.documents.paths import is_there
from tnpeft.draw.files import need_matplotlib
from tnpeft.editing.document import Document
from tnpeft.errors import need

__all__ = ["edit_spec"]


def edit_spec(output: Output, file: str | None, start: str | None, port: int, opens_browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises TnpeftError, before anything is served, for a file that cannot be edited."""
    need("nicegui", "edit")
    need_matplotlib()
    Document.open(file, start)
    from tnpeft.editing.serving import serve_page

    def document() -> Document:  # opened anew with each page: what `--from` began may be saved by then
        return Document.open(file, None if file is not None and is_there(file) else start)

    serve_page(document, port, opens_browser, output.say)
