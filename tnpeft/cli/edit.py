"""`tnpeft edit`: a spec in the browser."""

from __future__ import annotations

from importlib.util import find_spec

from tnpeft.cli.output import Output
from tnpeft.draw.files import need_matplotlib
from tnpeft.editing.document import Document
from tnpeft.errors import Problem, TnpeftError

__all__ = ["edit_spec"]


def edit_spec(output: Output, file: str | None, start: str | None, port: int, opens_browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises TnpeftError, before anything is served, for a file that cannot be edited."""
    if find_spec("nicegui") is None:
        fix = "Run `pip install 'tnpeft[edit]'`."
        raise TnpeftError(Problem("edit", "the package nicegui", "none installed", fix))
    need_matplotlib()
    Document.open(file, start)
    from tnpeft.editing.serving import serve_page

    serve_page(lambda: Document.open(file, start), port, opens_browser, output.say)
