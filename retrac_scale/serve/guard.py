"""What stands before the routes: token, origin, sizes, concurrency, headers."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrac_scale.serve.limits import Limits

OPEN = ("/", "/health")
"""Paths without data, which need no token."""
UPLOAD = "/api/upload"
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware that refuses what the service does not take on, before any of it is read."""

    def __init__(self, app: ASGIApp, token: str | None, limits: Limits) -> None:
        self.app, self.token, self.limits = app, token, limits
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in known]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(with_headers, *refusal)
            return
        self.running += 1
        try:
            await self._answered(scope, receive, with_headers)
        finally:
            self.running -= 1

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for as long as the client is there."""
        started, client = False, _Client(receive, self._most(scope), self.limits.body_seconds)

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        answer = asyncio.ensure_future(self.app(scope, client.receive, noted))
        gone = asyncio.create_task(client.leave())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await answer
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not started:
                await _refuse(noted, 503, "the service is ending; ask again soon.")
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.wait({answer, gone})

    def _most(self, scope: Scope) -> int:
        return self.limits.upload_bytes if scope["path"] == UPLOAD else self.limits.json_bytes

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        length = headers.get("content-length", "")
        if scope["path"] not in OPEN and not self._is_known(headers):
            return 401, "send the token of this service as 'Authorization: Bearer TOKEN'."
        if scope["method"] != "GET" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "another site's page may not ask this service."
        if length.isdecimal() and int(length[:20]) > self._most(scope):
            return 413, f"the request is larger than {self._most(scope)} bytes."
        if scope["path"] != "/health" and self.running >= self.limits.concurrent:
            return 503, f"{self.limits.concurrent} requests are being answered; try again soon."
        return None

    def _is_known(self, headers: dict[str, str]) -> bool:
        if self.token is None:
            return True
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.token.encode())


class _Client:
    """Who asks: the body, of so many bytes at most and not for ever, and whether they are still there."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._most, self._seconds = receive, most, seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._read = 0
        self._whole, self._gone = asyncio.Event(), asyncio.Event()

    async def receive(self) -> Message:
        """The next piece of the body; once it is whole, that the client has left, when it has."""
        if self._whole.is_set():
            await self._gone.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {self._seconds:g} s.") from None
        self._read += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._whole.set()
        if self._read > self._most:
            raise HTTPException(413, f"the request is larger than {self._most} bytes.")
        return message

    async def leave(self) -> None:
        """Ends when the client has left, or nobody listens any more."""
        await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()


async def _refuse(send: Any, status: int, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    extra = {401: (b"www-authenticate", b"Bearer"), 503: (b"retry-after", b"1")}
    headers += [extra[status]] if status in extra else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
