"""What the store costs above zarr itself: python -m benchmarks.store_cost [--folder DIR]

The store gets float32 rows and stores them as float32 or int8. zarr gets the stored bytes as they are, or float32 rows
that are converted as the store does it, block by block; it forces its files to the disk once at the end, or not at all.
The store forces every block to the disk before it records it.
"""

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
REPEATS = 15


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


def with_zarr(path: Path, rows: np.ndarray, plane: np.ndarray, *, dtype: str | None = None, durable: bool) -> None:
    """The same bytes by zarr alone; with `dtype`, each block's rows are converted first."""
    group = zarr.open_group(path, mode="w-")
    n = BLOCKS * len(rows)
    options = {"compressors": (Crc32cCodec(),)}
    kind = rows.dtype if dtype is None else dtype
    cube = group.create_array("sketch", shape=(n, 1, rows.shape[2]), chunks=rows.shape, dtype=kind, **options)
    planes = [
        group.create_array(name, shape=(n, 1), chunks=(len(rows), 1), dtype=kind, **options)
        for name, kind in (("scale", "f4"), ("norm", "f4"), ("loss", "f4"), ("timestep", "i8"))
    ]
    for block in range(BLOCKS):
        part = slice(block * len(rows), (block + 1) * len(rows))
        cube[part] = rows if dtype is None else encode(rows, dtype)[0]
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
        forced, converted = "zarr, forced to the disk", "zarr, converted from float32, forced to the disk"
        zarr_path = folder / "z"
        writes: dict[str, Callable[[], None]] = {
            "zarr": partial(with_zarr, zarr_path, stored, plane, durable=False),
            forced: partial(with_zarr, zarr_path, stored, plane, durable=True),
            converted: partial(with_zarr, zarr_path, raw, plane, dtype=dtype, durable=True),
            "store": partial(with_store, folder / "s", raw, plane, dtype),
        }
        times: dict[str, list[float]] = {name: [] for name in writes}
        for _ in range(REPEATS):
            for name, write in writes.items():
                times[name].append(seconds(write))
                if name != "store":
                    shutil.rmtree(folder / "z")
            if len(times["store"]) < REPEATS:
                shutil.rmtree(folder / "s")
        size = BLOCKS * stored.nbytes / 1e6
        for name, values in times.items():
            middle = statistics.median(values)
            print(f"write {dtype}: {name}: {middle:.3f} s for {size:.0f} MB")
        convert = BLOCKS * statistics.median(seconds(partial(encode, raw, dtype)) for _ in range(REPEATS))
        store_took, forced_took, converted_took = (
            statistics.median(times[name]) for name in ("store", forced, converted)
        )
        print(
            f"write {dtype}: store / zarr: {store_took / converted_took:.2f} where both convert, "
            f"{store_took / forced_took:.2f} where zarr is given {dtype}, {(store_took - convert) / forced_took:.2f} "
            f"without the {convert:.3f} s of converting {BLOCKS * raw.nbytes / 1e6:.0f} MB of float32"
        )
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
