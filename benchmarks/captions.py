"""One long caption among many short ones: python -m benchmarks.captions [--rows N] [--long CHARACTERS]

A data set of so many ids, with captions of 40 characters and one long one and a second column of texts, goes the whole
way: stored, opened, taken from, indexed, asked, grown, served, each step in a process of its own. Printed: seconds, and
how far a step's memory rises above where it began, maps of files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset

import retrac_scale as rs
from retrac_scale.report.content import Rows
from retrac_scale.report.pictures import Pictures
from retrac_scale.serve.library import Library
from retrac_scale.task.items import brought

DIM, SHORT, APPENDED = 8, 40, 1000
Found = dict[str, Any]


def captions(n: int, long: int, first: int = 0) -> list[str]:
    """Distinct texts of `SHORT` characters, but for one in the middle."""
    texts = [f"a picture of a thing, number {i:08d}, x"[:SHORT].ljust(SHORT, "x") for i in range(first, first + n)]
    texts[n // 2] = "long " + "x" * (long - 5)
    return texts


def licences(n: int) -> list[str]:
    """Texts of which there are few."""
    return [f"licence {i % 7}" for i in range(n)]


def names(n: int, first: int = 0) -> list[str]:
    """Ids."""
    return [f"{i:08d}.png" for i in range(first, first + n)]


def rows(n: int) -> Any:
    """Sketches `[n, 1, k]`."""
    return {"last": np.random.default_rng(n).standard_normal((n, 1, DIM), dtype=np.float32)}


def memory(name: str) -> int:
    """Bytes, of a line of this process's status."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))


@contextmanager
def watched(found: Found, name: str) -> Iterator[None]:
    """Note seconds and the rise of memory of a step."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is that of now
    before, started = memory("VmRSS"), time.perf_counter()
    yield
    found[name] = {"seconds": time.perf_counter() - started, "rise": memory("VmHWM") - before}


def dataset(folder: Path, n: int, long: int, found: Found) -> None:
    """Construct a data set, and take a part of it."""
    columns, ids = {"caption": captions(n, long), "licence": licences(n)}, names(n)
    with watched(found, "data set"):
        images: Any = rs.datasets.Arrays(np.zeros((n, 1, 1), np.uint8), ids=ids, columns=columns)
    with watched(found, "Subset of it"):
        brought(Subset(images, range(n - 1)), "columns")


def write(folder: Path, n: int, long: int, found: Found) -> None:
    """Store it, and go on with the same."""
    columns, ids, sketches = {"caption": captions(n, long), "licence": licences(n)}, names(n), rows(n)
    with watched(found, "write_store"):
        rs.write_store(folder / "store", sketches, timesteps=[500], ids=ids, columns=columns)


def stream(folder: Path, n: int, long: int, found: Found) -> None:
    """Store it in batches."""
    columns, ids, sketches = {"caption": captions(n, long), "licence": licences(n)}, names(n), rows(n)["last"]
    with watched(found, "StoreWriter"), rs.StoreWriter(folder / "streamed") as writer:
        for start in range(0, n, 2**14):
            part = slice(start, start + 2**14)
            own = {name: values[part] for name, values in columns.items()}
            writer.append(ids[part], {"last": sketches[part]}, timesteps=[500], columns=own)


def read(folder: Path, n: int, long: int, found: Found) -> None:
    """Open it, and read a column."""
    with watched(found, "open_store"):
        store = rs.open_store(folder / "store")
    with watched(found, 'store.columns["caption"]'):
        assert len(store.columns["caption"][n // 2]) == long


def take(folder: Path, n: int, long: int, found: Found) -> None:
    """Take samples, the one among them."""
    store = rs.open_store(folder / "store")
    with watched(found, "take 1000"):
        rs.take(store, names(1000, n // 2 - 500))


def build(folder: Path, n: int, long: int, found: Found) -> None:
    """Index it."""
    store = rs.open_store(folder / "store")
    with watched(found, "build_index"):
        rs.build_index(store, rs.GradDot(), folder / "index", progress=False)


def asked(call: Callable[[rs.Index, rs.SketchStore], object], name: str) -> Callable[[Path, int, int, Found], None]:
    """A step that asks an index that answered before."""

    def step(folder: Path, n: int, long: int, found: Found) -> None:
        index = rs.open_index(folder / "index")
        queries = rs.write_store(None, rows(4), timesteps=[500])
        index.query(queries, 10)
        with watched(found, name):
            call(index, queries)

    return step


def with_columns(index: rs.Index, queries: rs.SketchStore) -> None:
    """What a page says of an answer's samples."""
    known = Rows(index)
    json.dumps([known[sample] for sample in index.query(queries, 10).ids.ravel().tolist()])


def append(folder: Path, n: int, long: int, found: Found) -> None:
    """More samples, one with a caption twice as long, indexed."""
    with watched(found, "append 1000"), rs.StoreWriter(folder / "store") as writer:
        columns = {"caption": captions(APPENDED, 2 * long, n), "licence": licences(APPENDED)}
        writer.append(names(APPENDED, n), rows(APPENDED), timesteps=[500], columns=columns)
    store = rs.open_store(folder / "store")
    with watched(found, "build_index of what was appended"):
        rs.build_index(store, rs.GradDot(), folder / "index", progress=False)
    with watched(found, 'store.columns["caption"] of both'):
        assert len(store.columns["caption"]) == n + APPENDED


def serve(folder: Path, n: int, long: int, found: Found) -> None:
    """Start a service, and ask it."""
    queries = rs.write_store(None, rows(4), timesteps=[500])
    with watched(found, "serve, start"):
        index = rs.open_index(folder / "index")
        pictures = np.broadcast_to(np.zeros((1, 4, 4), np.uint8), (index.shape[1], 4, 4))
        library = Library(
            {"GradDot": index}, Pictures(pictures, index.places.ids, np.zeros((4, 4, 4))), queries=queries
        )
        library.about()


STEPS: dict[str, Callable[[Path, int, int, Found], None]] = {
    "dataset": dataset, "write": write, "stream": stream, "read": read, "take": take, "build": build,
    "columns": asked(with_columns, "query, with columns"),
    "all columns": asked(lambda index, _: index.columns["caption"], 'index.columns["caption"]'),
    "where": asked(lambda index, queries: index.query(queries, 10, where="caption > 'a picture'"), "where="),
    "where texts": asked(lambda index, queries: index.query(queries, 10, where="caption < licence"),
                         "where=, two columns"),
    "where ids": asked(lambda index, queries: index.query(queries, 10, where="id < caption"), "where=, ids and texts"),
    "group few": asked(lambda index, queries: index.query(queries, 5, group_by="licence"), "group_by=, 7 groups"),
    "group": asked(lambda index, queries: index.query(queries, 10, group_by="caption"), "group_by=, all captions"),
    "append": append, "serve": serve,
}  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--long", type=int, default=4000)
    parser.add_argument("--step", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        found: Found = {}
        STEPS[options.step[0]](Path(options.step[1]), options.rows, options.long, found)
        print(json.dumps(found))
        return
    print(f"{options.rows:,} captions of {SHORT} characters, one of {options.long:,}\n")
    print("| step | seconds | rise of memory, MB |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory(prefix="captions-") as folder:
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.captions", "--rows", str(options.rows)]
            command += ["--long", str(options.long), "--step", step, folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for name, one in json.loads(output.splitlines()[-1]).items():
                print(f"| {name} | {one['seconds']:.2f} | {one['rise'] / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
