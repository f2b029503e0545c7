"""Building an Index: a store's sketches collapsed for one estimator and written in chunks for scanning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.arrays import Float32, Samples
from retrac_scale.columns import as_ids
from retrac_scale.estimators import Estimator, common_timesteps, recommended
from retrac_scale.estimators.fitting import fit, moments, rows_at
from retrac_scale.estimators.ridge import Moments, Ridge
from retrac_scale.index import seals
from retrac_scale.index.columns import write_column, write_list
from retrac_scale.index.growth import base_of, is_readable, is_same, kept_index, mark_deleted, stored_description
from retrac_scale.index.reader import IndexReader
from retrac_scale.index.ridges import write_ridges
from retrac_scale.index.segments import KEPT, ONE_OF, Segment, sweep, write_packed
from retrac_scale.runtime.runs import run
from retrac_scale.runtime.tasks import Task
from retrac_scale.store import IncompleteStoreError, SketchStore, StoreHandle, objects
from retrac_scale.store.alone import alone
from retrac_scale.store.compatibility import agreed
from retrac_scale.store.encoding import encode
from retrac_scale.store.part import ROOT, group_json, plans_of
from retrac_scale.store.schema import (
    FORMAT_VERSION,
    LIST_CHUNK,
    Url,
    blocks,
    digest_of,
    get_array,
    get_group,
    new_array,
    whereabouts,
    zarr_location,
)

if TYPE_CHECKING:
    from distributed import Client

IndexDtype = Literal["int8", "float16", "float32"]

CHUNK_BYTES = 32 * 2**20
MIN_CHUNKS = 8
MIN_CHUNK_SAMPLES = 64
NORM_ROWS = 256
UNWRITTEN = -128
"""Fill value of int8 rows, which no row holds; those of floats are NaN: a missing chunk is never data."""
GAIN_ROWS = 1024
"""Rows that the lengths of a row's parts are measured on."""


def write_index(
    store: SketchStore,
    estimator: Estimator | None = None,
    out: Url = None,
    *,
    dtype: IndexDtype = "int8",
    client: Client | None = None,
    done: Callable[[int], object] = lambda rows: None,
) -> tuple[IndexReader, bool]:
    """See `retrac_scale.build_index`; also whether it was built, and not there already.

    `done` is told of rows that have been gone through: of each checkpoint's to fit a ridge, and again to be written.
    """
    if client is not None and out is None:
        raise ValueError("workers cannot reach an index in this process's memory; give it a path or URL.")
    StoreHandle.of(store, client)  # first: a store in memory is out of the workers' reach
    estimator = recommended(store) if estimator is None else estimator
    _check(store, estimator, dtype)
    kept = np.flatnonzero(~store.deleted)
    if not len(kept):
        raise ValueError(f"all samples of {store.url} are deleted; there is nothing to index.")
    meta = _description(store, estimator, dtype)
    location = zarr_location(out)
    if (there := kept_index(out, stored_description(location, out), meta, store)) is not None:
        return there, False
    with alone(objects.place_of(location), out):
        stored = stored_description(location, out)
        if (there := kept_index(out, stored, meta, store)) is not None:  # another process has built it meanwhile
            return there, False
        base = base_of(out, stored, meta, store, estimator)
        root, described = _begun(location, stored, meta)
        segments = list(base.segments) if base else []
        start = base.meta["covered"] if base else 0
        new = kept[np.searchsorted(kept, start) :]
        ridges = fit(store, estimator, new, client, done, _moments_left(base, store, estimator, client))
        parted = ridges and estimator.parts(store) > 1
        gains = base.meta["gains"] if base else _gains(store, estimator, ridges, kept) if parted else {}
        if len(new):
            segment = Segment(root, _name(described["segments"], meta), start, len(store.deleted))
            target = whereabouts(out) if client else root
            common = _Common(StoreHandle.of(store, client), target, segment.prefix, estimator, ridges, gains, dtype)
            _write_segment(segment, store, new, common, base, client, done)
            segments.append(segment)
        state = {
            "fit": {name: _described(own, estimator.parts(store)) for name, own in ridges.items()},
            "gains": gains,
            "ridge": write_ridges(root, ridges),
            "segments": [one.described() for one in segments],
            "deleted": mark_deleted(root, segments, store.deleted),
            "covered": len(store.deleted),
        }
        objects.force_all(root)  # first: what is called complete survives a power cut
        seals.seal(root, {**meta, **state, "complete": True}, base.meta["seals"] if base else {})
        sweep(root.store_path, state)
    return IndexReader(zarr.open_group(location, mode="r+"), out, store), True


