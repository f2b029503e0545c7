"""A chunk of a local array, without a copy."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from retrac_scale.store.errors import DamagedStoreError

CRC_BYTES = 4

_checked: dict[tuple[int, int], tuple[int, int]] = {}
"""(device, inode) -> (mtime_ns, size) of the files whose checksum this process has verified."""


def crc32c(values: npt.NDArray[Any], zeros: int = 0) -> int:
    """CRC-32C of an array's bytes in C order, followed by so many zero bytes."""
    crc = google_crc32c.value(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    return int(google_crc32c.extend(crc, bytes(zeros)) if zeros else crc)


def map_chunk(array: zarr.Array[Any], chunk: tuple[int, ...], crc: int | None = None) -> npt.NDArray[Any] | None:
    """One chunk as a read-only view of its memory-mapped file, cut to the array's bounds.

    The checksum at the end of the file is verified the first time that this process maps the file, and again when the
    file has changed since; that reads the chunk once, at the speed of a CRC-32C.

    Args:
        array: any array of a store or an index.
        chunk: the chunk's place in the chunk grid, one number per dimension.
        crc: the checksum that the file must end with, where a commit record knows it.

    Returns:
        the view, or None when the chunk cannot be mapped: remote, in memory, sharded, compressed or big-endian.

    Raises:
        DamagedStoreError: the file is missing, cut short, damaged, or not the one that `crc` belongs to.
    """
    if not (isinstance(array.store_path.store, LocalStore) and is_plain(array)):
        return None
    store: Any = array.store_path.store
    file = Path(store.root) / array.store_path.path / array.metadata.encode_chunk_key(chunk)
    size = int(np.prod(array.chunks)) * array.dtype.itemsize
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_size != size + CRC_BYTES:
                raise DamagedStoreError(f"{file} has {status.st_size} bytes instead of {size + CRC_BYTES}: damaged.")
            # torch's mapping holds no file descriptor, of which a process has few; Python's holds one each
            mapped = torch.from_file(str(file), shared=False, size=status.st_size, dtype=torch.uint8).numpy()
            mapped.flags.writeable = False
    except FileNotFoundError:
        raise DamagedStoreError(f"{file} is missing; run `retrac-scale verify` on the store.") from None
    stored = int.from_bytes(mapped[size:].tobytes(), "little")
    if crc is not None and stored != crc:
        raise DamagedStoreError(f"{file} is not the chunk that was committed; run `retrac-scale verify` on the store.")
    place, state = (status.st_dev, status.st_ino), (status.st_mtime_ns, status.st_size)
    if _checked.get(place) != state:
        if crc32c(mapped[:size]) != stored:
            raise DamagedStoreError(f"{file} fails its checksum; run `retrac-scale verify` on the store.")
        _checked[place] = state
    whole = mapped[:size].view(array.dtype).reshape(array.chunks)
    bounds = zip(array.shape, array.chunks, chunk, strict=True)
    return whole[tuple(slice(0, min(width, extent - place * width)) for extent, width, place in bounds)]


def is_plain(array: zarr.Array[Any]) -> bool:
    """Whether the object of a chunk is nothing but its values' bytes and their CRC-32C."""
    codecs: Any = getattr(array.metadata, "codecs", ())
    return (
        [type(codec) for codec in codecs] == [BytesCodec, Crc32cCodec]
        and (codecs[0].endian is None or codecs[0].endian.value == sys.byteorder)
        and array.dtype.kind in "biuf"
    )
