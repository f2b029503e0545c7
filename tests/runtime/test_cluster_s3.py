"""Sketch, index and query by worker processes that share nothing but an S3 server, of which requests fail."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from distributed import Client, LocalCluster

import retrac_scale as rs
from tests.runtime.test_cluster import Logged, sketch
from tests.store.test_s3 import Proxy, bucket_behind, server  # noqa: F401

pytest.importorskip("moto")
pytest.importorskip("s3fs")


class OneInAHundred(Proxy):
    """Every hundredth request is answered with "slow down"."""

    failed: ClassVar[Any] = defaultdict(lambda: 1)  # no other faults
    requests: ClassVar[Any] = itertools.count(1)
    injected = 0

    def answer(self) -> None:
        if next(self.requests) % 100:
            super().answer()
            return
        OneInAHundred.injected += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply(503, {}, b"<Error><Code>SlowDown</Code><Message>injected</Message></Error>")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer


@pytest.mark.slow
def test_workers_without_a_shared_disk_give_the_same_answers_through_failing_requests(
    server: tuple[str, int],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    here = sketch(Logged(tmp_path / "log"), tmp_path / "s")
    queries = rs.take(here, [3, 20])
    expected = rs.build_index(here, rs.ReTrac(), tmp_path / "i").query(queries, 4)
    with (
        bucket_behind(OneInAHundred, server, monkeypatch, "cluster") as bucket,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        store = sketch(Logged(tmp_path / "log"), f"{bucket}/s", client)
        index = rs.build_index(store, rs.ReTrac(), f"{bucket}/i", client=client)
        answer = index.query(queries, 4, client=client)
        for name in "ab":
            np.testing.assert_array_equal(store.sketches(name), here.sketches(name))
    np.testing.assert_array_equal(answer.ids, expected.ids)
    np.testing.assert_array_equal(answer.scores, expected.scores)
    assert OneInAHundred.injected >= 2
