"""The objects (files) below a zarr group: read, write, list, delete, make durable."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import uuid
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, StorePath

PARALLEL = 16
SLICE = 2**21
"""Bytes that are made, and handed on to the disk, at a time."""

T = TypeVar("T")

Place = zarr.Group | StorePath
"""What objects are below: a group, or a place where a group should be."""

Content = Buffer | bytes | Iterable[npt.NDArray[np.uint8]]
"""Of an object to be written: whole, or pieces that are made one after the other."""


def read_all(group: Place, keys: Iterable[str], part: ByteRequest | None = None) -> dict[str, bytes | None]:
    """Contents of objects below a group, or a part of each; None for those that do not exist."""
    store: Any = group.store

    async def get(key: str) -> bytes | None:
        value = await store.get(_full(group, key), default_buffer_prototype(), part)
        return None if value is None else value.to_bytes()

    return _in_parallel(store, dict.fromkeys(keys, get))


def read(group: Place, key: str) -> bytes | None:
    """The content of one object, None when it does not exist."""
    return read_all(group, [key])[key]


def write_all(group: Place, objects: Mapping[str, Content], *, durable: bool = True) -> None:
    """Write objects, each of them atomically; on a local disk they are durable when this returns.

    Pieces are asked for in the order of the objects; an exception while they are made leaves nothing written. What need
    not be durable yet is so after `force_all`.
    """
    store: Any = group.store
    if store.read_only:
        raise OSError(errno.EACCES, f"{store} was opened for reading; open it with mode='r+' to write")
    contents = {_full(group, key): content for key, content in objects.items()}
    if isinstance(store, LocalStore):
        _write_files(store.root, contents, durable)
    else:
        buffers = {key: _whole(content) for key, content in contents.items()}

        async def put(key: str) -> None:
            await store.set(key, buffers[key])

        _in_parallel(store, dict.fromkeys(buffers, put))


def write_new(place: Place, key: str, content: bytes) -> None:
    """Write an object unless there is one; on a local disk only one of several processes does."""
    store: Any = place.store
    sync(store.set_if_not_exists(_full(place, key), default_buffer_prototype().buffer.from_bytes(content)))


def place_of(location: Any) -> StorePath:
    """Where the objects of a location are, from `zarr_location`."""
    return StorePath(LocalStore(location) if isinstance(location, str) else location)


def delete_all(group: Place, keys: Iterable[str]) -> None:
    """Delete objects; those that do not exist are passed over."""
    store: Any = group.store

    async def delete(key: str) -> None:
        await store.delete(_full(group, key))

    _in_parallel(store, dict.fromkeys(keys, delete))


def delete_folder(group: Place, folder: str) -> None:
    """Delete all objects below a folder of a group, if there are any."""
    store: Any = group.store
    sync(store.delete_dir(_full(group, folder)))


def names(group: Place, folder: str) -> list[str]:
    """Names directly below a folder of a group, sorted; empty when there is none."""
    store: Any = group.store

    async def listed() -> list[str]:
        return [name async for name in store.list_dir(_full(group, folder))]

    return sorted(sync(listed()))


def all_keys(group: Place) -> list[str]:
    """Keys of all objects below a group, sorted."""
    store: Any = group.store
    prefix = f"{group.path}/" if group.path else ""

    async def listed() -> list[str]:
        return [key async for key in store.list_prefix(prefix)]

    return sorted(key.removeprefix(prefix) for key in sync(listed()))


def _full(group: Place, key: str) -> str:
    return f"{group.path}/{key}".strip("/")


def in_place(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, such as a memory store's: without the trip to zarr's event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise RuntimeError("a coroutine of a store in memory waited.")


def _in_parallel(store: Any, calls: Mapping[str, Any]) -> dict[str, Any]:
    """Results of one coroutine per key, so many at a time."""
    if isinstance(store, MemoryStore):
        return {key: in_place(call(key)) for key, call in calls.items()}

    async def run() -> list[Any]:
        free = asyncio.Semaphore(PARALLEL)

        async def one(key: str) -> Any:
            async with free:
                return await calls[key](key)

        return await asyncio.gather(*(one(key) for key in calls))

    return dict(zip(calls, sync(run()), strict=True))


def _whole(content: Content) -> Buffer:
    if isinstance(content, Buffer):
        return content
    joined = content if isinstance(content, bytes) else b"".join(_pieces(content))
    return default_buffer_prototype().buffer.from_bytes(joined)


def _pieces(content: Content) -> Iterator[memoryview]:
    if isinstance(content, Buffer | bytes):
        whole = memoryview(content if isinstance(content, bytes) else content.as_buffer_like())
        yield from (whole[start : start + SLICE] for start in range(0, len(whole), SLICE))
    else:
        yield from (piece.data for piece in content)


def _write_files(root: Path, contents: Mapping[str, Content], durable: bool) -> None:
    """Write files and force them to the disk, then the folders that name them: zarr renames but forces nothing."""
    unnamed: dict[str, str] = {}
    folders = {""}
    try:
        for key, content in contents.items():
            parts = key.split("/")[:-1]
            folders.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
            os.makedirs(f"{root}/{'/'.join(parts)}", exist_ok=True)
            unnamed[f"{root}/{key}"] = f"{root}/{key}.{uuid.uuid4().hex}.partial"
            _write(content, unnamed[f"{root}/{key}"])
        for file, partial in unnamed.items():
            if durable:
                force(partial)
            os.replace(partial, file)
    except BaseException:  # an interruption leaves nothing either
        for partial in unnamed.values():
            Path(partial).unlink(missing_ok=True)
        raise
    if durable:
        for folder in sorted((f"{root}/{folder}" for folder in folders), reverse=True):
            force(folder)
        force_above(root)


def _write(content: Content, path: str) -> None:
    """Write a file; the disk begins with each piece at once, while the next is made."""
    start = 0
    with open(path, "wb") as file:
        for piece in _pieces(content):
            file.write(piece)
            file.flush()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), start, len(piece), os.POSIX_FADV_DONTNEED)
            start += len(piece)


def force_all(group: Place) -> None:
    """Have all objects below a group on the disk, where that is a local one; what is there already costs nothing."""
    store: Any = group.store
    if isinstance(store, LocalStore):
        root = store.root / group.path
        for folder, _, files in os.walk(root, topdown=False):
            for file in files:
                force(f"{folder}/{file}")
            force(folder)
        force_above(root)


def force(path: str | os.PathLike[str]) -> None:
    """Have a file or a folder on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def force_above(folder: Path) -> None:
    """Have the folder that names another on the disk; one that is not for us to read is left to its owner."""
    with contextlib.suppress(PermissionError):
        force(folder.parent)
