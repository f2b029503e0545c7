"""Cost per row of a query from 10^4 rows on: python -m benchmarks.scaling [--largest N]

One int8 index of random rows (2048 entries, one checkpoint) grows on disk; each size is queried warm. Besides the cost
per row it prints the marginal cost: what each further row costs between one size and the next. At last 10^5 rows and
the largest size are queried in turns, so that a machine that slows down meanwhile slows both.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

import retrac_scale as rs
from benchmarks.scanning import DIM, anonymous_bytes, asked, median, random_rows
from retrac_scale.api.index import build_index
from retrac_scale.index.build import create_arrays
from retrac_scale.query.index import open_index
from retrac_scale.store import write_store
from retrac_scale.store.mapping import map_chunk
from retrac_scale.store.schema import ATTRIBUTE, get_array

QUERIES = (1, 64)
TOP = 10
SEALED = ("digest", "seals", "segments")
"""Of a description; an index without them is one of an earlier release, whose arrays may be anything."""


def make_index(folder: Path, n: int) -> None:
    """An index of n rows: those of a small real index over and over, each time in another order of their entries."""
    small = build_index(write_store(None, {"c": random_rows(0, 1024)[:, None]}), rs.ReTrac(), None)
    root = zarr.open_group(folder, mode="w")
    chunks = create_arrays(root, 1, np.arange(n), DIM, "int8")
    root.create_group("column")
    row, scale, norm = (np.asarray(get_array(small.root, name)[0]) for name in ("row", "scale", "norm"))
    rng = np.random.default_rng(0)
    for part in chunks:
        size = part.stop - part.start
        copies = -(-size // len(row))
        for name, values in (("scale", scale), ("norm", norm)):
            get_array(root, name)[0, part] = np.tile(values, copies)[:size]
        get_array(root, "row")[0, part] = np.concatenate([row[:, rng.permutation(DIM)] for _ in range(copies)])[:size]
    unsealed = {name: value for name, value in small.meta.items() if name not in SEALED}
    root.attrs[ATTRIBUTE] = unsealed | {"complete": True}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=4_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/retrac-scaling"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="leave the indexes on disk")
    options = parser.parse_args()
    sizes = [n for n in (10**4, 10**5, 3 * 10**5, 10**6, 2 * 10**6, 4 * 10**6, 10**7) if n <= options.largest]
    print(f"{torch.get_num_threads()} thread(s), k = {TOP}, {DIM} entries, int8")
    before: dict[int, tuple[int, float]] = {}
    kept: dict[int, Any] = {}
    for n in sizes:
        folder = options.folder / str(n)
        if not (folder / "zarr.json").exists():
            make_index(folder, n)
        started = time.perf_counter()
        index: Any = open_index(folder)
        for number in range(len(index.chunks)):
            map_chunk(get_array(index.root, "row"), (0, number, 0))
        first = time.perf_counter() - started
        for q in QUERIES:
            queries, start = asked(q), anonymous_bytes()
            seconds = median(lambda queries=queries, index=index: index.query(queries, TOP), options.repeats)
            line = f"N = {n:>8d}, Q = {q:>2d}: {1e3 * seconds:8.1f} ms, {1e9 * seconds / n:7.1f} ns per row"
            if q in before:
                rows, took = before[q]
                line += f", {1e9 * (seconds - took) / (n - rows):7.1f} ns per further row"
            print(f"{line}, memory grew by {max(0, anonymous_bytes() - start) / 1e6:.0f} MB", flush=True)
            before[q] = n, seconds
        print(f"N = {n:>8d}: verifying the checksums of all chunks took {first:.2f} s, once per process", flush=True)
        kept[n] = index
        for gone in [size for size in kept if size not in (10**5, n)]:
            del kept[gone]
            if not options.keep:
                shutil.rmtree(options.folder / str(gone))
    compare(kept, options.repeats)
    if not options.keep:
        shutil.rmtree(options.folder)


def compare(indexes: dict[int, Any], repeats: int) -> None:
    """Cost per row of each of some sizes, in turns, each after a query of its own that warms the caches."""
    for q in QUERIES:
        queries = asked(q)
        seconds: dict[int, list[float]] = {n: [] for n in indexes}
        for _ in range(repeats):
            for n, index in indexes.items():
                index.query(queries, TOP)
                started = time.perf_counter()
                index.query(queries, TOP)
                seconds[n].append(time.perf_counter() - started)
        each = {n: 1e9 * statistics.median(own) / n for n, own in seconds.items()}
        told = ", ".join(f"{cost:.1f} ns per row of {n}" for n, cost in each.items())
        print(
            f"in turns, Q = {q:>2d}: {told}; they differ by {max(each.values()) / min(each.values()) - 1:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
