"""Rows streamed into a store, in parts that nobody sees before they are whole."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from operator import itemgetter
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import StorePath

from retrac_scale.columns import check_columns, check_ids, column_types
from retrac_scale.store import commits, objects
from retrac_scale.store.alone import alone
from retrac_scale.store.encoding import Dtype, array_dtype
from retrac_scale.store.given import (
    QUANTITIES,
    Planes,
    check_same,
    given_arrays,
    given_fingerprint,
    given_planes,
    given_weights,
    rows_of,
    timestep_tables,
)
from retrac_scale.store.opening import PARTS, WHAT, begun_parts, open_root
from retrac_scale.store.part import ROOT, Part, check_root, group_json, lay_out
from retrac_scale.store.reader import SketchStore, open_store
from retrac_scale.store.schema import ATTRIBUTE, LIST_CHUNK, Layout, Url, choose_layout, differences, zarr_location
from retrac_scale.store.writer import Rows, check_rows, chunks_of, describe, told_of_block, unfinished

PART_ENTRIES = 2**33
"""Of the sketches of a checkpoint in a part: what a stream that is interrupted has to repeat at most."""
MANY = 2**31
"""Samples of a stream whose length nobody knows, for choosing a layout."""


class StoreWriter:
    """Streams rows into a store, a new one or one that is there, in memory of one block and the ids of a part.

    Rows are in the store once `flush` or the end of the `with` has passed, or 2^20 samples (2^33 entries of a
    checkpoint) have come; each of these makes a part of the store. Rows whose ids are in the store already are compared
    with what is there and passed over, so that a stream that was interrupted is repeated from its beginning, or from
    `samples` on; a sample that was deleted is refused. One process at a time may stream into a store.

    Args:
        out: path or fsspec URL.
        weights: w_c per checkpoint; default 1, or those of the store that is there.
        dtype: as `write_store`; None is "int8", or that of the store that is there.
        layout: how samples are cut into blocks; None chooses, or takes that of the store that is there.

    Raises:
        ValueError: something else is there, a store of `sketch`, one that is not complete, or another process streams
            into it.

    >>> import tempfile
    >>> with StoreWriter(tempfile.mkdtemp() + "/store.zarr") as writer:
    ...     for start in (0, 2):
    ...         writer.append([start, start + 1], {"final": np.eye(2)[:, None]})
    >>> writer.samples
    4
    """

    def __init__(
        self,
        out: str | Any,
        *,
        weights: Mapping[str, float] | None = None,
        dtype: Dtype | None = None,
        layout: Layout | None = None,
    ) -> None:
        if out is None:
            raise ValueError("a store in memory takes its arrays at once: use write_store(None, ...).")
        self.out, self._given, self._dtype, self._layout = out, weights, dtype, layout
        self._held = ExitStack()
        self._held.enter_context(alone(objects.place_of(zarr_location(out)), out, wait=False))
        try:
            self._store = _existing(out, weights, dtype, layout)
        except BaseException:
            self._held.close()
            raise
        self._part: _NewPart | None = None

    @property
    def samples(self) -> int:
        """How many samples the store has; those since the last flush are not among them."""
        return 0 if self._store is None else self._store.shape[0]

    def append(
        self,
        ids: Sequence[Any] | npt.NDArray[Any],
        sketches: Mapping[str, Any],
        *,
        norms: Planes | None = None,
        losses: Planes | None = None,
        timesteps: Planes | Sequence[int] | npt.NDArray[Any] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Take in some samples; arguments as for `write_store`, the same ones at every call.

        Raises:
            ValueError: they do not fit each other or those that came before, a value is NaN or infinite, a sample is in
                the store with other values, or was deleted from it, or it came already since the last flush. None of
                them is taken in then.
        """
        arrays, shape = given_arrays(sketches, "append")
        n = shape[0]
        named, own = check_ids(ids, n), check_columns(columns, n)
        planes = given_planes(
            arrays, shape, norms=norms, losses=losses, timesteps=timestep_tables(timesteps, arrays, n)
        )
        meta = self._description(named, arrays, shape, planes, own)
        rows = {name: rows_of(arrays, planes, name, slice(None)) for name in arrays}
        for name, some in rows.items():
            check_rows(some, name, named)
        new = np.ones(n, bool)
        if self._store is not None:
            _check_like(self._store, meta)
            places = self._store.places.find(named)
            new = places < 0
            _check_there(self._store, places, named, rows, own)
        if not new.any():
            return
        if self._part is None:
            self._part = _NewPart(self.out, meta, self._store is None)
        elif found := differences(self._part.meta, meta):
            raise ValueError(f"these samples are unlike those before: {'; '.join(found)}; give the same at every call.")
        kept = rows if new.all() else {name: one.each(itemgetter(new)) for name, one in rows.items()}
        self._part.append(named[new], kept, {name: values[new] for name, values in own.items()})
        _, t, k = self._part.meta["shape"]
        if self._part.samples >= min(LIST_CHUNK, PART_ENTRIES // (t * k)):
            self.flush()

    def flush(self) -> None:
        """Have all that came in the store, as a part of it, on the disk."""
        if self._part is not None:
            self._part.finish()
            self._part = None
            self._store = open_store(self.out)

    def close(self) -> None:
        """Flush, and let others stream into the store."""
        try:
            self.flush()
        finally:
            self._held.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an error, what was flushed before stands, and the rest is dropped."""
        if kind is None:
            self.close()
            return
        if self._part is not None:
            self._part.drop()
        self._held.close()

    def _description(
        self,
        ids: npt.NDArray[Any],
        arrays: Mapping[str, Any],
        shape: tuple[int, int, int],
        planes: Mapping[str, Planes],
        columns: Mapping[str, npt.NDArray[Any]],
    ) -> dict[str, Any]:
        """Of a part that holds such samples, of as many as a block has."""
        _, t, k = shape
        there = None if self._store is None else self._store.meta
        weights = self._given if self._given is not None or self._store is None else self._store.weights
        dtype: Dtype = self._dtype or (there["dtype"] if there else "int8")
        layout = self._layout
        if there is not None:
            layout = Layout(there["block_samples"], there["chunk_samples"])
        if layout is None:
            layout = choose_layout(self.out, MANY, t * k * np.dtype(array_dtype(dtype)).itemsize)
        quantities = [q for q, name in QUANTITIES.items() if name in planes]
        types, size = column_types(ids, columns), (layout.block_samples, t, k)
        weighted = given_weights(weights, arrays)
        return describe(self.out, size, weighted, given_fingerprint(k), dtype, quantities, types, None, layout)


class _NewPart:
    """A part that is being streamed: its blocks are written, and nobody sees them before its description is.

    Args:
        out: path or URL of the store.
        meta: the description, of one block.
        first: whether the store begins with it.
    """

    def __init__(self, out: Url, meta: Mapping[str, Any], first: bool) -> None:
        self.meta, self.out, self.samples = dict(meta), out, 0
        place = objects.place_of(zarr_location(out))
        self._prefix = ""
        if not first:
            number = 1 + max((int(name[:4]) for name in objects.names(place, PARTS) if name != ROOT), default=0)
            self._prefix = f"{PARTS}/{number:04d}-{uuid.uuid4().hex[:8]}/"
            objects.write_all(place, {f"{PARTS}/{ROOT}": b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}'})
        objects.write_all(place, {f"{self._prefix}{ROOT}": group_json(unfinished(self.meta))})
        self._place = place
        for name in ("id", "deleted", *self.meta["columns"], *self.meta["checkpoints"]):  # of one that was killed
            objects.delete_folder(place, f"{self._prefix}{name}")
        blank = {
            name: np.zeros(self.meta["shape"][0], "U1" if kind == "string" else kind)
            for name, kind in self.meta["columns"].items()
        }
        self._scratch = _in_memory(self.meta, blank.pop("id"), blank)
        self._ids: list[npt.NDArray[Any]] = []
        self._came: set[Any] = set()
        self._columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in blank}
        self._waiting: dict[str, list[Rows]] = {name: [] for name in self.meta["checkpoints"]}
        self._written: dict[str, list[dict[str, int]]] = {name: [] for name in self.meta["checkpoints"]}
        self._started = 0

    def append(self, ids: npt.NDArray[Any], rows: Mapping[str, Rows], columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in some samples, and write the blocks that are full."""
        samples = ids.tolist()
        if not self._came.isdisjoint(samples):
            twice = next(sample for sample in samples if sample in self._came)
            raise ValueError(f"id {twice!r} is given twice, by two calls; give every sample an id of its own.")
        self._came.update(samples)
        self._ids.append(ids)
        for name, values in columns.items():
            self._columns[name].append(values)
        for name, some in rows.items():
            self._waiting[name].append(some)
        self.samples += len(ids)
        size = self.meta["block_samples"]
        full = (self.samples - self._started) // size * size
        if full:
            joined = {name: Rows.joined(several) for name, several in self._waiting.items()}
            known = np.concatenate(self._ids)[self._started :]
            for start in range(0, full, size):
                block = itemgetter(slice(start, start + size))
                self._write(block(known), {name: some.each(block) for name, some in joined.items()})
            self._waiting = {name: [some.each(itemgetter(slice(full, None)))] for name, some in joined.items()}
        for waiting in self._waiting.values():
            waiting[-1] = waiting[-1].each(np.copy)  # whoever gave it may use its memory again

    def _write(self, ids: npt.NDArray[Any], rows: Mapping[str, Rows]) -> None:
        block = len(next(iter(self._written.values())))
        for name, some in rows.items():
            chunks = chunks_of(self._scratch, name, block, ids, some, 0)
            key = {quantity: self._prefix + self._scratch.chunk_key(name, quantity, block) for quantity in chunks}
            with told_of_block(f"samples {ids[0]} .. {ids[-1]} of checkpoint {name!r}", self.out):
                objects.write_all(self._place, {key[q]: new for q, new in chunks.items()}, durable=False)
            self._written[name].append({quantity: new.checksum for quantity, new in chunks.items()})
        self._started += len(ids)

    def finish(self) -> None:
        """Write what is left, the commit records, and last the description, with which the part is there."""
        ids = np.concatenate(self._ids)
        if self._started < self.samples:
            self._write(ids[self._started :], {name: Rows.joined(some) for name, some in self._waiting.items()})
        meta = {**self.meta, "shape": [self.samples, *self.meta["shape"][1:]]}
        columns = {name: np.concatenate(values) for name, values in self._columns.items()}
        laid_out = lay_out(meta, check_ids(ids, len(ids)), columns)
        content = laid_out.pop(ROOT)
        assert isinstance(content, bytes)
        digest = check_root(content, str(self.out))["digest"]
        records = {
            commits.commit_key(name, block): commits.pack(digest, name, block, checksums)
            for name, written in self._written.items()
            for block, checksums in enumerate(written)
        }
        with told_of_block(f"{len(ids)} samples", self.out):
            every = {f"{self._prefix}{key}": value for key, value in {**laid_out, **records}.items()}
            objects.write_all(self._place, every, durable=False)
            objects.force_all(zarr.open_group(self._place, mode="r", path=self._prefix.rstrip("/")))
            objects.write_all(self._place, {f"{self._prefix}{ROOT}": content})

    def drop(self) -> None:
        """Remove what was written."""
        if self._prefix:
            _remove(self._place, self._prefix.rstrip("/"))
        else:
            for name in self.meta["checkpoints"]:
                objects.delete_folder(self._place, name)


def _existing(
    out: Url, weights: Mapping[str, float] | None, dtype: Dtype | None, layout: Layout | None
) -> SketchStore | None:
    """The store at `out`; None where there is none, or one whose first part was being streamed when its process ended.

    Of a store that can be streamed into, parts that were being streamed then are removed; `alone` keeps others out.
    """
    try:
        root = open_root(out, WHAT, "r+")
    except FileNotFoundError:
        return None
    attribute: Any = root.attrs[ATTRIBUTE]
    if attribute.get("creating"):
        return None
    store = open_store(out)
    _check_stream(store, weights, dtype, layout)
    for name in begun_parts(root, out):
        _remove(root.store_path, f"{PARTS}/{name}")
    return store


def _remove(place: StorePath, folder: str) -> None:
    """Remove a part that nobody sees; what says that it is none goes last, since this may be interrupted too."""
    part = place / folder
    objects.delete_all(part, [key for key in objects.all_keys(part) if key != ROOT])
    objects.delete_folder(place, folder)


def _check_stream(
    store: SketchStore, weights: Mapping[str, float] | None, dtype: Dtype | None, layout: Layout | None
) -> None:
    """Raise ValueError unless rows of arrays can stand in a store, stored in such a way."""
    if store.fingerprint["projection"].get("kind") != "given":
        raise ValueError(f"{store.url} was made by sketch(...), which alone can measure further samples: grow=True.")
    if not store.is_complete:
        raise ValueError(f"{store.url} is not complete; repeat the write_store(...) that began it.")
    there = Layout(store.meta["block_samples"], store.meta["chunk_samples"])
    for what, own, given in (
        ("weights", store.weights, weights),
        ("dtype", store.meta["dtype"], dtype),
        ("layout", there, layout),
    ):
        if given is not None and given != own:
            raise ValueError(f"{store.url} has {what} {own}, not {given}; leave {what}= out, or choose another path.")


def _check_like(store: SketchStore, meta: Mapping[str, Any]) -> None:
    """Raise ValueError unless samples of a description are like those of a store."""
    compared = ("checkpoints", "fingerprint", "quantities", "columns", "dtype")
    stored, given = ({key: one[key] for key in compared} for one in (store.meta, meta))
    if found := differences({**stored, "t": store.shape[1]}, {**given, "t": meta["shape"][1]}):
        raise ValueError(f"these samples are unlike those of {store.url}: {'; '.join(found)}; choose another path.")


def _check_there(
    store: SketchStore,
    places: npt.NDArray[np.int64],
    ids: npt.NDArray[Any],
    rows: Mapping[str, Rows],
    columns: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Raise ValueError unless samples that are in a store already, at places `[n]` of it, are the same there."""
    found = np.flatnonzero(places >= 0)
    if not len(found):
        return
    there = places[found]
    gone = store.deleted[there]
    if gone.any():
        raise ValueError(
            f"sample {ids[found][gone].tolist()[0]!r} was deleted from {store.url}, and a deleted sample does not come "
            "back; leave it out, or give it another id."
        )
    for name, stored in store.columns_of(there).items():
        given = columns[name][found]
        differ = stored != given
        if stored.dtype.kind == "f":
            differ &= ~(np.isnan(stored) & np.isnan(given))
        if differ.any():
            raise ValueError(
                f"{store.url} has another value in column {name!r} of sample {ids[found][differ].tolist()[0]!r}; give "
                "the same, or choose another path."
            )
    for run in np.split(found, np.flatnonzero(np.diff(there) != 1) + 1):
        samples = slice(int(places[run[0]]), int(places[run[-1]]) + 1)
        for name, some in rows.items():
            check_same(store, name, samples, some.each(itemgetter(run)))


def _in_memory(meta: Mapping[str, Any], ids: npt.NDArray[Any], columns: Mapping[str, npt.NDArray[Any]]) -> Part:
    """A part of one block, whose arrays say how chunks are encoded."""
    memory = zarr.storage.MemoryStore()
    root = zarr.open_group(memory, mode="w")
    laid_out = lay_out(meta, ids, columns)
    objects.write_all(root, laid_out)
    content = laid_out[ROOT]
    assert isinstance(content, bytes)
    return Part(zarr.open_group(memory, mode="r"), check_root(content, "memory"), "", "memory")
