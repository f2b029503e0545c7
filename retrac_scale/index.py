"""Build and open an Index: a store seen by one estimator, collapsed over timesteps, laid out for scanning."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import dask
import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.estimators import (
    Estimator,
    common_timesteps,
    estimator_from_spec,
)
from retrac_scale.store import Dtype, IncompleteStoreError, SketchStore, open_store
from retrac_scale.store.compatibility import COMPARED, check_compatible
from retrac_scale.store.encoding import Float32, check_dtype, encode
from retrac_scale.store.reader import open_root
from retrac_scale.store.schema import (
    ATTRIBUTE,
    FORMAT_VERSION,
    Url,
    blocks,
    differences,
    get_array,
    new_array,
    read,
    read_ids,
    zarr_location,
)

if TYPE_CHECKING:
    from distributed import Client

    from retrac_scale.query import TopK

Side = Literal["proponents", "opponents"]


class Index:
    """Rows `[c, n, k]` of one estimator, their scales `[c, n]` with the checkpoint weights in them, and the ids.

    Get one from `build_index` or `open_index`.
    """

    def __init__(self, root: zarr.Group, url: Url) -> None:
        self.root = root
        self.url = url
        self.meta: dict[str, Any] = dict(root.attrs[ATTRIBUTE])  # type: ignore[arg-type]

    @property
    def estimator(self) -> Estimator:
        """The estimator it was built with."""
        return estimator_from_spec(self.meta["estimator"])

    @property
    def checkpoints(self) -> list[str]:
        """Checkpoint names, in the order of the rows."""
        return list(self.meta["checkpoints"])

    @property
    def ids(self) -> npt.NDArray[Any]:
        """Sample ids `[n]`."""
        return read_ids(self.root)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, n, k)."""
        c, n, k = get_array(self.root, "row").shape
        return c, n, k

    @property
    def chunks(self) -> list[slice]:
        """Sample ranges of the chunks, the units of scanning."""
        return blocks(self.shape[1], get_array(self.root, "row").chunks[1])

    def chunk(self, samples: slice) -> tuple[npt.NDArray[Any], Float32]:
        """Stored rows `[c, n, k]` and scales `[c, n]` of some samples; row x scale is the weighted estimator row."""
        part = (slice(None), samples)
        return read(self.root, "row", part), read(self.root, "scale", part)

    def query_rows(self, queries: SketchStore) -> Float32:
        """The estimator's rows of the queries, float32 `[c, q, k]`, without checkpoint weights.

        Raises:
            ValueError: the queries were sketched otherwise than the training side; says which field differs.
        """
        check_compatible(self.meta["fingerprint"], self.checkpoints, queries.fingerprint, queries.checkpoints)
        estimator = self.estimator
        if estimator.pairing == "matched" and common_timesteps(queries) != self.meta["timesteps"]:
            raise ValueError(
                "matched pairing needs the index's timesteps in the queries; sketch them with the same plan."
            )
        if estimator.width(queries) != self.shape[2]:
            raise ValueError(
                f"the queries have rows of {estimator.width(queries)} entries, the index of {self.shape[2]}."
            )
        return np.stack([estimator.rows(queries, name) for name in self.checkpoints])

    def query(
        self,
        queries: SketchStore,
        k: int = 10,
        *,
        side: Side = "proponents",
        where: npt.ArrayLike | None = None,
        client: Client | None = None,
    ) -> TopK:
        """The k training samples with the largest (proponents) or smallest (opponents) score for each query.

        Args:
            queries: a small SketchStore, made with `sketch(..., like=store)`.
            k: how many; fewer come back when fewer samples qualify.
            side: "proponents" or "opponents".
            where: a boolean mask `[n]` or a list of sample ids; None for all.
            client: a `distributed.Client`; None scans on threads here.

        Returns:
            TopK, best first; equal scores are ordered by id.
        """
        from retrac_scale.query import run_query  # at call time: the street runs from index to query

        return run_query(self, queries, k, side=side, where=where, client=client)

    def __repr__(self) -> str:
        c, n, k = self.shape
        return f"Index({self.url!r}: {self.estimator}, {c} checkpoints, {n} samples, k = {k})"


