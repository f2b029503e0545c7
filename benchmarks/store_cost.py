"""What the store costs above zarr itself: python -m benchmarks.store_cost [--folder DIR]"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from retrac_scale.store import create_store, open_store, write_block
from retrac_scale.store.encoding import encode
from retrac_scale.store.mapping import _checked, map_chunk

BLOCKS, SAMPLES, DIM = 12, 4096, 4096
REPEATS = 5


def seconds(call: Callable[[], object]) -> float:
    """Duration of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def flush(folder: Path) -> None:
    """Force all files of a folder to the disk, as the store does."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def with_zarr(path: Path, rows: np.ndarray, plane: np.ndarray, *, durable: bool) -> None:
    """The same bytes by zarr alone."""
    group = zarr.open_group(path, mode="w-")
    n = BLOCKS * len(rows)
    options = {"compressors": (Crc32cCodec(),)}
    cube = group.create_array("sketch", shape=(n, 1, rows.shape[2]), chunks=rows.shape, dtype=rows.dtype, **options)
    planes = [
        group.create_array(name, shape=(n, 1), chunks=(len(rows), 1), dtype=kind, **options)
        for name, kind in (("scale", "f4"), ("norm", "f4"), ("loss", "f4"), ("timestep", "i8"))
    ]
    for block in range(BLOCKS):
        part = slice(block * len(rows), (block + 1) * len(rows))
        cube[part] = rows
        for array in planes:
            array[part] = plane
    if durable:
        flush(path)


def with_store(path: Path, rows: np.ndarray, plane: np.ndarray, dtype: str) -> None:
    """Raw rows through `write_block`."""
    n, _, k = rows.shape
    store = create_store(
        path, shape=(n * BLOCKS, 1, k), ids=np.arange(n * BLOCKS), weights={"c": 1.0}, fingerprint={}, dtype=dtype
    )
    assert len(store.blocks) == BLOCKS
    for block in range(BLOCKS):
        write_block(store, "c", block, rows, plane, losses=plane, timesteps=plane.astype(np.int64))


def main(folder: Path) -> None:
    """Write and read both ways, in turns."""
    rng = np.random.default_rng(0)
    for dtype, samples in (("float32", SAMPLES // 4), ("int8", SAMPLES)):
        raw = rng.standard_normal((samples, 1, DIM), dtype=np.float32)
        stored = raw if dtype == "float32" else rng.integers(-127, 128, raw.shape, dtype=np.int8)
        plane = rng.random((samples, 1), dtype=np.float32)
        times: dict[str, list[float]] = {"zarr": [], "zarr, forced to the disk": [], "store": []}
        for _ in range(REPEATS):
            for name, write in (
                ("zarr", partial(with_zarr, folder / "z", stored, plane, durable=False)),
                ("zarr, forced to the disk", partial(with_zarr, folder / "z", stored, plane, durable=True)),
                ("store", partial(with_store, folder / "s", raw, plane, dtype)),
            ):
                times[name].append(seconds(write))
                if name != "store":
                    shutil.rmtree(folder / "z")
            if len(times["store"]) < REPEATS:
                shutil.rmtree(folder / "s")
        size = BLOCKS * stored.nbytes / 1e6
        for name, values in times.items():
            middle = statistics.median(values)
            ratio = middle / statistics.median(times["zarr, forced to the disk"])
            print(f"write {dtype}: {name}: {middle:.3f} s for {size:.0f} MB, {ratio:.2f} of zarr forced to the disk")
        convert = BLOCKS * statistics.median(seconds(partial(encode, raw, dtype)) for _ in range(REPEATS))
        rest = (statistics.median(times["store"]) - convert) / statistics.median(times["zarr, forced to the disk"])
        size = BLOCKS * raw.nbytes / 1e6
        print(f"write {dtype}: of which converting {size:.0f} MB of float32 {convert:.3f} s; the rest {rest:.2f}")
        store = open_store(folder / "s")
        part = store.only_part
        chunk = store.stored("c", 0)[0]
        print(f"read {dtype}: a view of the mapped file: {not chunk.flags.owndata and not chunk.flags.writeable}")
        array = part.array("c/sketch")
        through = statistics.median(seconds(partial(array.__getitem__, slice(0, len(raw)))) for _ in range(REPEATS))
        _checked.clear()
        first = seconds(partial(map_chunk, array, (0, 0, 0)))
        again = statistics.median(seconds(partial(map_chunk, array, (0, 0, 0))) for _ in range(100))
        print(
            f"read {dtype}: {stored.nbytes / 1e6:.0f} MB chunk: zarr {through * 1e3:.2f} ms, mapped the first time "
            f"{first * 1e3:.2f} ms (checksum, {stored.nbytes / first / 1e9:.1f} GB/s), later {again * 1e6:.0f} us"
        )
        shutil.rmtree(folder / "s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=None)
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        main(Path(name))
