"""A chunk of a local array, on disk or in memory, without a copy."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore, StorePath

from retrac_scale.store import objects
from retrac_scale.store.errors import DamagedStoreError

CRC_BYTES = 4
REMEDY = "run `retrac-scale verify` on a store; build an index again."
Bytes = npt.NDArray[np.uint8]

_checked: dict[tuple[int, int], tuple[int, int]] = {}
"""(device, inode) -> (mtime_ns, size) of the files whose checksum this process has verified."""


def crc32c(values: npt.NDArray[Any], zeros: int = 0) -> int:
    """CRC-32C of an array's bytes in C order, followed by so many zero bytes."""
    crc = google_crc32c.value(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    return int(google_crc32c.extend(crc, bytes(zeros)) if zeros else crc)


def map_chunk(array: zarr.Array[Any], chunk: tuple[int, ...], crc: int | None = None) -> npt.NDArray[Any] | None:
    """One chunk as a read-only view of its memory-mapped file, or of a store in memory, cut to the array's bounds.

    The checksum at the end of the file is verified the first time that this process maps the file, and again when the
    file has changed since; that reads the chunk once, at the speed of a CRC-32C. In memory it is verified every time.

    Args:
        array: any array of a store or an index.
        chunk: the chunk's place in the chunk grid, one number per dimension.
        crc: the checksum that the file must end with, where a commit record knows it.

    Returns:
        the view, or None when the chunk cannot be mapped: remote, sharded, compressed or big-endian.

    Raises:
        DamagedStoreError: the file is missing, cut short, damaged, or not the one that `crc` belongs to.
    """
    store: Any = array.store_path.store
    if not (isinstance(store, LocalStore | MemoryStore) and is_plain(array)):
        return None
    key = chunk_key(array, chunk)
    size = int(np.prod(array.chunks)) * array.dtype.itemsize
    if isinstance(store, LocalStore):
        content = _file(Path(store.root) / key, size, crc)
    else:
        found = objects.in_place(store.get(key, default_buffer_prototype()))
        if found is None:
            raise DamagedStoreError(f"chunk {key} of the store in memory is missing.")
        content = found.as_numpy_array().view(np.uint8)
        _check(content, size, crc, f"chunk {key} of the store in memory", verified=False)
    content.flags.writeable = False
    return _cut(array, chunk, content)


def fetch_chunk(array: zarr.Array[Any], chunk: tuple[int, ...], crc: int | None = None) -> npt.NDArray[Any]:
    """One chunk of an array wherever it is: as `map_chunk`, or its object, read whole and checked."""
    mapped = map_chunk(array, chunk, crc)
    if mapped is not None:
        return mapped
    if not is_plain(array):
        spans = zip(chunk, array.chunks, strict=True)
        return np.asarray(array[tuple(slice(place * width, (place + 1) * width) for place, width in spans)])
    key, size = chunk_key(array, chunk), int(np.prod(array.chunks)) * array.dtype.itemsize
    found = objects.read(StorePath(array.store_path.store), key)
    if found is None or len(found) != size + CRC_BYTES:
        problem = "is missing" if found is None else f"has {len(found)} bytes instead of {size + CRC_BYTES}"
        raise DamagedStoreError(f"{array.store_path.store}/{key} {problem}; {REMEDY}")
    content = np.frombuffer(found, np.uint8)
    _check(content, size, crc, f"{array.store_path.store}/{key}", verified=False)
    return _cut(array, chunk, content)


Mapped = tuple[str, int, int]
"""A file that is mapped: its path, inode and size."""


def mapped_files(group: zarr.Group, keys: Iterable[str]) -> list[Mapped]:
    """The files of some objects below a group, as they are now; none where they are not on this disk."""
    store: Any = group.store
    if not isinstance(store, LocalStore):
        return []
    paths = [f"{store.root}/{group.path}/{key}" for key in keys]
    return [(path, status.st_ino, status.st_size) for path in paths for status in [os.stat(path)]]


def check_mapped(files: Iterable[Mapped]) -> None:
    """Raise DamagedStoreError where a mapped file was cut short in its place: to read behind its end ends a process.

    One that was removed, or replaced by renaming another to its name, lives on in its map.
    """
    for path, inode, size in files:
        try:
            status = os.stat(path)
        except OSError:
            continue
        if status.st_ino == inode and status.st_size < size:
            raise DamagedStoreError(
                f"{path} was cut short in its place, from {size} to {status.st_size} bytes, while it was read; replace "
                "files by renaming others to their names, and build an index again."
            )


def chunk_key(array: zarr.Array[Any], chunk: tuple[int, ...]) -> str:
    """The object that holds a chunk, by its key in the whole store."""
    return f"{array.store_path.path}/{array.metadata.encode_chunk_key(chunk)}".lstrip("/")


def _cut(array: zarr.Array[Any], chunk: tuple[int, ...], content: Bytes) -> npt.NDArray[Any]:
    """A chunk's values, within the array's bounds, from the content of its object."""
    size = int(np.prod(array.chunks)) * array.dtype.itemsize
    whole = content[:size].view(array.dtype).reshape(array.chunks)
    bounds = zip(array.shape, array.chunks, chunk, strict=True)
    return whole[tuple(slice(0, min(width, extent - place * width)) for extent, width, place in bounds)]


def _file(file: Path, size: int, crc: int | None) -> Bytes:
    """A checked map of a file of `size` bytes and their CRC-32C."""
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_size != size + CRC_BYTES:
                raise DamagedStoreError(f"{file} has {status.st_size} bytes instead of {size + CRC_BYTES}: damaged.")
            content = _mapped(opened.fileno(), status.st_size)
    except FileNotFoundError:
        raise DamagedStoreError(f"{file} is missing; {REMEDY}") from None
    place, state = (status.st_dev, status.st_ino), (status.st_mtime_ns, status.st_size)
    _check(content, size, crc, str(file), verified=_checked.get(place) == state)
    _checked[place] = state
    return content


def _mapped(file: int, size: int) -> Bytes:
    """A file in memory, copied on writing, for as long as a view of it lives.

    It holds no file descriptor, of which a process has few; until Python 3.13, that of `mmap` holds one each.
    """
    if os.name != "posix":
        return np.frombuffer(mmap.mmap(file, size, access=mmap.ACCESS_COPY), np.uint8)
    libc = _libc()
    place = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file, 0)
    if place == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    content = (ctypes.c_uint8 * size).from_address(place)
    weakref.finalize(content, libc.munmap, place, size).atexit = False  # threads may still read then
    mapped: Bytes = np.ctypeslib.as_array(content)
    return mapped


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.mmap.argtypes, libc.mmap.restype = (ctypes.c_void_p, ctypes.c_size_t, *numbers), ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _check(content: Bytes, size: int, crc: int | None, what: str, *, verified: bool) -> None:
    """Raise DamagedStoreError unless content ends with its CRC-32C, which is `crc` where that is given."""
    stored = int.from_bytes(content[size:].tobytes(), "little")
    if crc is not None and stored != crc:
        raise DamagedStoreError(f"{what} is not the chunk that was committed; {REMEDY}")
    if not verified and crc32c(content[:size]) != stored:
        raise DamagedStoreError(f"{what} fails its checksum; {REMEDY}")


def is_plain(array: zarr.Array[Any]) -> bool:
    """Whether the object of a chunk is nothing but its values' bytes and their CRC-32C."""
    codecs: Any = getattr(array.metadata, "codecs", ())
    return (
        [type(codec) for codec in codecs] == [BytesCodec, Crc32cCodec]
        and (codecs[0].endian is None or codecs[0].endian.value == sys.byteorder)
        and array.dtype.kind in "biuf"
    )