def _begun(location: Any, stored: Any, meta: Mapping[str, Any]) -> tuple[zarr.Group, dict[str, Any]]:
    """The group to write into, and the segments that readers have open meanwhile: none where nobody can read it.

    What a process that was killed has left there is removed.
    """
    held: dict[str, Any] = {"segments": []}
    if is_readable(location, stored) and not is_same(stored, meta):
        held = {"segments": stored.get("segments", [{"name": ""}]), **{one: stored.get(one) for one in ONE_OF}}
    else:  # first: what is there is no longer complete
        begun = group_json({"what": "index", "format": FORMAT_VERSION})
        objects.write_all(objects.place_of(location), {ROOT: begun})
    root = zarr.open_group(location, mode="r+")
    sweep(root.store_path, held)
    return root, held


def _moments_left(
    base: IndexReader | None, store: SketchStore, estimator: Estimator, client: Client | None
) -> dict[str, list[Moments]]:
    """The moments of an index's samples without those that were deleted since; none without an index or a ridge."""
    if base is None or not base.ridges:
        return {}
    found = {name: [ridge.moments() for ridge in own] for name, own in base.ridges.items()}
    places = base.store_places
    for name, gone in moments(store, estimator, places[store.deleted[places]], client).items():
        found[name] = [own + -one for own, one in zip(found[name], gone, strict=True)]
    return found


