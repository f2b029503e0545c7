"""Names, dimensions and limits of the format that writer and reader share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec

from retrac_scale.columns import as_ids
from retrac_scale.store.errors import DamagedStoreError

FORMAT_VERSION = 1
ATTRIBUTE = "retrac_scale"
BLOCK_BYTES = 16 * 2**20
REMOTE_BLOCK_BYTES = 32 * 2**20
REMOTE_CHUNK_BYTES = 4 * 2**20
BLOCK_SAMPLES = 4096
MIN_BLOCKS = 8
MIN_BLOCK_SAMPLES = 64
LIST_CHUNK = 2**20
"""Entries per chunk of what is stored once per sample: ids, columns, tombstones."""

CONTENT, CONTENT_WORDS = "content", 4
"""The quantity that tells which item a row was computed from; stores of earlier releases have none."""
SKETCHED = ("loss", "timestep", CONTENT)
"""What `sketch` keeps beside sketch, scale and norm."""


Url = str | os.PathLike[str] | None
CHECKSUM = (Crc32cCodec(),)


def digest_of(content: bytes) -> str:
    """BLAKE2b, 128 bits, in hex."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def zarr_location(url: Url) -> Any:
    """What zarr opens: a path, an fsspec URL, a zarr store as it is (obstore's, for one), or fresh memory for None."""
    if url is None:
        return zarr.storage.MemoryStore()
    if isinstance(url, Store):
        return url
    place = whereabouts(url)
    if not is_remote(place):
        return zarr.storage.LocalStore(place) if "::" in place else place  # which zarr takes for a chain of URLs
    # a listing kept in memory would hide what other processes commit
    fresh = {"use_listings_cache": False}
    inner = {link.partition("://")[0]: fresh for link in place.split("::")[1:]}
    return zarr.storage.FsspecStore.from_url(place, storage_options={**fresh, **inner})


def whereabouts(url: Url) -> Any:
    """A path made absolute, `~` expanded, as workers that run in another folder see it too; anything else as it is."""
    if url is None or isinstance(url, Store):
        return url
    text = os.fspath(url)
    return text if is_remote(text) else os.path.abspath(os.path.expanduser(text.removeprefix("file://")))


def is_remote(url: Url) -> bool:
    """Whether a URL, or a chain of them as in zip::s3://a, names what cannot be mapped: an object store, an archive."""
    if url is None or isinstance(url, Store):
        return not isinstance(url, zarr.storage.LocalStore | zarr.storage.MemoryStore | None)
    text = os.fspath(url)
    chained = "::" in text and text.partition("::")[0] in fsspec.available_protocols()
    return chained or ("://" in text and not text.startswith("file://"))


def new_array(
    group: zarr.Group,
    name: str,
    *,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    dims: Sequence[str],
    **options: Any,
) -> zarr.Array[Any]:
    """An uncompressed array with a checksum on every chunk and named dimensions; replaces one of the same name.

    Every chunk is written, also one that holds only fill values, so that a missing chunk is never data.
    """
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=CHECKSUM,
        dimension_names=dims,
        overwrite=True,
        config={"write_empty_chunks": True},
        **options,
    )


def get_array(group: zarr.Group, path: str) -> zarr.Array[Any]:
    """The array at a path below a group; DamagedStoreError where there is none."""
    array = _found(group, path)
    if not isinstance(array, zarr.Array):
        raise DamagedStoreError(f"{path} in {group.store_path} is no array; the store is damaged.")
    return array


def get_group(group: zarr.Group, path: str) -> zarr.Group:
    """The group at a path below a group; DamagedStoreError where there is none."""
    found = _found(group, path)
    if not isinstance(found, zarr.Group):
        raise DamagedStoreError(f"{path} in {group.store_path} is no group; the store is damaged.")
    return found


def _found(group: zarr.Group, path: str) -> Any:
    try:
        return group[path]
    except (KeyError, FileNotFoundError):
        raise DamagedStoreError(f"{group.store_path}/{path} is missing.") from None
    except (ValueError, TypeError, AttributeError) as error:  # what zarr raises for metadata that it cannot read
        raise DamagedStoreError(f"{group.store_path}/{path} is damaged: {error}.") from None


def read(group: zarr.Group, path: str, selection: Any = slice(None)) -> npt.NDArray[Any]:
    """A part of an array as NumPy."""
    return np.asarray(get_array(group, path)[selection])


def read_ids(group: zarr.Group) -> npt.NDArray[Any]:
    """The sample ids `[n]` of a store or an index, int64 or str."""
    return as_ids(read(group, "id"))


@dataclass(frozen=True)
class Layout:
    """How the samples of a store are cut.

    Attributes:
        block_samples: samples per block: one chunk, the unit of writing, checking and resuming.
        chunk_samples: when given, a block is a shard of smaller chunks of so many samples, which zarr can read one by
            one from an object store; it must divide `block_samples`. None leaves blocks unsharded and mappable.
    """

    block_samples: int
    chunk_samples: int | None = None

    def __post_init__(self) -> None:
        if self.block_samples < 1:
            raise ValueError(f"block_samples must be 1 or more, got {self.block_samples}.")
        if self.chunk_samples is not None and (self.chunk_samples < 1 or self.block_samples % self.chunk_samples):
            raise ValueError(
                f"chunk_samples must divide block_samples, got {self.chunk_samples} and {self.block_samples}."
            )


def choose_layout(url: Url, n_samples: int, row_bytes: int) -> Layout:
    """Blocks of up to 16 MiB, mappable, on a disk; of up to 32 MiB in chunks of 4 MiB in an object store.

    Blocks are smaller where that leaves a small store at least 8 of them, and hold at most 4096 samples.
    """
    remote = is_remote(url)
    by_bytes = max(1, min(BLOCK_SAMPLES, (REMOTE_BLOCK_BYTES if remote else BLOCK_BYTES) // max(1, row_bytes)))
    size = min(by_bytes, max(MIN_BLOCK_SAMPLES, -(-n_samples // MIN_BLOCKS)))
    if not remote or size * row_bytes <= REMOTE_CHUNK_BYTES:
        return Layout(size)
    chunk = max(1, REMOTE_CHUNK_BYTES // row_bytes)
    return Layout(max(1, size // chunk) * chunk, chunk)


def blocks(n_samples: int, size: int) -> list[slice]:
    """The sample ranges of all blocks."""
    return [slice(start, min(start + size, n_samples)) for start in range(0, n_samples, size)]


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
