"""Our exact scan against FAISS's compressed rows, reranked until they are as exact; rows of real gradients, one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.coarse demo/sketches.zarr        # the demo's, or yours; needs faiss-cpu

Every kernel of FAISS's finds candidates, and IndexRefine orders them by float32 rows. How many candidates there are per
place of the list (its k_factor) is the smallest power of two by which all queries have their ten best, of the rows as
they are. Times are of the same rows laid out to a million, where ours are read from an index on disk; least CPU time of
some turns. What the installed FAISS does not have is said.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from benchmarks.pair_rows import options_of, pair_rows

TOP = 10
QUERIES = (1, 16, 64)
FACTORS = [2**power for power in range(12)]
TURNS = 2
IP = faiss.METRIC_INNER_PRODUCT
KERNELS = {
    "flat float32": "Flat",
    "QT_8bit_direct_signed": "QT_8bit_direct_signed",
    "QT_8bit": "SQ8",
    "QT_4bit": "SQ4",
    "RaBitQ": "RaBitQ",
    "RaBitQ, 4 bits": "RaBitQ4",
    "RaBitQ, fast scan": "RaBitQfs",
    "RaBitQ, fast scan, 4 bits": "RaBitQfs4",
}
"""What to call `made` with."""


def made(kind: str, rows: Any) -> Any:
    """FAISS's index of rows `[n, k]`; None where this FAISS has no such kernel."""
    k = rows.shape[1]
    try:
        if kind == "QT_8bit_direct_signed":  # rounds entries as they are, so that all rows have one unit
            index = faiss.IndexScalarQuantizer(k, faiss.ScalarQuantizer.QT_8bit_direct_signed, IP)
            rows = np.round(rows * (127 / abs(rows).max()))
        else:
            index = faiss.index_factory(k, kind, IP)
    except (AttributeError, RuntimeError):
        return None
    index.train(rows[:20_000])
    index.add(rows)
    return index


def recall(found: Any, best: Any) -> float:
    """The share of the ten best that were found."""
    return float(np.mean([len(np.intersect1d(*pair)) / TOP for pair in zip(found, best, strict=True)]))


def refined(base: Any, flat: Any, factor: int) -> Any:
    """Candidates of an index, so many for each place, ordered by float32 rows."""
    index = faiss.IndexRefine(base, flat)
    index.k_factor = factor
    return index


def chosen(base: Any, flat: Any, queries: Any, best: Any) -> tuple[float, int | None]:
    """Recall as it is, and the smallest factor by which all of the best are found; None for none of them."""
    alone = recall(base.search(queries, TOP)[1], best)
    for factor in FACTORS if alone < 1 else ():
        if recall(refined(base, flat, factor).search(queries, TOP)[1], best) == 1:
            return alone, factor
    return alone, 0 if alone == 1 else None


def seconds(search: Callable[[int], Any]) -> dict[int, float]:
    """Least CPU time by number of queries."""
    least = dict.fromkeys(QUERIES, float("inf"))
    for turn in range(1 + TURNS):
        for q in QUERIES:
            started = time.process_time()
            search(q)
            if turn:
                least[q] = min(least[q], time.process_time() - started)
    return least


def lines(rows: Any, queries: Any, times: int, folder: Path) -> Iterator[tuple[str, str, Any]]:
    """For each contender its name, what is to be said of it, and its seconds; ours first."""
    raw = rows / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
    store = rs.write_store(folder / "store", {"c": np.concatenate([raw] * times)[:, None]}, dtype="int8")
    index = rs.build_index(store, rs.ReTrac(), folder / "index", progress=False)
    asked = {q: rs.write_store(None, {"c": queries[:q, None]}, dtype="float32") for q in QUERIES}
    ours = rs.build_index(rs.write_store(None, {"c": raw[:, None]}, dtype="int8"), rs.ReTrac(), progress=False)
    flat = made("Flat", raw)
    scores = queries.astype(np.float64) @ raw.T.astype(np.float64)
    best = np.argsort(-scores, axis=1)[:, :TOP]
    found = recall(ours.query(asked[max(QUERIES)], TOP).ids, best)
    size = rows.shape[1] + 8
    yield "retrac_scale, int8 on disk", f"{size} | {found:.4f} | |", seconds(lambda q: index.query(asked[q], TOP))
    many = made("Flat", np.concatenate([raw] * times))
    queries = queries * (127 / abs(queries).max(1, keepdims=True))  # which direct kernels round as they are
    for name, kind in KERNELS.items():
        small = made(kind, raw)
        if small is None:
            yield name, "not in this FAISS", None
            continue
        alone, factor = chosen(small, flat, queries, best)
        size = small.sa_code_size()
        if factor is None:
            yield name, f"{size} | {alone:.4f} | none of {FACTORS[-1]} |", None
            continue
        base = many if kind == "Flat" else made(kind, np.concatenate([raw] * times))
        whole = refined(base, many, factor) if factor else base
        said = f"{size} + {many.sa_code_size()} | {alone:.4f} | {factor} |" if factor else f"{size} | {alone:.4f} | |"
        yield name, said, seconds(lambda q, whole=whole: whole.search(queries[:q], TOP))


def main() -> None:
    """See the module."""
    options = options_of(__doc__)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rows, queries = pair_rows(rs.open_store(options.store))
    times = max(1, round(options.rows / len(rows)))
    built = faiss.get_compile_options().strip()
    print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f}, FAISS {faiss.__version__} ({built})")
    print(f"{len(rows)} rows of {rows.shape[1]} entries, for times {times} times; {len(queries)} queries\n")
    print("| | bytes per row | recall@10 | k_factor | " + " | ".join(f"ms, Q = {q}" for q in QUERIES) + " |")
    print("| --- " * (4 + len(QUERIES)) + "|")
    ours: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, said, took in lines(rows, queries, times, Path(folder)):
            ours = ours or took
            each = [f"{1000 * took[q]:.1f} ({took[q] / ours[q]:.2f})" for q in QUERIES] if took else []
            print(f"| {name} | {said} {' | '.join(each)} |", flush=True)


if __name__ == "__main__":
    main()
