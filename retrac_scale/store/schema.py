"""Names, dimensions and limits of the format that writer and reader share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

FORMAT_VERSION = 1
ATTRIBUTE = "retrac_scale"
BLOCK_BYTES = 16 * 2**20
BLOCK_SAMPLES = 4096
MIN_BLOCKS = 8
MIN_BLOCK_SAMPLES = 64

Url = str | os.PathLike[str] | None
CHECKSUM = (Crc32cCodec(),)


def zarr_location(url: Url) -> Any:
    """What zarr opens: a path, an fsspec URL, or fresh memory for None."""
    return zarr.storage.MemoryStore() if url is None else os.fspath(url)


def new_array(
    group: zarr.Group, name: str, *, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any, dims: Sequence[str]
) -> zarr.Array[Any]:
    """An uncompressed array with a checksum on every chunk and named dimensions; replaces one of the same name."""
    return group.create_array(
        name, shape=shape, chunks=chunks, dtype=dtype, compressors=CHECKSUM, dimension_names=dims, overwrite=True
    )


def get_array(group: zarr.Group, path: str) -> zarr.Array[Any]:
    """The array at a path below a group."""
    array = group[path]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{path} in {group.store_path} is no array; the store is damaged.")
    return array


def read(group: zarr.Group, path: str, selection: Any = slice(None)) -> npt.NDArray[Any]:
    """A part of an array as NumPy."""
    return np.asarray(get_array(group, path)[selection])


def read_ids(group: zarr.Group) -> npt.NDArray[Any]:
    """The sample ids `[n]` of a store or an index, int64 or str."""
    ids = read(group, "id")
    return ids if ids.dtype.kind in "iu" else ids.astype(str)


def block_samples(n_samples: int, row_bytes: int) -> int:
    """Samples per block: up to 16 MiB, fewer when that would leave a small store in less than 8 blocks."""
    by_bytes = max(1, min(BLOCK_SAMPLES, BLOCK_BYTES // max(1, row_bytes)))
    return min(by_bytes, max(MIN_BLOCK_SAMPLES, -(-n_samples // MIN_BLOCKS)))


def blocks(n_samples: int, size: int) -> list[slice]:
    """The sample ranges of all blocks."""
    return [slice(start, min(start + size, n_samples)) for start in range(0, n_samples, size)]


def check_ids(ids: Sequence[Any] | npt.NDArray[Any] | None, n_samples: int) -> npt.NDArray[Any]:
    """Sample ids as an int64 or string array `[n]`, 0 .. n-1 when None.

    Raises:
        ValueError: the wrong number, the wrong type, or an id given twice (which is named).
    """
    if ids is None:
        return np.arange(n_samples, dtype=np.int64)
    array = np.asarray(ids)
    if array.shape != (n_samples,):
        raise ValueError(f"got ids of shape {array.shape} for {n_samples} samples; give one id per sample.")
    if array.dtype.kind not in "iuU":
        raise ValueError(f"sample ids must be integers or strings, got dtype {array.dtype}.")
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        twice = values[np.argmax(counts > 1)].item()
        places = np.flatnonzero(array == twice)[:2].tolist()
        raise ValueError(f"id {twice!r} is given twice, at positions {places}; give every sample an id of its own.")
    return array.astype(np.int64) if array.dtype.kind in "iu" else array


def differences(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable differences between two fingerprints: field, stored value, given value."""
    found = []
    for key in sorted({*stored, *given}):
        left, right = stored.get(key), given.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} is {_short(left)} there and {_short(right)} here")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
