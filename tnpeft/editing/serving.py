"""`tnpeft edit`: the page on 127.0.0.1, behind a token. Needs NiceGUI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import webbrowser
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.staticfiles import StaticFiles
from nicegui import app as pages
from nicegui import ui

from tnpeft.documents.nodes import MAX_BYTES
from tnpeft.editing.background import Background
from tnpeft.editing.completion import complete
from tnpeft.editing.document import Document
from tnpeft.editing.guard import Guard, new_token
from tnpeft.editing.hover import hover_at
from tnpeft.editing.page import ASSETS, Page
from tnpeft.errors import Problem, TnpeftError

__all__ = ["build", "serve_page"]

_LARGEST_QUESTION = 4 * MAX_BYTES  # bytes of a body: a text with its escapes


class _Open:
    """The open pages, by NiceGUI's client number."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.last: Page | None = None


def build(open_document: Callable[[], Document], token: str, port: int) -> Guard:
    """The ASGI application: the page below `/TOKEN/`, and nothing elsewhere."""
    site = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    background = Background()
    opened = _Open()
    url = f"/{token}"
    site.mount(f"{url}/assets", StaticFiles(directory=ASSETS))

    async def completions(request: Request) -> Response:
        text, line, column = await _question(request)
        found, cursor = complete(text, line, column, opened.last.session.view.spec if opened.last else None)
        items = [{"label": c.label, "apply": c.text, "kind": c.kind, "info": c.detail} for c in found]
        return _answer({"start": cursor.start, "items": items})

    async def hover(request: Request) -> Response:
        text, line, column = await _question(request)
        found = hover_at(text, line, column, opened.last.session.view.network if opened.last else None)
        return _answer(None if found is None else {"text": found.text, "start": found.start, "end": found.end})

    site.add_api_route(f"{url}/complete", completions, methods=["POST"])
    site.add_api_route(f"{url}/hover", hover, methods=["POST"])

    def page() -> None:
        last = opened.last
        unsaved = last.document.unsaved(last.session.view.text) if last else None
        document = unsaved or open_document()
        text = last.session.view.text if last and unsaved else document.text
        client = ui.context.client
        new = Page(document, background, url, text)
        opened.pages[client.id], opened.last = new, new
        client.on_delete(lambda: _closed(opened, client.id))

    pages.on_shutdown(background.close)
    ui.run_with(
        site,
        root=page,
        mount_path=url,
        title="tnpeft edit",
        dark=None,
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=30.0,
    )
    return Guard(site, token, port)


def _closed(opened: _Open, name: str) -> None:
    closed = opened.pages.pop(name, None)
    if closed is not None:
        closed.close()


async def _question(request: Request) -> tuple[str, int, int]:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_QUESTION:
            return "", 1, 1
    try:
        asked = json.loads(bytes(body))
        return str(asked["text"]), int(asked["line"]), int(asked["column"])
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError):
        return "", 1, 1


def _answer(data: object) -> Response:
    return Response(json.dumps(data), media_type="application/json")


def serve_page(
    open_document: Callable[[], Document], port: int, opens_browser: bool, say: Callable[[str], None]
) -> None:
    """Serve until Ctrl-C. Raises TnpeftError where the port is taken."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen(128)  # before the address is said
    except (OSError, OverflowError) as error:
        fix = "Choose another with `--port`, or leave it out."
        raise TnpeftError(Problem(f"port {port}", "a free port", str(error), fix)) from error
    token = new_token()
    port = listening.getsockname()[1]
    address = f"http://127.0.0.1:{port}/{token}/"
    app = build(open_document, token, port)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws_max_size=2**20,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=1,  # Ctrl-C ends it though a page is open
    )
    server = uvicorn.Server(config)
    say(f"editing at {address}  (Ctrl-C ends it)")

    async def run() -> None:
        if opens_browser:
            asyncio.get_running_loop().call_later(0.5, webbrowser.open, address)
        await server.serve(sockets=[listening])

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