def build_index(
    store: SketchStore, estimator: Estimator, out: Url, *, dtype: Dtype = "int8", client: Client | None = None
) -> Index:
    """Collapse a complete store for one estimator; an index of the same store and estimator at `out` is kept.

    Args:
        store: the training side.
        estimator: `TracIn()`, `ReTrac()`, ...
        out: path, fsspec URL, or None for memory.
        dtype: how rows are stored, "int8", "float16" or "float32".
        client: a `distributed.Client`; store and `out` must then be reachable from its workers.

    Raises:
        IncompleteStoreError: blocks are missing.
        ValueError: `out` holds something else, or the store lacks what the estimator needs.
    """
    check_dtype(dtype)
    if not store.is_complete:
        raise IncompleteStoreError(f"{store.url} is not complete; run its sketch(...) again before building an index.")
    if client is not None and (out is None or store.url is None):
        raise ValueError("workers cannot reach this process's memory; give store and index a path or URL.")
    n, _, _ = store.shape
    meta: dict[str, Any] = {
        "what": "index",
        "format": FORMAT_VERSION,
        "estimator": estimator.spec(),
        "dtype": dtype,
        "checkpoints": store.weights,
        "timesteps": common_timesteps(store) if estimator.pairing == "matched" else None,
        "store": None if store.url is None else os.fspath(store.url),
        "fingerprint": {key: store.fingerprint.get(key) for key in COMPARED},
    }
    location = zarr_location(out)
    try:
        stored = zarr.open_group(location, mode="r").attrs.get(ATTRIBUTE)
    except FileNotFoundError:
        stored = None
    else:
        if not isinstance(stored, dict) or stored.get("what") != "index":
            raise ValueError(f"{out} holds something that is no index; choose another path.")
        if stored.get("complete"):
            found = differences({k: v for k, v in stored.items() if k != "complete"}, meta)
            if found:
                raise ValueError(f"{out} already holds a different index: {'; '.join(found)}; choose another path.")
            return open_index(out)
    root = zarr.open_group(location, mode="a")
    root.attrs[ATTRIBUTE] = {"what": "index", "format": FORMAT_VERSION}
    size, width = store.meta["block_samples"], estimator.width(store)
    c, dims = len(store.checkpoints), ["checkpoint", "sample", "k"]
    new_array(root, "row", shape=(c, n, width), chunks=(1, size, width), dtype=dtype, dims=dims)
    new_array(root, "scale", shape=(c, n), chunks=(1, size), dtype="float32", dims=dims[:2])
    new_array(root, "id", shape=(n,), chunks=(n,), dtype=store.ids.dtype, dims=["sample"])[:] = store.ids
    source: SketchStore | Url = store if client is None else store.url
    target: zarr.Group | Url = root if client is None else out
    tasks = [
        dask.delayed(_build_block)(source, target, estimator, checkpoint, block, dtype)
        for checkpoint in range(len(store.checkpoints))
        for block in range(len(store.blocks))
    ]
    compute(tasks, client)
    root.attrs[ATTRIBUTE] = {**meta, "complete": True}
    return Index(root, out)


def compute(tasks: list[Any], client: Client | None) -> list[Any]:
    """Results of delayed tasks, on the client's workers or on threads here."""
    if client is None:
        return list(dask.compute(*tasks, scheduler="threads"))
    return list(client.gather(client.compute(tasks)))


def _build_block(
    source: SketchStore | Url, target: zarr.Group | Url, estimator: Estimator, checkpoint: int, block: int, dtype: Dtype
) -> None:
    store = source if isinstance(source, SketchStore) else open_store(source)
    root = target if isinstance(target, zarr.Group) else zarr.open_group(zarr_location(target), mode="r+")
    name = store.checkpoints[checkpoint]
    samples = store.blocks[block]
    rows, scale = encode(estimator.rows(store, name, samples), dtype)
    get_array(root, "row")[checkpoint, samples] = rows
    get_array(root, "scale")[checkpoint, samples] = scale * np.float32(store.weights[name])


def open_index(url: Url) -> Index:
    """Open an existing Index.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no index, one of a newer format, or one whose building was interrupted.
    """
    root = open_root(url, "index")
    if not root.attrs[ATTRIBUTE].get("complete"):  # type: ignore[union-attr]
        raise ValueError(f"the index at {url} was not finished; run its build_index(...) again.")
    return Index(root, url)
