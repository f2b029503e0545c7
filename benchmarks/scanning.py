"""Exact top-k from an index on disk against FAISS, NumPy, torch and TRAK: python -m benchmarks.scanning [--rows N]

Rows are random directions of 2048 entries, in a store and an int8 index on disk whose pages are in the page cache; the
others hold float32 rows (or what they make of them) in memory. Every contender runs in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import retrac_scale as rs
from retrac_scale.native.compiled import has
from retrac_scale.store import create_store, write_block

DIM = 2048
TOP = 100
QUERIES = (1, 16, 64, 256)
OTHER_ROWS = 100_000
RECALL_QUERIES = 32
BLAS_KERNELS = ("", "Haswell", *(["SkylakeX"] if has("avx512bw") else []))
"""OPENBLAS_CORETYPE for FAISS and NumPy; the first is OpenBLAS's own choice. The fastest for each Q counts."""
WITH_BLAS = "faiss-flat, BLAS"
"""With BLAS for any number of queries: as it is installed, FAISS calls none below 128,000 entries of queries."""


def random_rows(seed: int, n: int) -> Any:
    """Random directions, float32 `[n, k]`."""
    return np.random.default_rng(seed).standard_normal((n, DIM), dtype=np.float32)


def prepare(folder: Path, n: int) -> None:
    """A store of n samples and its ReTrac index."""
    if (folder / "index" / "zarr.json").exists():
        return
    fingerprint = {"projection": {"kind": "given", "dim": DIM}}
    common: dict[str, Any] = {"weights": {"c": 1.0}, "fingerprint": fingerprint, "quantities": ()}
    store = create_store(folder / "store", shape=(n, 1, DIM), ids=np.arange(n), dtype="int8", **common)
    for number, block in enumerate(store.blocks):
        if not store.committed("c")[number]:
            rows = random_rows(number, block.stop - block.start)
            write_block(store, "c", number, rows[:, None], np.linalg.norm(rows, axis=1)[:, None])
    rs.build_index(store.refresh(), rs.ReTrac(), folder / "index")


def asked(q: int) -> Any:
    """A store of q queries."""
    return rs.write_store(None, {"c": random_rows(10**6, q)[:, None]}, dtype="float32")


def median(call: Callable[[], object], repeats: int) -> float:
    """Median duration, the first run left out."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def ours(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of Index.query for each number of queries, with and without looking up the store."""
    index = rs.open_index(folder / "index")
    stores = {q: asked(q) for q in QUERIES}
    found: dict[str, Any] = {"rows": index.shape[1], "check_store": median(lambda: index.check_store(), repeats)}
    found["seconds"] = {q: median(lambda q=q: index.query(stores[q], TOP), repeats) for q in QUERIES}
    return found


def int8_products(repeats: int) -> float:
    """Products per second of int8 matrices that lie in a core's cache, as fast as torch makes them."""
    rng = torch.Generator().manual_seed(0)
    rows, queries = (
        torch.randint(-100, 100, shape, dtype=torch.int8, generator=rng) for shape in ((512, DIM), (DIM, 256))
    )
    return 512 * DIM * 256 / median(lambda: torch._int_mm(rows, queries), 20 * repeats)


def others(name: str, repeats: int) -> dict[str, Any]:
    """Seconds of a contender for each number of queries, over `OTHER_ROWS` rows in memory."""
    rows = random_rows(0, OTHER_ROWS)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    search: Callable[[Any], object]
    if name.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        if name == WITH_BLAS:
            faiss.cvar.distance_compute_blas_threshold = 1
        index = {
            "faiss-flat": lambda: faiss.IndexFlatIP(DIM),
            WITH_BLAS: lambda: faiss.IndexFlatIP(DIM),
            "faiss-fp16": lambda: faiss.IndexScalarQuantizer(
                DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            ),
            "faiss-8bit": lambda: faiss.IndexScalarQuantizer(
                DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            ),
        }[name]()
        index.train(rows[:10_000])
        index.add(rows)
        del rows

        def search(queries: Any) -> object:
            return index.search(queries, TOP)
    elif name == "numpy-fp32":

        def search(queries: Any) -> object:
            values = queries @ rows.T
            return np.argpartition(values, -TOP, axis=1)[:, -TOP:]
    elif name in ("torch-fp32", "torch-bf16"):
        held = torch.from_numpy(rows).to(torch.bfloat16 if name == "torch-bf16" else torch.float32)

        def search(queries: Any) -> object:
            return torch.topk(torch.from_numpy(queries).to(held.dtype) @ held.T, TOP, dim=1)
    else:
        from trak.score_computers import BasicScoreComputer

        held = torch.from_numpy(rows)
        computer = BasicScoreComputer(dtype=torch.float32, device=torch.device("cpu"))

        def search(queries: Any) -> object:
            values = torch.zeros(len(held), len(queries))
            computer.get_scores(held, torch.from_numpy(queries), values)
            return torch.topk(values, TOP, dim=0)

    seconds = {}
    for q in QUERIES:
        queries = random_rows(10**6, q)
        seconds[q] = median(lambda queries=queries: search(queries), repeats)
    return {"rows": OTHER_ROWS, "seconds": seconds}


def bandwidth(repeats: int) -> float:
    """Bytes per second at which as many threads as torch uses read memory that is in no cache."""
    words = torch.ones(2**27, dtype=torch.int64)
    return words.numel() * 8 / median(lambda: words.sum(), repeats)


