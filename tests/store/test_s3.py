"""An S3 server as a real process, behind a proxy that fails: every verb is retried, the answers are the same."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync

import retrac_scale as rs
from retrac_scale.store import objects, repair_store, verify_store

pytest.importorskip("moto")
pytest.importorskip("s3fs")

FAULTS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "cut": None,  # the connection is dropped
    "stall": None,  # nothing comes until the client has given up
}
TIMEOUT_S = 0.5


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to S3; the first request of each verb and kind of fault fails."""

    protocol_version = "HTTP/1.1"
    target = ("127.0.0.1", 0)
    failed: ClassVar[Counter[tuple[str, str]]] = Counter()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for fault, reply in FAULTS.items():
            if not self.failed[self.command, fault]:
                self.failed[self.command, fault] += 1
                if fault == "stall":
                    time.sleep(1.5 * TIMEOUT_S)
                if reply is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, code = reply
                self.reply(status, {}, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
                return
        upstream = http.client.HTTPConnection(*self.target)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        self.reply(response.status, dict(response.getheaders()), response.read())
        upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(body)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import main; main()", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield "127.0.0.1", port
    process.kill()
    process.wait()


@contextmanager
def bucket_behind(
    proxy_class: type[Proxy], server: tuple[str, int], monkeypatch: pytest.MonkeyPatch, name: str
) -> Iterator[str]:
    """The URL of a new bucket that is reached through a proxy; no connection of this process is left open."""
    import s3fs

    proxy_class.target = server
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), proxy_class)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    for variable, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
    }.items():
        monkeypatch.setenv(variable, value)
    connection = http.client.HTTPConnection(*server)
    connection.request("PUT", f"/{name}")
    connection.getresponse().read()
    connection.close()
    yield f"s3://{name}"
    for filesystem in s3fs.S3FileSystem._cache.values():
        if filesystem._s3 is not None:
            sync(filesystem._s3.close())
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def bucket(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": TIMEOUT_S}})
    Proxy.failed.clear()
    with bucket_behind(Proxy, server, monkeypatch, "bucket") as url:
        yield url


def test_every_verb_survives_a_500_a_slow_down_a_cut_and_a_stalled_connection(bucket: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sketches = {name: rng.standard_normal((70, 1, 64)) for name in "ab"}
    url = f"{bucket}/sketches.zarr"
    store = rs.write_store(url, sketches, columns={"label": np.arange(70)})
    here = rs.write_store(tmp_path / "s", sketches, columns={"label": np.arange(70)})
    for name in "ab":
        np.testing.assert_array_equal(rs.open_store(url).sketches(name), here.sketches(name))
    assert store.delete([3]) == 1
    assert rs.open_store(url).deleted.sum() == 1
    objects.delete_all(store.root, ["a/norm/c/1/0"])
    verdict = verify_store(url)
    assert [finding.key for finding in verdict.of("damaged")] == ["a/norm/c/1/0"]
    assert repair_store(url) == []
    assert rs.open_store(url).committed("a").tolist() == [True, False]
    for verb in ("GET", "PUT", "HEAD", "POST"):  # deletion is a POST
        assert {fault for method, fault in Proxy.failed if method == verb} == set(FAULTS)


def test_a_store_of_objects_by_obstore_is_read_as_it_was_written() -> None:
    obstore = pytest.importorskip("obstore")
    objects_only: Any = zarr.storage.ObjectStore(obstore.store.MemoryStore())
    sketches = {"c": np.random.default_rng(0).standard_normal((70, 1, 64))}
    rs.write_store(objects_only, sketches)
    np.testing.assert_array_equal(
        rs.open_store(objects_only).sketches("c"), rs.write_store(None, sketches).sketches("c")
    )
    assert verify_store(objects_only).is_whole
