"""Who may speak to the page."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tnpeft.editing.guard import Guard, new_token

TOKEN, PORT = "secret-token", 4321
HOST = (b"host", b"127.0.0.1:4321")


async def inner(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"inside"})


def answers(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect" if kind == "websocket" else "http.request"}

    guard = Guard(inner, TOKEN, PORT)
    asyncio.run(guard({"type": kind, "path": path, "headers": list(headers)}, receive, send))
    return sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/secret-token/", [HOST], 200),
        ("/secret-token/_nicegui/a.js", [(b"host", b"localhost:4321")], 200),
        ("/secret-token/", [HOST, (b"origin", b"http://127.0.0.1:4321")], 200),
        ("/", [HOST], 404),
        ("/secret-toke", [HOST], 404),
        ("/secret-token2/", [HOST], 404),
        ("/_nicegui/a.js", [HOST], 404),
        ("/x/secret-token/", [HOST], 404),
        ("/\udce9", [HOST], 404),
        ("/secret-token/", [], 421),
        ("/secret-token/", [HOST, HOST], 421),
        ("/secret-token/", [(b"host", b"evil.example:4321")], 421),
        ("/secret-token/", [(b"host", b"127.0.0.1")], 421),
        ("/secret-token/", [(b"host", b"127.0.0.1:4322")], 421),
        ("/secret-token/", [HOST, (b"origin", b"http://evil.example")], 403),
        ("/secret-token/", [HOST, (b"origin", b"http://127.0.0.1:4322")], 403),
        ("/secret-token/", [HOST, (b"origin", b"https://127.0.0.1:4321")], 403),
        ("/secret-token/", [HOST, (b"origin", b"null")], 403),
    ],
)
def test_token_host_and_origin(kind: str, path: str, headers: list[tuple[bytes, bytes]], status: int):
    first = answers(path, *headers, kind=kind)[0]
    if kind == "websocket":
        assert first["type"] == ("websocket.accept" if status == 200 else "websocket.close")
    else:
        assert first["status"] == status


def test_pages_may_load_nothing_from_elsewhere():
    first = answers("/secret-token/", HOST)[0]
    headers = dict(first["headers"])
    policy = dict(part.strip().split(" ", 1) for part in headers[b"content-security-policy"].decode().split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["connect-src"] == "'self' ws://127.0.0.1:4321 ws://localhost:4321"
    assert policy["frame-ancestors"] == "'none'"
    assert headers[b"referrer-policy"] == b"no-referrer"


def test_tokens_are_long_and_never_the_same():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 32