def _name(held: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> str:
    """Of a segment beside others: that at the root, where there is none; the same one has the same name."""
    names = [one["name"] for one in held]
    number = 1 + max((int(name.partition("-")[0] or 0) for name in names), default=0)
    return "" if "" not in names else f"{number:04d}-{digest_of(json.dumps(meta, sort_keys=True).encode())[:8]}"


def _write_segment(
    segment: Segment,
    store: SketchStore,
    kept: npt.NDArray[np.int64],
    common: _Common,
    base: IndexReader | None,
    client: Client | None,
    done: Callable[[int], object],
) -> None:
    """Write the rows of the samples at places `kept` of the store."""
    root = segment.root.require_group(segment.prefix.rstrip("/")) if segment.name else segment.root
    size = None if base is None else base.segments[0].arrays["row"].chunks[1]

    def parts(name: str) -> Iterator[npt.NDArray[Any]]:
        return (store.column(name, kept[some]) for some in blocks(len(kept), LIST_CHUNK))

    ids = as_ids(np.concatenate([*parts("id")]))
    chunks = create_arrays(root, len(store.checkpoints), ids, common.estimator.width(store), common.dtype, size)
    root.create_group("column", overwrite=True)
    for name in store.meta["columns"].keys() - {"id"}:
        write_column(root, name, parts(name))
    if len(kept) < segment.stop - segment.start:
        write_packed(root, KEPT, np.isin(np.arange(segment.start, segment.stop), kept, assume_unique=True))
    tasks = [
        Task(f"build-index-{name}-samples-{samples.start}-{samples.stop}", (checkpoint, samples, kept[samples]))
        for checkpoint, name in enumerate(store.checkpoints)
        for samples in chunks
    ]
    for task, _ in run(_build_chunk, tasks, client, shared=common):
        done(len(task.args[-1]))


def _check(store: SketchStore, estimator: Estimator, dtype: IndexDtype) -> None:
    """Raise unless an index can be made of a store by an estimator."""
    if dtype not in ("int8", "float16", "float32"):
        raise ValueError(f"an index's dtype must be 'int8', 'float16' or 'float32', got {dtype!r}.")
    if not store.is_complete:
        raise IncompleteStoreError(
            f"{store.url} is not complete; repeat its sketch(...) or write_store(...) before building an index."
        )
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator must be one, such as ReTrac(), got {estimator!r}.")
    estimator.check_training(store)


def _description(store: SketchStore, estimator: Estimator, dtype: IndexDtype) -> dict[str, Any]:
    """What an index is a function of, but for what comes out of building."""
    place = whereabouts(store.url)
    meta: dict[str, Any] = {
        "what": "index",
        "format": FORMAT_VERSION,
        "estimator": estimator.spec(),
        "dtype": dtype,
        "checkpoints": store.weights,
        "timesteps": common_timesteps(store) if estimator.pairing == "matched" else None,
        "slots": estimator.parts(store),
        "noise": plans_of(store.fingerprint),
        "store": place if isinstance(place, str) else None,
        "revision": store.revision,
        "parts": store.part_digests,
        "measure": store.fingerprint.get("measure"),
        "fingerprint": agreed("query", store.fingerprint),
    }
    if "precondition" in store.fingerprint:
        meta["precondition"] = store.fingerprint["precondition"]
    return meta


def _described(ridges: Sequence[Ridge], slots: int) -> Any:
    """How a checkpoint's ridges were damped; a list of them where there is one for each timestep."""
    every = [ridge.describe() for ridge in ridges]
    return every if slots > 1 else every[0]


def _gains(
    store: SketchStore, estimator: Estimator, ridges: Mapping[str, Sequence[Ridge]], kept: npt.NDArray[np.int64]
) -> dict[str, list[float]]:
    """For each checkpoint and part of a row what brings the training rows' parts to about one mean length.

    Rows may be long at one timestep and short at another, and one int8 scale for a row would drown the short;
    `Index.query_rows` divides by the same. Powers of two lose no digit, and other samples seldom make them others.
    """
    some = kept[:: max(1, len(kept) // GAIN_ROWS)][:GAIN_ROWS]
    found = {}
    for name in store.checkpoints:
        make = partial(_train_rows, store, estimator, name, ridges.get(name, ()))
        rows = np.concatenate([rows for _, rows in rows_at(store, some, make)]).astype(np.float64)
        squares = np.square(rows).reshape(len(rows), estimator.parts(store), -1).sum(2).mean(0)
        lengths = np.sqrt(np.where(squares > 0, squares, 1.0))
        found[name] = np.exp2(np.round(np.log2(lengths.mean() / lengths))).tolist()
    return found


def _train_rows(
    store: SketchStore, estimator: Estimator, name: str, ridges: Sequence[Ridge], samples: Samples
) -> Float32:
    return estimator.train_rows(store, name, samples, ridges)


def chunk_samples(n_samples: int, row_bytes: int) -> int:
    """Samples per chunk of an index."""
    by_bytes = max(1, CHUNK_BYTES // row_bytes)
    return min(n_samples, by_bytes, max(MIN_CHUNK_SAMPLES, -(-n_samples // MIN_CHUNKS)))


def create_arrays(
    root: zarr.Group, checkpoints: int, ids: npt.NDArray[Any], width: int, dtype: IndexDtype, size: int | None = None
) -> list[slice]:
    """The empty arrays of a segment, their ids written; the sample ranges of their chunks, of about 32 MiB."""
    n, c = len(ids), checkpoints
    size = min(n, size) if size else chunk_samples(n, width * np.dtype(dtype).itemsize)
    dims, nan = ["checkpoint", "sample", "k"], float("nan")
    fill = UNWRITTEN if dtype == "int8" else nan
    new_array(root, "row", shape=(c, n, width), chunks=(1, size, width), dtype=dtype, dims=dims, fill_value=fill)
    for name in ("scale", "norm"):
        new_array(root, name, shape=(c, n), chunks=(1, size), dtype="float32", dims=dims[:2], fill_value=nan)
    write_list(root, "id", ids, size)
    return blocks(n, size)


def write_rows(
    root: zarr.Group, checkpoint: int, samples: slice, rows: Float32, weight: float, dtype: IndexDtype
) -> None:
    """Encode one chunk's rows `[n, k]` of a checkpoint and write them with their scales and norms."""
    stored, scale = encode(rows, dtype)
    scale = scale * np.float32(weight)
    tiles = range(0, len(stored), NORM_ROWS)
    # in float64: the squares of faint gradients are below float32's range
    length = np.concatenate([np.linalg.norm(stored[i : i + NORM_ROWS].astype(np.float64), axis=1) for i in tiles])
    get_array(root, "row")[checkpoint, samples] = stored
    get_array(root, "scale")[checkpoint, samples] = scale
    get_array(root, "norm")[checkpoint, samples] = (length * np.abs(scale) * (1 + 1e-5)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Common:
    """What all chunks are built of: an index here, or for workers where they open it."""

    source: StoreHandle
    target: zarr.Group | Url
    prefix: str
    estimator: Estimator
    ridges: Mapping[str, Sequence[Ridge]]
    gains: Mapping[str, list[float]]
    dtype: IndexDtype


def _build_chunk(common: _Common, checkpoint: int, samples: slice, kept: npt.NDArray[np.int64]) -> None:
    """Collapse one chunk: the samples of an index that stand at places `kept` of the store."""
    store, target, estimator, gains = common.source.open(), common.target, common.estimator, common.gains
    root = target if isinstance(target, zarr.Group) else zarr.open_group(zarr_location(target), mode="r+")
    root = get_group(root, common.prefix.rstrip("/")) if common.prefix else root
    name = store.checkpoints[checkpoint]
    rows = np.empty((len(kept), estimator.width(store)), np.float32)
    for some, values in rows_at(store, kept, partial(_train_rows, store, estimator, name, common.ridges.get(name, ()))):
        rows[some] = values
    if any(gain != 1 for gain in gains.get(name, ())):
        rows.reshape(len(kept), len(gains[name]), -1)[:] *= np.array(gains[name], np.float32)[:, None]
    write_rows(root, checkpoint, samples, rows, store.weights[name], common.dtype)
