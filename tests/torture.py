"""Kills a process that fills a store, again and again, and lets the next one go on."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from retrac_scale.store import Layout, create_store, write_block

WEIGHTS = {"a": 0.5, "b": 2.0}
N, T, K, BLOCK = 70, 2, 32, 4


def fill(path: Path) -> None:
    """Begin or continue a store whose blocks are a function of their place, and finish it."""
    store = create_store(
        path,
        shape=(N, T, K),
        ids=np.arange(N),
        weights=WEIGHTS,
        fingerprint={"projection": {"kind": "given", "dim": K}},
        dtype="int8",
        columns={"label": [f"class {i % 3}" for i in range(N)]},
        layout=Layout(BLOCK),
    )
    for number, name in enumerate(WEIGHTS):
        for block in np.flatnonzero(~store.committed(name)).tolist():
            rng = np.random.default_rng([number, block])
            samples = store.blocks[block]
            n = samples.stop - samples.start
            sketches = rng.standard_normal((n, T, K), dtype=np.float32)
            norms, losses = rng.random((2, n, T), dtype=np.float32)
            write_block(store, name, block, sketches, norms, losses=losses, timesteps=rng.integers(0, 99, (n, T)))


def torture(folder: Path, kills: int, seed: int, *, longest_s: float) -> tuple[int, int]:
    """Kill the writer at random instants, resume it each time; start a new store whenever one is finished.

    Returns:
        the number of kills, and of stores that were finished through kills and were identical to an uninterrupted one.

    Raises:
        AssertionError: a finished store differs in a file from an uninterrupted one.
    """
    fill(folder / "whole")
    expected = contents(folder / "whole")
    context: Any = multiprocessing.get_context("fork")
    rng = np.random.default_rng(seed)
    killed, finished = 0, 0
    while killed < kills or not finished:
        writer = context.Process(target=fill, args=(folder / "store",))
        writer.start()
        writer.join(rng.uniform(0, longest_s))
        if writer.is_alive():
            writer.kill()
            killed += 1
            writer.join()
            continue
        assert writer.exitcode == 0, f"resuming failed after {killed} kills"
        assert contents(folder / "store") == expected, f"the store differs after {killed} kills"
        finished += 1
        shutil.rmtree(folder / "store")
    return killed, finished


def contents(path: Path) -> dict[str, bytes]:
    """All files of a store by their place, without those that were being written when a process was killed."""
    files = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".partial")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def measure_fill(folder: Path) -> float:
    """Seconds that an uninterrupted run takes."""
    started = time.perf_counter()
    fill(folder / "timed")
    return time.perf_counter() - started
