"""Kills a process that fills a store, again and again, and lets the next one go on."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retrac_scale.store import Layout, StoreWriter, create_store, open_store, verify_store, write_block
from retrac_scale.store import stream as parts

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


def contents(path: Path) -> dict[str, bytes]:
    """All files of a store by their place, without those that were being written when a process was killed."""
    files = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".partial")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def stream(path: Path) -> None:
    """The same rows for every call, in batches, in parts of some blocks each."""
    parts.LIST_CHUNK = 20  # type: ignore[attr-defined]
    with StoreWriter(path, layout=Layout(BLOCK), weights=WEIGHTS) as writer:
        for start in range(0, N, 7):
            rng = np.random.default_rng(start)
            rows = {name: rng.standard_normal((7, T, K), dtype=np.float32) for name in WEIGHTS}
            writer.append(np.arange(start, start + 7), rows, columns={"label": [f"class {i % 3}" for i in range(7)]})


def streamed(path: Path) -> dict[str, bytes]:
    """What a sound store of streamed rows holds."""
    assert not verify_store(path).of("metadata", "damaged", "unwritten", "foreign")
    store = open_store(path)
    held = {name: store.sketches(name).tobytes() + store.norms(name).tobytes() for name in WEIGHTS}
    return {**held, "id": store.ids.tobytes(), "label": "".join(store.columns["label"]).encode()}


def torture(
    folder: Path,
    kills: int,
    seed: int,
    *,
    longest_s: float,
    fill: Callable[[Path], None] = fill,
    contents: Callable[[Path], dict[str, bytes]] = contents,
) -> tuple[int, int]:
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


def measure_fill(folder: Path, fill: Callable[[Path], None] = fill) -> float:
    """Seconds that an uninterrupted run takes."""
    started = time.perf_counter()
    fill(folder / "timed")
    return time.perf_counter() - started
