"""What stands before the routes: a client that leaves, a service that ends."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import retrac_scale as rs
from retrac_scale.query.where import NotWantedError, which
from retrac_scale.report.pictures import Pictures
from retrac_scale.serve import Limits, create_app
from retrac_scale.serve.guard import Guard
from retrac_scale.serve.library import Library

SCOPE: dict[str, Any] = {"type": "http", "path": "/api/query", "method": "POST", "headers": []}
BODY = {"type": "http.request", "body": b"{}", "more_body": False}


class Answering:
    """An application that reads the body and then takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ended: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        self.ended.append("answered")


class Slow(Library):
    """A library that takes its time to work out which samples count."""

    def mask(self, *asked: Any) -> Any:
        time.sleep(0.2)
        return super().mask(*asked)


def asked(application: Answering, stay: float, patience: float) -> list[Any]:
    """What is sent to a client that leaves after `stay` seconds, by a server that ends after `patience`."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        messages = [BODY]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(stay)
            return {"type": "http.disconnect"}

        task = asyncio.create_task(Guard(application, None, Limits())(SCOPE, receive, send))
        done, _ = await asyncio.wait({task}, timeout=patience)
        if not done:
            task.cancel()
            await asyncio.wait({task})
        await task

    asyncio.run(run())
    return sent


def test_a_question_ends_when_its_client_leaves() -> None:
    application = Answering(60)
    assert asked(application, stay=0.05, patience=30) == []
    assert application.ended == ["cancelled"]


def test_a_client_that_waits_when_the_service_ends_is_told_so_and_others_are_answered() -> None:
    application = Answering(60)
    start, body = asked(application, stay=60, patience=0.05)
    assert (start["status"], body["body"]) == (503, b'{"detail": "the service is ending; ask again soon."}')
    assert application.ended == ["cancelled"]
    application = Answering(0)
    (start,) = asked(application, stay=60, patience=30)
    assert start["status"] == 200
    assert application.ended == ["answered"]


def test_a_client_that_leaves_is_neither_an_error_nor_counted() -> None:
    store = rs.write_store(None, {"c": np.ones((8, 1, 4))})
    index = rs.build_index(store, rs.TracIn(), None)
    sent: list[Any] = []
    app = create_app(Slow({"TracIn": index}, Pictures(np.zeros((8, 2, 2)), index.ids, [])))
    scope = {**SCOPE, "headers": [(b"content-type", b"application/json")], "query_string": b"", "http_version": "1.1"}
    body = b'{"source": "training", "ids": ["0"], "where": "id > 2"}'
    messages = [{"type": "http.disconnect"}, {**BODY, "body": body}]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask() -> None:
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(ask())
    assert sent == []
    assert "/api/query" not in TestClient(app).get("/metrics").text


def test_masks_are_those_of_their_expressions_while_others_push_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrac_scale.serve.library.CACHED_MASKS", 2)
    index = rs.build_index(rs.write_store(None, {"c": np.ones((8, 1, 4))}), rs.TracIn(), None)
    library = Library({"TracIn": index}, Pictures(np.zeros((8, 2, 2)), index.ids, []))
    for least in (0, 1, 0, 2):
        library.mask("TracIn", f"id > {least}")
    assert [library.knows("TracIn", f"id > {least}") for least in range(3)] == [True, False, True]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda n: library.mask("TracIn", f"id > {n % 5}"), range(4000)))
    finally:
        sys.setswitchinterval(before)
    assert all(mask is not None and mask.sum() == 7 - n % 5 for n, mask in enumerate(found))


def test_an_expression_is_worked_out_for_as_long_as_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrac_scale.query.where.TILE", 2)
    store = rs.write_store(None, {"c": np.ones((8, 1, 4))}, columns={"year": np.arange(8)})
    index, gone = rs.build_index(store, rs.TracIn(), None), threading.Event()
    tiles: list[int] = []

    def wanted() -> bool:
        tiles.append(1)
        return len(tiles) < 3

    with pytest.raises(NotWantedError):
        which("year > 2", index, wanted)
    assert len(tiles) == 3  # of four
    assert which("year > 2", index, lambda: not gone.is_set()).tolist() == [False] * 3 + [True] * 5  # type: ignore[union-attr]
