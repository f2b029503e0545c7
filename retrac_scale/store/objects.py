"""The objects (files) below a zarr group: read, write, list, delete, make durable."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, StorePath

PARALLEL = 16

T = TypeVar("T")

Place = zarr.Group | StorePath
"""What objects are below: a group, or a place where a group should be."""


def read_all(group: Place, keys: Iterable[str]) -> dict[str, bytes | None]:
    """Contents of objects below a group, None for those that do not exist."""
    store: Any = group.store

    async def get(key: str) -> bytes | None:
        value = await store.get(_full(group, key), default_buffer_prototype())
        return None if value is None else value.to_bytes()

    return _in_parallel(store, dict.fromkeys(keys, get))


def read(group: Place, key: str) -> bytes | None:
    """The content of one object, None when it does not exist."""
    return read_all(group, [key])[key]


def write_all(group: Place, objects: Mapping[str, Buffer | bytes]) -> None:
    """Write objects, each of them atomically; on a local disk they are durable when this returns."""
    store: Any = group.store
    if store.read_only:
        raise OSError(errno.EACCES, f"{store} was opened for reading; open it with mode='r+' to write")
    wrap = default_buffer_prototype().buffer.from_bytes

    async def put(key: str) -> None:
        value = objects[key]
        await store.set(_full(group, key), wrap(value) if isinstance(value, bytes) else value)

    _in_parallel(store, dict.fromkeys(objects, put))
    if isinstance(store, LocalStore):
        _fsync(store.root, [store.root / _full(group, key) for key in objects])


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


def _fsync(root: Path, files: list[Path]) -> None:
    """Force files to the disk, then the folders that name them: zarr renames into place but forces nothing."""
    folders = {folder for file in files for folder in file.parents if folder == root or root in folder.parents}
    for path in [*files, *sorted(folders, reverse=True), root.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