def anonymous_bytes() -> int:
    """Resident memory of this process that is not a mapped file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def memory(folder: Path, q: int) -> dict[str, int]:
    """Peak resident memory beyond mapped files during a query, and what the process had before it."""
    index, queries = rs.open_index(folder / "index"), asked(q)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    index.query(queries, TOP)
    done.set()
    watcher.join()
    return {"before": before, "peak": max(peak, anonymous_bytes())}


def recall(folder: Path) -> dict[str, float]:
    """Recall@100 of the index against float64 scores of its own rows, and of the float32 rows that it was made from."""
    index, queries = rs.open_index(folder / "index"), asked(RECALL_QUERIES)
    asked_rows = torch.from_numpy(index.query_rows(queries)[0]).double()
    answer = index.query(queries, TOP)
    chunks = [index.chunk(number) for number in range(len(index.chunks))]
    own = torch.cat(
        [
            torch.cat(
                [
                    asked_rows
                    @ (
                        torch.from_numpy(c.rows[0][i : i + 1024].astype(np.float64)).T
                        * torch.from_numpy(c.scale[0, i : i + 1024].copy())
                    )
                    for i in range(0, len(c.ids), 1024)
                ],
                1,
            )
            for c in chunks
        ],
        1,
    )
    given = []
    for number, block in enumerate(rs.open_store(folder / "store").blocks):
        rows = torch.from_numpy(random_rows(number, block.stop - block.start)).double()
        given.append(asked_rows @ (rows / rows.norm(dim=1, keepdim=True)).T)

    def against(scores: torch.Tensor) -> float:
        best = torch.topk(scores, TOP, dim=1).indices.numpy()
        return float(np.mean([len(np.intersect1d(a, b)) / TOP for a, b in zip(best, answer.ids, strict=True)]))

    return {"own": against(own), "given": against(torch.cat(given, 1))}


def run(what: str, options: argparse.Namespace, threads: int, kernel: str | None = None) -> Any:
    """One measurement in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    environment |= {"OMP_NUM_THREADS": str(threads)} | ({"OPENBLAS_CORETYPE": kernel} if kernel else {})
    command = [sys.executable, "-m", "benchmarks.scanning", "--measure", what, "--folder", str(options.folder)]
    output = subprocess.run(
        [*command, "--repeats", str(options.repeats)], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def report(name: str, result: Any, width: int) -> dict[str, float]:
    """Print a line per number of queries; rows per second by number of queries."""
    rates = {}
    for q, seconds in result["seconds"].items():
        rate = result["rows"] / seconds
        rates[q] = rate
        print(
            f"  {name:32s} Q = {q:>3s}: {rate:9.3g} rows/s, {rate * DIM * int(q) / 1e9:6.1f} GMAC/s, "
            f"{rate * DIM * width / 1e9:5.1f} GB/s"
        )
    return rates


def compare(options: argparse.Namespace, threads: int) -> None:
    """All contenders with the same number of threads."""
    speed = run("bandwidth", options, threads)
    most = run("int8", options, threads)
    print(f"{threads} thread(s); memory is read at {speed / 1e9:.1f} GB/s; int8 in cache: {most / 1e9:.0f} GMAC/s")
    result = run("ours", options, threads)
    print(f"  looking up the store takes {1e3 * result['check_store']:.1f} ms of every query")
    mine = report("retrac_scale (on disk)", result, 1)
    print(f"  share of the read bandwidth at Q = 1: {mine['1'] * DIM / speed:.2f}")
    flat: dict[str, float] = {}
    for kernel, name in itertools.product(BLAS_KERNELS, ("faiss-flat", WITH_BLAS)):
        rates = report(f"{name} {kernel or 'as installed'}", run(name, options, threads, kernel), 4)
        ratios = ", ".join(f"{mine[q] / rates[q]:.2f}" for q in rates)
        print(f"    ours / this, Q = {', '.join(rates)}: {ratios}")
        flat = {q: max(rate, flat.get(q, 0)) for q, rate in rates.items()}
    print(f"  ours / fastest faiss-flat: {', '.join(f'Q = {q}: {mine[q] / flat[q]:.2f}' for q in flat)}")
    widths = {"faiss-fp16": 2, "faiss-8bit": 1, "numpy-fp32": 4, "torch-fp32": 4, "torch-bf16": 2, "trak": 4}
    for name in widths if options.all else ():
        rates = report(name, run(name, options, threads), widths[name])
        print(f"    ours / this: {', '.join(f'Q = {q}: {mine[q] / rates[q]:.2f}' for q in rates)}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/retrac-scanning"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--all", action="store_true", help="all contenders, not FAISS IndexFlatIP alone")
    parser.add_argument("--prepare", action="store_true", help="only make the index")
    parser.add_argument("--quality", action="store_true", help="recall and memory in place of speed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measures = {
            "ours": lambda: ours(options.folder, options.repeats),
            "bandwidth": lambda: bandwidth(options.repeats),
            "int8": lambda: int8_products(options.repeats),
        }
        measures |= {"memory": lambda: memory(options.folder, 64), "recall": lambda: recall(options.folder)}
        print(json.dumps(measures.get(options.measure, lambda: others(options.measure, options.repeats))()))
        return
    options.folder = options.folder / str(options.rows)
    prepare(options.folder, options.rows)
    print(f"{options.rows} rows of {DIM} entries, int8 in chunks of the index, page cache warm; k = {TOP}")
    if options.quality:
        found = run("recall", options, 1)
        print(f"recall@{TOP} against float64 scores of the stored rows: {found['own']:.4f}")
        print(f"recall@{TOP} against float64 scores of the float32 rows before int8: {found['given']:.4f}")
        for threads in options.threads:
            used = run("memory", options, threads)
            print(
                f"memory beyond mapped files, Q = 64, {threads} thread(s): {used['before'] / 1e6:.0f} MB before the "
                f"query, {used['peak'] / 1e6:.0f} MB at its peak"
            )
    elif not options.prepare:
        for threads in options.threads:
            compare(options, threads)


if __name__ == "__main__":
    main()
