"""Bounds on what a client can send, held before anything reads it: token, body size, time for the body to arrive."""

import asyncio
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mmray.serve.schema import Problem
from mmray.serve.settings import ServeConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Path -> file and content type of the page people try the model on."""
OPEN_PATHS = (*PAGE, "/healthz", "/readyz")  # answered without a token: they give nothing away
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Limits:
    """ASGI middleware; gives every request an id, and refuses those that are out of bounds."""

    def __init__(self, app: App, settings: ServeConfig) -> None:
        self._app, self._settings = app, settings
        token = settings.token.get_secret_value() if settings.token else None
        self._token = None if token is None else b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        scope["request_id"] = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        if self._token and scope["path"] not in OPEN_PATHS and not self._knows(headers):
            await refuse(scope, send, 401, "UNAUTHORIZED", "a bearer token is needed; send Authorization: Bearer TOKEN")
            return
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                body = await self._read(headers, receive)
        except TimeoutError:
            await refuse(scope, send, 408, "BODY_TIMEOUT", "the body took too long to arrive; send it again")
            return
        if body is None:
            limit = self._settings.max_body_bytes
            await refuse(scope, send, 413, "BODY_TOO_LARGE", f"a request may have {limit:,} bytes; send fewer items")
            return
        await self._app(scope, _replay(body, receive), send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        assert self._token is not None
        return hmac.compare_digest(headers.get(b"authorization", b""), self._token)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Returns the body, or None as soon as it is too large."""
        limit = self._settings.max_body_bytes
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limit:
            return None
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                break
            chunks.append(message.get("body", b""))
            size, more = size + len(chunks[-1]), message.get("more_body", False)
            if size > limit:
                return None
        return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def refuse(scope: Scope, send: Send, status: int, code: str, message: str) -> None:
    """Answers with a code and a sentence."""
    body = Problem(code=code, message=message, request_id=scope["request_id"]).model_dump_json().encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
