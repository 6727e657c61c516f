"""Who may talk to the page: a client on this machine that has the address with the token, and no other page."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["Guard", "new_token"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOCAL = ("127.0.0.1", "localhost")
# Nothing is loaded from anywhere else, nor shown inside another page; the token stays out of other pages' logs.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws://{hosts}; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def new_token() -> str:
    return secrets.token_urlsafe(24)


class Guard:
    """ASGI middleware: every page, asset and websocket has the token as the first part of its path.

    A `Host` other than this machine's is refused, because a foreign name may point here. So is another page's `Origin`.
    """

    def __init__(self, app: App, token: str, port: int) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {f"{name}:{port}".encode() for name in _LOCAL}
        self._origins = {b"http://" + host for host in self._hosts}
        hosts = " ws://".join(sorted(host.decode() for host in self._hosts))
        self._headers = [
            (b"content-security-policy", _POLICY.format(hosts=hosts).encode()),
            (b"referrer-policy", b"no-referrer"),
            (b"x-content-type-options", b"nosniff"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal(scope)) is not None:
            await _refuse(scope, send, *refusal)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        await self._app(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for a request that is refused, or None."""
        hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return 421, "This page answers on 127.0.0.1 alone."
        origins = [value for name, value in scope["headers"] if name.lower() == b"origin"]
        if any(origin.lower() not in self._origins for origin in origins):
            return 403, "Another page asks."
        first = str(scope["path"]).lstrip("/").partition("/")[0]
        if not secrets.compare_digest(first.encode("utf-8", "surrogatepass"), self._token):
            return 404, "Open the whole address that `tnpeft edit` printed, with its token."
        return None


async def _refuse(scope: Scope, send: Send, status: int, sentence: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": sentence})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode() + b"\n"})
