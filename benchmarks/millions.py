"""Millions of rows, from arrays to a service: python -m benchmarks.millions [--rows N] [--dim K]

A store of random rows is streamed into a folder of its own, which is removed at the end, indexed, asked, extended,
thinned out, verified and served, in a few processes one after the other. Printed: seconds, the peak of memory that is
not a map of a file (RssAnon and RssShmem), and of open files. "Cold" is a process that has mapped nothing yet, with the
page cache as it is. A tenth of the rows go first, so that the ratio tells what grows with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, LocalCluster

import retrac_scale as rs
from benchmarks.scanning import anonymous_bytes
from retrac_scale.index.seals import verify_index
from retrac_scale.report.pictures import Pictures
from retrac_scale.serve.library import Library
from retrac_scale.store.schema import blocks

BATCH = 2**14
ARTISTS, YEARS = 1000, 97
APPENDED, DELETED = 100_000, 0.001
REPEATS = 5
WHERE = "artist == 'artist 7' and year < 1950"
WORST = " or ".join([f"rating in {[n % 9 for n in range(51)]}".replace(", ", ",")] * 16)
"""About the dearest that is accepted."""
TEXTS = "artist < path or path < artist"


def random_rows(seed: int, n: int, k: int) -> Any:
    """Directions, `[n, 1, k]`."""
    return np.random.default_rng(seed).standard_normal((n, 1, k), dtype=np.float32)


def stream(folder: Path, start: int, stop: int, k: int) -> rs.SketchStore:
    """Rows `start` .. `stop`, by the seed of their batch, into the store."""
    with rs.StoreWriter(folder / "store") as writer:
        for part in blocks(stop, BATCH):
            ids = np.arange(max(start, part.start), part.stop)
            if len(ids):
                columns = {
                    "artist": np.array([f"artist {i * 7919 % ARTISTS}" for i in ids.tolist()]),
                    "path": np.array([f"images/{i % 97}/picture {i}.png" for i in ids.tolist()]),
                    "year": 1900 + ids % YEARS,
                    "rating": (ids % 11) / 2,
                }
                rows = random_rows(part.start + int(ids[0]), len(ids), k)
                writer.append(ids, {"last": rows}, timesteps=[500], columns=columns)
    return rs.open_store(folder / "store")


def asked(q: int, k: int, place: Path | None = None) -> rs.SketchStore:
    """Queries, in memory or at a place."""
    return rs.write_store(place, {"last": random_rows(10**9, q, k)}, timesteps=[500])


@contextmanager
def watched(found: dict[str, Any], name: str) -> Iterator[None]:
    """Note seconds, peak memory beyond maps, and open files of a step."""
    peak, files, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak, files
        while not done.wait(0.005):
            peak, files = max(peak, anonymous_bytes()), max(files, len(os.listdir("/proc/self/fd")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    found[name] = {"seconds": seconds, "peak": max(peak, anonymous_bytes()), "files": files}


def again(found: dict[str, Any], name: str, call: Callable[[], object]) -> None:
    """The median of several calls after a first one."""
    call()
    times = []
    with watched(found, name):
        for _ in range(REPEATS):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    found[name]["seconds"] = statistics.median(times)


def write(folder: Path, n: int, k: int) -> dict[str, Any]:
    """Stream the rows, and build the index."""
    found: dict[str, Any] = {}
    with watched(found, "write"):
        store = stream(folder, 0, n, k)
    with watched(found, "build"):
        rs.build_index(store, rs.GradDot(), folder / "index", progress=False)
    return found


def query(folder: Path, n: int, k: int) -> dict[str, Any]:
    """Ask, filter, group and explain."""
    found: dict[str, Any] = {}
    several = {q: asked(q, k) for q in (1, 16, 64)}
    small = rs.build_index(rs.write_store(None, {"last": random_rows(1, 512, k)}, timesteps=[500]), rs.GradDot(), None)
    for queries in several.values():
        small.query(queries, 10)  # compiled
    with watched(found, "open"):
        index = rs.open_index(folder / "index")
    with watched(found, "query, Q = 1, cold"):
        index.query(several[1], 10)
    for q, queries in several.items():
        again(found, f"query, Q = {q}", lambda queries=queries: index.query(queries, 10))  # type: ignore[misc]
    one = several[1]
    again(found, "where", lambda: index.query(one, 10, where=WHERE))
    again(found, "where, two columns of texts", lambda: index.query(one, 10, where=TEXTS))
    again(found, "where, the dearest", lambda: index.query(one, 10, where=WORST))
    again(found, "group by 1000", lambda: index.query(one, 10, group_by="artist"))
    with watched(found, "explain, first"):
        index.explain(one, n // 2)
    again(found, "explain", lambda: index.explain(one, n // 2))
    store = index.check_store()
    assert store is not None
    with watched(found, "take, first"):
        rs.take(store, [n // 3])
    again(found, "take", lambda: rs.take(store, [n // 3]))
    return found


def serve(folder: Path, n: int, k: int) -> dict[str, Any]:
    """What a service does before its first answer."""
    found: dict[str, Any] = {}
    queries = asked(8, k)
    with watched(found, "serve, start"):
        index = rs.open_index(folder / "index")
        pictures = Pictures(
            np.broadcast_to(np.zeros((1, 4, 4), np.uint8), (n, 4, 4)), index.places.ids, np.zeros((8, 4, 4))
        )
        library = Library({"GradDot": index}, pictures, queries=queries)
        library.about()
    return found


def workers(folder: Path, n: int, k: int) -> dict[str, Any]:
    """Ask on two workers of one thread each."""
    found: dict[str, Any] = {}
    index = rs.open_index(folder / "index")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        for q in (1, 16):
            queries = asked(q, k)
            again(
                found, f"query, Q = {q}, two workers", lambda queries=queries: index.query(queries, 10, client=client)
            )  # type: ignore[misc]
    return found


def change(folder: Path, n: int, k: int) -> dict[str, Any]:
    """Append, delete, index each time, verify."""
    found: dict[str, Any] = {}
    more = min(APPENDED, n // 10)
    with watched(found, "append 100,000, or a tenth"):
        store = stream(folder, n, n + more, k)
    with watched(found, "index them"):
        rs.build_index(store, rs.GradDot(), folder / "index", progress=False)
    with watched(found, "delete one in a thousand"):
        store.delete(np.arange(0, n, int(1 / DELETED)))
    with watched(found, "index without them"):
        index = rs.build_index(store, rs.GradDot(), folder / "index", progress=False)
    queries = asked(1, k)
    again(found, "query, Q = 1, of both", lambda: index.query(queries, 10))
    with watched(found, "verify the store"):
        assert rs.verify_store(folder / "store").is_whole
    with watched(found, "verify the index"):
        assert verify_index(folder / "index") == []
    return found


STEPS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "write": write, "query": query, "workers": workers, "serve": serve, "change": change
}  # fmt: skip


def measured(folder: Path, n: int, k: int) -> dict[str, Any]:
    """All steps with n rows, each in a process of its own."""
    found: dict[str, Any] = {}
    for step in STEPS:
        command = [
            sys.executable,
            "-m",
            "benchmarks.millions",
            "--rows",
            str(n),
            "--dim",
            str(k),
            "--folder",
            str(folder),
        ]
        output = subprocess.run([*command, "--step", step], check=True, stdout=subprocess.PIPE, text=True)
        found |= json.loads(output.stdout.splitlines()[-1])
    shutil.rmtree(folder)
    return found


def cpu() -> str:
    """Its name."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: where temporary files are)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder, options.rows, options.dim)))
        return
    folder = Path(tempfile.mkdtemp(prefix="millions-", dir=options.folder))
    try:
        less, all_of_them = (measured(folder / str(n), n, options.dim) for n in (options.rows // 10, options.rows))
    finally:
        shutil.rmtree(folder)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{options.rows:,} rows of {options.dim} entries, int8; {cpu()}, load {load}; "
          f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s)\n")  # fmt: skip
    sizes = f"seconds, {options.rows // 10:,} rows | {options.rows:,} rows"
    print(f"| step | {sizes} | ratio | peak memory, MB | open files |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (name, small), (_, large) in zip(less.items(), all_of_them.items(), strict=True):
        ratio = large["seconds"] / small["seconds"]
        print(
            f"| {name} | {small['seconds']:.3f} | {large['seconds']:.3f} | {ratio:.1f} | {large['peak'] / 1e6:.0f} "
            f"| {large['files']} |"
        )


if __name__ == "__main__":
    main()
