"""A service follows its indexes: it answers while its store grows, and takes in what was built again at its place."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import retrac_scale as rs
from retrac_scale.report.pictures import Pictures
from retrac_scale.serve import create_app
from retrac_scale.serve.following import Follower
from retrac_scale.serve.library import Library

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((60, 1, 8))
QUERIES = rs.write_store(None, {"c": RNG.standard_normal((2, 1, 8))}, timesteps=[3])


def append(out: Path, rows: slice) -> rs.SketchStore:
    with rs.StoreWriter(out) as writer:
        writer.append(np.arange(60)[rows], {"c": ROWS[rows]}, timesteps=[3])
    return rs.open_store(out)


def library(place: Path) -> Library:
    index = rs.open_index(place)
    pictures = np.zeros((index.shape[1], 4, 4), np.uint8)
    return Library({"TracIn": index}, Pictures(pictures, index.ids, pictures[:2]), queries=QUERIES)


def until(wanted: Callable[[], Any]) -> Any:
    ends = time.monotonic() + 20
    while not (found := wanted()):
        assert time.monotonic() < ends
        time.sleep(0.02)
    return found


def test_an_index_that_grew_is_taken_in_while_the_old_one_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrac_scale.serve.following.LOOK", 0.05)
    monkeypatch.setattr("retrac_scale.serve.following.AFTER_FAILURE", 0.05)
    monkeypatch.setattr("retrac_scale.serve.following.KEPT", 0.0)
    place, loads = tmp_path / "i", [OSError("the pictures are late"), None]

    def renew() -> Library:
        if (error := loads.pop(0)) is not None:
            raise error
        return library(place)

    rs.build_index(append(tmp_path / "s", slice(0, 40)), rs.TracIn(), place)
    app = create_app(library(place), renew=renew)
    with TestClient(app, raise_server_exceptions=False) as client:

        def state() -> Any:
            return client.get("/health").json()["indexes"]["TracIn"]

        def ids(**options: Any) -> set[str]:
            asked = {"source": "queries", "ids": ["0"], "k": 60, **options}
            response = client.post("/api/query", json=asked)
            assert response.status_code == 200, response.text
            lists = response.json()["queries"][0]["lists"]["TracIn"]
            return {one["id"] for side in lists.values() for one in side}

        assert (state(), len(ids())) == ("ready", 40)
        store = append(tmp_path / "s", slice(40, 60))
        assert (state(), len(ids())) == ("behind", 40)
        assert len(ids(source="training", ids=["7"])) == 39
        explained = {"source": "queries", "id": "0", "sample": "7", "index": "TracIn"}
        assert client.post("/api/explain", json=explained).status_code == 200
        rs.build_index(store, rs.TracIn(), place)
        until(lambda: state() == "not loaded" or not loads)
        until(lambda: state() == "ready")
        assert len(ids()) == 60
        assert client.get("/api/about").json()["samples"] == 60
        store.delete([5])
        response = client.post("/api/query", json={"source": "queries", "ids": ["0"]})
        assert (response.status_code, "build the index again" in response.json()["detail"]) == (503, True)
        assert client.get("/health").status_code == 503
        loads.append(None)
        rs.build_index(store, rs.TracIn(), place)
        until(lambda: client.get("/health").status_code == 200 and state() == "ready")
        assert ids() == {str(i) for i in range(60)} - {"5"}


class Held(Library):
    """Says how far its lists can be trusted once that is `allowed`."""

    begun, allowed = threading.Event(), threading.Event()

    def repeatability(self, name: str, ids: Any) -> Any:
        """See `Library`."""
        self.begun.set()
        self.allowed.wait(30)
        return super().repeatability(name, ids)


def measured_twice(folder: Path, rows: slice, kind: type[Library] = Library) -> Library:
    """A library of an index that each call builds again, of more samples of a store."""
    sketches = np.random.default_rng(1).standard_normal((60, 2, 8))
    with rs.StoreWriter(folder / "s") as writer:
        writer.append(np.arange(60)[rows], {"c": sketches[rows]}, timesteps=[3, 7])
    index = rs.build_index(rs.open_store(folder / "s"), rs.TracIn(), folder / "i")
    queries = rs.write_store(None, {"c": sketches[:2]}, timesteps=[3, 7])
    pictures = np.zeros((index.shape[1], 4, 4), np.uint8)
    return kind({"TracIn": index}, Pictures(pictures, index.ids, pictures[:2]), queries=queries)


def test_how_far_lists_can_be_trusted_is_told_of_the_index_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrac_scale.serve.following.LOOK", 0.05)
    monkeypatch.setattr("retrac_scale.serve.following.AFTER_FAILURE", 0.05)
    held, after = measured_twice(tmp_path, slice(0, 40), Held), list[Library]()
    app = create_app(held, renew=lambda: after[0])
    with TestClient(app) as client, ThreadPoolExecutor(1) as thread:

        def sentence() -> str:
            return str(client.get("/api/repeatability").json()["TracIn"]["sentence"])

        before = thread.submit(sentence)
        assert Held.begun.wait(30)
        after.append(measured_twice(tmp_path, slice(40, 60)))
        until(lambda: client.get("/api/about").json()["samples"] == 60)
        Held.allowed.set()
        assert "among 40 samples" in before.result()
        assert "among 60 samples" in sentence()


def test_that_a_store_cannot_be_read_is_no_sentence_about_its_lists(tmp_path: Path) -> None:
    served = measured_twice(tmp_path, slice(0, 40))
    with TestClient(create_app(served), raise_server_exceptions=False) as client:
        content = (tmp_path / "s" / "zarr.json").read_bytes()
        (tmp_path / "s" / "zarr.json").unlink()
        response = client.get("/api/repeatability")
        assert (response.status_code, "which cannot be used" in response.json()["detail"]) == (503, True)
        (tmp_path / "s" / "zarr.json").write_bytes(content)
        assert client.get("/api/repeatability").json()["TracIn"]["measurements"] == 2


def test_who_asks_how_the_service_is_waits_for_the_look_that_another_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rs.build_index(append(tmp_path / "s", slice(0, 40)), rs.TracIn(), tmp_path / "i")
    served, looks, allowed = library(tmp_path / "i"), list[str](), threading.Event()

    def is_current(index: rs.Index) -> bool:
        looks.append(str(index.url))
        return allowed.wait(30)

    monkeypatch.setattr(rs.Index, "is_current", property(is_current))

    async def ask_many() -> list[Any]:
        follower = Follower(served, None, print)
        left, *others = [asyncio.create_task(follower.state()) for _ in range(20)]
        while not looks:
            await asyncio.sleep(0.001)
        left.cancel()
        await asyncio.sleep(0)
        later = asyncio.create_task(follower.state())
        await asyncio.sleep(0)
        allowed.set()
        return [*await asyncio.gather(*others, later), await follower.state()]

    assert asyncio.run(ask_many()) == [{"TracIn": "ready"}] * 21
    assert len(looks) == 1


CUT = """
import os, resource, sys
import numpy as np
from retrac_scale.query.index import open_index
from retrac_scale.report.pictures import Pictures
from retrac_scale.serve import Limits, run
from retrac_scale.serve.library import Library

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
index = open_index(sys.argv[1])
served = Library({"TracIn": index}, Pictures(np.zeros((40, 4, 4)), index.ids, []))
rows = index.chunk(0).rows[0]

def read_on(url):
    os.truncate(os.path.join(sys.argv[1], "row/c/0/0/0"), 0)
    rows.sum()

run(served, host="127.0.0.1", port=0, token=None, limits=Limits(), title="", announce=read_on)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what the system does to a process that reads behind a file's end")
def test_a_service_that_reads_behind_the_end_of_a_file_that_was_cut_in_its_place_says_where_it_died(
    tmp_path: Path,
) -> None:
    rs.build_index(append(tmp_path / "s", slice(0, 40)), rs.TracIn(), tmp_path / "i")
    command, root = [sys.executable, "-c", CUT, str(tmp_path / "i")], Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGBUS
    assert "Bus error" in ended.stderr
    assert "in read_on" in ended.stderr
