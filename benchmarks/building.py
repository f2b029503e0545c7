"""What an index of a million random rows costs to build: plain, and with a ridge for each timestep.

    python -m benchmarks.building                 # 10^6 samples, 4 timesteps x 512 entries, 2 GB of store
    python -m benchmarks.building --rows 100000 --threads 1

Prints seconds and the process's peak memory of each: ReTrac matched (reads, decodes, encodes and writes the same rows)
and ReTracRidge (adds up 4 Gram matrices and factorises them besides); and that arithmetic alone, on rows in memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from retrac_scale.estimators.ridge import Moments, solve
from retrac_scale.store import create_store, write_block

TIMESTEPS, DIM = 4, 512


def make_store(folder: Path, rows: int) -> None:
    """Random directions, as a store under common noise holds them."""
    plan = rs.EvenlySpaced(TIMESTEPS)
    store = create_store(
        folder,
        shape=(rows, TIMESTEPS, DIM),
        ids=np.arange(rows),
        weights={"c": 1.0},
        fingerprint={"timesteps": plan.spec()},
        dtype="int8",
        quantities=("timestep",),
    )
    steps = plan.pairs("c", np.arange(1), 1000).timesteps
    rng = np.random.default_rng(0)
    for number, block in enumerate(store.blocks):
        n = block.stop - block.start
        values = rng.standard_normal((n, TIMESTEPS, DIM), dtype=np.float32)
        values /= np.linalg.norm(values, axis=2, keepdims=True)
        write_block(store, "c", number, values, np.ones((n, TIMESTEPS), np.float32), timesteps=np.tile(steps, (n, 1)))


def build(folder: Path, name: str, threads: int, told: Any) -> None:
    """Build one index in this process; seconds, and peak memory over that of the start, into a queue."""
    torch.set_num_threads(threads)
    estimator = {"ReTrac matched": rs.ReTrac("matched"), "ReTracRidge": rs.ReTracRidge()}[name]
    store = rs.open_store(folder)
    started = time.perf_counter()
    rs.build_index(store, estimator, folder.with_name("index.zarr"))
    told.put((time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def arithmetic(rows: int, threads: int) -> tuple[float, float]:
    """Seconds of the Gram matrices of so many rows, and of the factorisations, as the engine does them."""
    torch.set_num_threads(threads)
    some = np.random.default_rng(0).standard_normal((16384, DIM), dtype=np.float32)
    started = time.perf_counter()
    total = Moments.of(some, "auto", dual=False)
    each = (time.perf_counter() - started) / len(some)
    started = time.perf_counter()
    solve(total, "auto")
    return each * rows * TIMESTEPS / threads, TIMESTEPS * (time.perf_counter() - started)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/retrac-building"))
    options = parser.parse_args()
    folder = options.folder / f"{options.rows}.zarr"
    if not folder.exists():
        make_store(folder, options.rows)
    print(f"{cpu_name()}, {options.threads} thread(s), {options.rows} samples, {TIMESTEPS} x {DIM} entries, int8")
    spawn = multiprocessing.get_context("spawn")
    seconds: dict[str, float] = {}
    for name in ("ReTrac matched", "ReTracRidge") * options.repeats:
        shutil.rmtree(folder.with_name("index.zarr"), ignore_errors=True)
        told = spawn.Queue()
        process = spawn.Process(target=build, args=(folder, name, options.threads, told))
        process.start()
        took, peak = told.get()
        process.join()
        seconds[name] = min(took, seconds.get(name, took))
        print(f"{name}: {took:.1f} s, peak memory {peak / 1e6:.0f} MB", flush=True)
    products, factors = arithmetic(options.rows, options.threads)
    print(f"of ReTracRidge, Gram matrices {products:.1f} s, factorisations {factors:.2f} s")
    print(f"ReTracRidge / ReTrac matched: {seconds['ReTracRidge'] / seconds['ReTrac matched']:.2f}")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
