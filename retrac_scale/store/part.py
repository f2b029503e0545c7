"""One rectangle of a store: samples x checkpoints at one timestep plan, laid out once, filled block by block."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from retrac_scale.columns import as_ids
from retrac_scale.store import commits, objects, tombstones
from retrac_scale.store.encoding import array_dtype
from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.mapping import CRC_BYTES, Bytes, crc32c, is_plain, map_chunk
from retrac_scale.store.schema import ATTRIBUTE, CONTENT, CONTENT_WORDS, LIST_CHUNK, blocks, digest_of, new_array
from retrac_scale.store.tombstones import DELETED, KEPT, UNKNOWN

ROOT = "zarr.json"
NO_DIGEST = "0" * 32


def lay_out(
    meta: Mapping[str, Any],
    ids: npt.NDArray[Any],
    columns: Mapping[str, npt.NDArray[Any]],
    deleted: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Buffer | bytes]:
    """All objects of an empty part, its description in `zarr.json` the last: a pure function of the arguments.

    Args:
        meta: the description, without digests.
        ids: `[n]`.
        columns: `{name: [n]}`.
        deleted: tombstones `[n]` to begin with.
    """
    memory = MemoryStore()
    root = zarr.open_group(memory, mode="w")
    n, t, k = meta["shape"]
    size, rows = meta["block_samples"], meta["chunk_samples"]
    for name, values in {"id": ids, **columns}.items():
        _new_list(root, name, n, meta["columns"][name], 0)[:] = values
    _new_list(root, "deleted", n, "uint8", UNKNOWN)[:] = KEPT if deleted is None else np.where(deleted, DELETED, KEPT)
    for checkpoint in meta["checkpoints"]:
        group = root.create_group(checkpoint)
        for quantity in meta["quantities"]:
            dims, extent = _axes(quantity, t, k)
            whole = (size, *extent)
            sharded = quantity == "sketch" and rows is not None
            new_array(
                group,
                quantity,
                shape=(n, *extent),
                chunks=(rows, *extent) if sharded else whole,
                dtype=_dtype(quantity, meta["dtype"]),
                dims=["sample", *dims],
                shards=whole if sharded else None,
                attributes={"bits": "bfloat16"} if quantity == "sketch" and meta["dtype"] == "bfloat16" else None,
            )
        entries = [commits.SEAL, *meta["quantities"]]
        new_array(
            group,
            "commit",
            shape=(len(blocks(n, size)), len(entries)),
            chunks=(1, len(entries)),
            dtype="uint32",
            dims=["block", "entry"],
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes={"entries": entries},
        )
    laid_out: dict[str, Buffer | bytes] = {key: _in_memory(memory, key) for key in objects.all_keys(root)}
    del laid_out[ROOT]
    fixed = {key: digest_of(_bytes(value)) for key, value in laid_out.items() if not key.startswith("deleted/c")}
    return {**laid_out, ROOT: sealed({**meta, "digests": fixed, "digest": NO_DIGEST})}


def group_json(attribute: Mapping[str, Any]) -> bytes:
    """The metadata of a zarr group that carries a description."""
    document = {"attributes": {ATTRIBUTE: attribute}, "zarr_format": 3, "node_type": "group"}
    return json.dumps(document, indent=2).encode()


def check_root(content: bytes, place: str) -> dict[str, Any]:
    """The description in a part's `zarr.json`.

    Raises:
        DamagedStoreError: the file is not, byte for byte, what was written.
    """
    try:
        meta: dict[str, Any] = json.loads(content)["attributes"][ATTRIBUTE]
        digest = str(meta["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{place}/{ROOT} is damaged: {error!r}.") from None
    if digest_of(content.replace(_entry(digest), _entry(NO_DIGEST))) != digest:
        raise DamagedStoreError(f"{place}/{ROOT} is damaged: it does not have the digest that it names.")
    return meta


class Part:
    """An open part; everything that it returns has been compared with what was committed.

    Args:
        root: its zarr group.
        meta: its description, from `check_root`.
        name: "" for the part at the root of the store, else its name below `parts`.
        place: path or URL, for messages.
    """

    def __init__(self, root: zarr.Group, meta: Mapping[str, Any], name: str, place: str) -> None:
        self.root = root
        self.meta = dict(meta)
        self.name = name
        self.place = place
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(n, t, k)."""
        n, t, k = self.meta["shape"]
        return n, t, k

    @cached_property
    def blocks(self) -> list[slice]:
        """Sample ranges of the blocks within this part."""
        return blocks(self.shape[0], self.meta["block_samples"])

    @cached_property
    def same_samples(self) -> str:
        """Equal for parts over the same samples."""
        chunks = {key: value for key, value in self.meta["digests"].items() if key.startswith("id/")}
        return digest_of(json.dumps(chunks, sort_keys=True).encode())

    @cached_property
    def same_pairs(self) -> str:
        """Equal for parts that measure the same function at the same timestep plan."""
        told = self.meta["fingerprint"]
        return json.dumps([told.get("measure"), plans_of(told)], sort_keys=True)

    @cached_property
    def ids(self) -> npt.NDArray[Any]:
        """Sample ids `[n]`, int64 or str."""
        return as_ids(self._fixed_list("id"))

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """User columns `{name: [n]}`."""
        return {name: self._fixed_list(name) for name in self.meta["columns"] if name != "id"}

    def column(self, name: str, samples: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """One of them, or the ids, of some samples `[m]`, from their chunks alone."""
        return self._fixed_list(name, samples)

    @property
    def deleted(self) -> npt.NDArray[np.bool_]:
        """Tombstones, bool `[n]`, as they are now."""
        before: tombstones.Allowed | None = None
        while True:  # a deletion may come between the two readings
            now = tombstones.allowed(self.root, self.place)
            marks = self._zarr_read("deleted", slice(None))
            if ((marks != KEPT) & (marks != DELETED)).any():
                raise DamagedStoreError(f"{self.place}/deleted is missing or damaged; restore it from a backup.")
            stale = tombstones.stale(marks, now)
            if not stale:
                return np.asarray(marks == DELETED)
            if now == before:
                raise DamagedStoreError(
                    f"{self.place}/deleted/c/{stale[0]} is not what the last deletion wrote: restore it and "
                    f"{tombstones.KEY} from the same backup, or remove the latter to take the marks as they are."
                )
            before = now

    def delete(self, samples: npt.NDArray[np.bool_]) -> None:
        """Set the tombstones of some samples, bool `[n]`."""
        array = self.array("deleted")
        was = np.where(self.deleted, DELETED, KEPT).astype(np.uint8)
        now = np.where(samples, DELETED, was).astype(np.uint8)
        size = array.chunks[0]
        touched = np.unique(np.flatnonzero(samples) // size).tolist()
        chunks = {f"deleted/c/{i}": NewChunk(array, i, [now[i * size : (i + 1) * size]]) for i in touched}
        old, new = tombstones.by_chunk(was), tombstones.by_chunk(now)
        told = tombstones.allowed(self.root, self.place)
        tombstones.allow(self.root, told | {str(i): [new[str(i)], old[str(i)]] for i in touched})
        objects.write_all(self.root, chunks)
        tombstones.allow(self.root, told | {str(i): [new[str(i)]] for i in touched})

    def committed(self, checkpoint: str) -> npt.NDArray[np.bool_]:
        """Which blocks of a checkpoint have a commit record now, bool `[blocks]`."""
        done = np.zeros(len(self.blocks), dtype=np.bool_)
        for name in objects.names(self.root, f"{checkpoint}/commit"):
            if match := re.fullmatch(r"c\.(\d+)\.0", name):
                done[int(match[1])] = True
        return done

    def record(self, checkpoint: str, block: int) -> dict[str, int] | None:
        """The checksums that were committed for a block, by quantity; None when it is not written.

        Raises:
            DamagedStoreError: there is a commit record, but not the right one.
        """
        chunk = objects.read(self.root, commits.commit_key(checkpoint, block))
        if chunk is None:
            return None
        return commits.unpack(chunk, self.meta["digest"], checkpoint, block, self.meta["quantities"])

    def set_aside(self, checkpoint: str, block: int) -> None:
        """Take the commit of a block back: it is to be computed again, and until then has not been written."""
        chunk = objects.read(self.root, commits.commit_key(checkpoint, block))
        if chunk is not None:
            objects.write_all(self.root, {commits.aside_key(checkpoint, block): chunk})
            objects.delete_all(self.root, [commits.commit_key(checkpoint, block)])

    def aside(self, checkpoint: str, block: int) -> dict[str, npt.NDArray[Any]] | None:
        """The values of a block that was set aside, by quantity; None where they are no longer all there."""
        chunk = objects.read(self.root, commits.aside_key(checkpoint, block))
        if chunk is None:
            return None
        try:
            record = commits.unpack(chunk, self.meta["digest"], checkpoint, block, self.meta["quantities"])
            return {name: self.read(checkpoint, name, block, record) for name in record}
        except DamagedStoreError:  # some of its chunks are those of another try already
            return None

    def forget_aside(self, checkpoint: str, block: int) -> None:
        """Remove what is kept of a block that was set aside, once it is computed."""
        objects.delete_all(self.root, [commits.aside_key(checkpoint, block)])

    def read(self, checkpoint: str, quantity: str, block: int, record: Mapping[str, int]) -> npt.NDArray[Any]:
        """The stored values of one quantity of a block, `[n, t]`, `[n, t, k]` or `[n, word]`; a map where possible.

        Args:
            checkpoint: its name.
            quantity: "sketch", "scale", "norm", "loss", "timestep" or "content".
            block: number of the block.
            record: its commit record, which the values must agree with.
        """
        array = self.array(f"{checkpoint}/{quantity}")
        mapped = map_chunk(array, (block, *[0] * (array.ndim - 1)), record[quantity])
        return self.read_through(checkpoint, quantity, block, record) if mapped is None else mapped

    def read_through(self, checkpoint: str, quantity: str, block: int, record: Mapping[str, int]) -> npt.NDArray[Any]:
        """As `read`, through zarr, with every checksum verified anew."""
        path = f"{checkpoint}/{quantity}"
        values = self._zarr_read(path, self.blocks[block])
        if self.checksum(values) != record[quantity]:
            raise DamagedStoreError(
                f"{self.place}/{path}, block {block}, is missing or not what was committed; "
                "run `retrac-scale verify` on the store."
            )
        return values

    def chunk_key(self, checkpoint: str, quantity: str, block: int) -> str:
        """The object that holds a quantity of a block."""
        tail = "/0/0" if quantity == "sketch" else "/0"
        return f"{checkpoint}/{quantity}/c/{block}{tail}"

    def checksum(self, values: npt.NDArray[Any]) -> int:
        """CRC-32C of a block's values, padded with zeros to a whole block, as in an unsharded chunk file."""
        row_bytes = values[:1].nbytes
        return crc32c(values, zeros=(self.meta["block_samples"] - len(values)) * row_bytes)

    def array(self, path: str) -> zarr.Array[Any]:
        """An array of this part, its metadata compared with the digest in the description."""
        if path not in self._arrays:
            document = json.loads(self._fixed(f"{path}/{ROOT}"))
            self._arrays[path] = zarr.Array.from_dict(self.root.store_path / path, document)
        return self._arrays[path]

    def _fixed(self, key: str) -> bytes:
        """An object that never changes, compared with its digest."""
        content = objects.read(self.root, key)
        if content is None or digest_of(content) != self.meta["digests"].get(key):
            raise DamagedStoreError(
                f"{self.place}/{key} is {'missing' if content is None else 'damaged'}; "
                "run `retrac-scale verify` on the store."
            )
        return content

    def _fixed_list(self, name: str, samples: npt.NDArray[np.int64] | None = None) -> npt.NDArray[Any]:
        wrap = default_buffer_prototype().buffer.from_bytes
        keys = [key for key in self.meta["digests"] if key.startswith(f"{name}/")]
        if samples is not None:
            keys = [f"{name}/{ROOT}", *(f"{name}/c/{i}" for i in np.unique(samples // LIST_CHUNK))]
        array = zarr.open_array(MemoryStore({key: wrap(self._fixed(key)) for key in keys}), path=name, mode="r")
        values = np.asarray(array[:] if samples is None else array.oindex[samples])
        return values.astype(object) if values.dtype.kind == "T" else values

    def _zarr_read(self, path: str, selection: slice) -> npt.NDArray[Any]:
        array = self.array(path)
        try:
            return np.asarray(array[selection])
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise DamagedStoreError(
                f"{self.place}/{path} cannot be read: {error}; run `retrac-scale verify` on the store."
            ) from error


def measures_in(told: Mapping[str, Any]) -> list[Any]:
    """The measures that a fingerprint or an index's description names, several where they stand side by side."""
    measure = told.get("measure")
    return measure if isinstance(measure, list) else [measure]


def plans_of(fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The timestep plans in a fingerprint, several where a store grew by timesteps, without digests over samples."""
    given = fingerprint.get("timesteps") or []
    plans = [given] if isinstance(given, Mapping) else given
    return [{key: value for key, value in plan.items() if key != "digest"} for plan in plans]


class NewChunk:
    """One chunk (or shard) of an array as zarr encodes it, made while it is written.

    Args:
        array: an array of a part.
        place: the chunk's place along the samples.
        values: those of its samples, `[m, ...]` for some of them at a time; zeros fill up the chunk.

    Attributes:
        checksum: the CRC-32C of the whole chunk's values, once it has been written.
    """

    checksum: int

    def __init__(self, array: zarr.Array[Any], place: int, values: Iterable[npt.NDArray[Any]]) -> None:
        self._array, self._place, self._values = array, place, values

    def __iter__(self) -> Iterator[Bytes]:
        """The chunk's bytes, piece by piece."""
        return self._plain() if is_plain(self._array) and self._array.shards is None else self._encoded()

    def _plain(self) -> Iterator[Bytes]:
        array, crc, left = self._array, 0, math.prod(self._array.chunks) * self._array.dtype.itemsize
        for values in self._values:
            piece = np.ascontiguousarray(values, array.dtype).reshape(-1).view(np.uint8)
            crc, left = google_crc32c.extend(crc, piece), left - len(piece)
            yield piece
        zeros = np.zeros(left, np.uint8)
        self.checksum = google_crc32c.extend(crc, zeros)
        yield zeros
        yield np.frombuffer(self.checksum.to_bytes(CRC_BYTES, "little"), np.uint8)

    def _encoded(self) -> Iterator[Bytes]:
        array, memory = self._array, MemoryStore()
        values = np.concatenate([*self._values]).astype(array.dtype, copy=False)
        whole = array.shards or array.chunks
        self.checksum = crc32c(values, zeros=(whole[0] - len(values)) * values[:1].nbytes)
        twin = zarr.Array.from_dict(zarr.storage.StorePath(memory), array.metadata.to_dict())
        start = self._place * whole[0]
        twin.with_config({"write_empty_chunks": True})[start : start + len(values)] = values
        key = array.metadata.encode_chunk_key((self._place, *[0] * (array.ndim - 1)))
        yield _in_memory(memory, key).as_numpy_array().view(np.uint8)


def _new_list(root: zarr.Group, name: str, n: int, dtype: Any, fill: int) -> zarr.Array[Any]:
    options: dict[str, Any] = {} if dtype == "string" else {"fill_value": fill}
    return new_array(root, name, shape=(n,), chunks=(min(n, LIST_CHUNK),), dtype=dtype, dims=["sample"], **options)


def _dtype(quantity: str, dtype: Any) -> str:
    return {"sketch": array_dtype(dtype), "timestep": "int64", CONTENT: "uint64"}.get(quantity, "float32")


def _axes(quantity: str, t: int, k: int) -> tuple[list[str], tuple[int, ...]]:
    """Names and lengths of a quantity's dimensions beside that of the samples."""
    if quantity == CONTENT:
        return ["word"], (CONTENT_WORDS,)
    return (["timestep", "k"], (t, k)) if quantity == "sketch" else (["timestep"], (t,))


def sealed(meta: Mapping[str, Any]) -> bytes:
    """`group_json` of a description whose digest is `NO_DIGEST`, with its own in place of that."""
    content = group_json(meta)
    return content.replace(_entry(NO_DIGEST), _entry(digest_of(content)))


def _entry(digest: str) -> bytes:
    return f'"digest": "{digest}"'.encode()


def _in_memory(memory: MemoryStore, key: str) -> Buffer:
    value = sync(memory.get(key, default_buffer_prototype()))
    assert value is not None
    return value


def _bytes(value: Buffer | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.to_bytes()
