"""Stores made of arrays, for those who bring their own gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32
from retrac_scale.columns import check_ids
from retrac_scale.store.encoding import Dtype, decode, encode
from retrac_scale.store.reader import SketchStore
from retrac_scale.store.schema import Layout, Url
from retrac_scale.store.writer import Rows, create_store, write_block

Planes = Mapping[str, Any]
QUANTITIES = {"loss": "losses", "timestep": "timesteps"}
"""What a store keeps beside sketches and norms, and the argument that gives it."""


def write_store(
    out: Url,
    sketches: Mapping[str, Any],
    *,
    norms: Planes | None = None,
    losses: Planes | None = None,
    timesteps: Planes | Sequence[int] | npt.NDArray[Any] | None = None,
    ids: Sequence[Any] | npt.NDArray[Any] | None = None,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    dtype: Dtype = "int8",
    columns: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> SketchStore:
    """Make a SketchStore out of arrays, for those who bring their own gradients; `StoreWriter` takes them in batches.

    Called again with the same arrays after it was interrupted, or a repair, it writes the blocks that are missing. A
    block of them is in memory at a time, so that they may be dask or Zarr arrays, or memory maps.

    Args:
        out: path, fsspec URL, or None for memory.
        sketches: {checkpoint: raw sketches `[n, t, k]`}, unnormalised, scaled so that inner products estimate those of
            the gradients; NumPy's, torch's, or anything that has a shape and gives slices.
        norms: {checkpoint: L2 norms of the full gradients `[n, t]`}; None: the sketches' own norms.
        losses: {checkpoint: `[n, t]`}.
        timesteps: {checkpoint: `[n, t]`}, or one list `[t]` for all samples.
        ids: `[n]` unique integers or strings, default 0 .. n-1.
        weights: w_c per checkpoint, a mapping or in the order of `sketches`; default 1.
        dtype: "int8", "float16", "bfloat16" or "float32".
        columns: {name: `[n]`}, what is known of the samples (label, path, group, ...).
        layout: how samples are cut into blocks; None chooses.

    Returns:
        the complete store.

    Raises:
        ValueError: shapes that do not fit each other, values that are not finite, negative norms, timesteps that are no
            integers, ids given twice, `out` in use: by a complete store, or by the beginning of one of other arrays.

    >>> store = write_store(None, {"final": np.eye(3)[:, None]}, ids=["a", "b", "c"])
    >>> store.shape
    (3, 1, 3)
    >>> store.norms("final").ravel()
    array([1., 1., 1.], dtype=float32)
    """
    arrays, shape = given_arrays(sketches, "write_store")
    n, _, k = shape
    weight_of = given_weights(weights, arrays)
    planes = given_planes(arrays, shape, norms=norms, losses=losses, timesteps=timestep_tables(timesteps, arrays, n))
    store = create_store(
        out,
        shape=shape,
        ids=check_ids(ids, n),
        weights=weight_of,
        fingerprint=given_fingerprint(k),
        dtype=dtype,
        quantities=[q for q, name in QUANTITIES.items() if name in planes],
        columns=columns,
        layout=layout,
    )
    if store.is_complete:
        raise ValueError(f"{out} already holds a store; choose another path.")
    every = [(name, block) for name in arrays for block in range(len(store.blocks))]
    done = {name: store.committed(name) for name in arrays}
    for name, block in sorted(every, key=lambda one: not done[one[0]][one[1]]):  # all are compared before one is added
        samples = store.blocks[block]
        rows = rows_of(arrays, planes, name, samples)
        if done[name][block]:
            check_same(store, name, samples, rows)
        else:
            write_block(store, name, block, rows.sketches, rows.norms, losses=rows.losses, timesteps=rows.timesteps)
    return store


def check_same(store: SketchStore, name: str, samples: slice, rows: Rows) -> None:
    """Raise ValueError unless samples that are there hold these sketches, norms, losses and timesteps."""
    sketches, norms = store.sketches_and_norms(name, samples)
    compared: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {
        "sketches": (decode(*encode(rows.sketches, store.meta["dtype"])), sketches),
        "norms": (rows.norms, norms),
    }
    if rows.losses is not None:
        compared["losses"] = (rows.losses, store.losses(name, samples))
    if rows.timesteps is not None:
        compared["timesteps"] = (rows.timesteps, store.timesteps(name, samples))
    for what, (given, there) in compared.items():
        if not np.array_equal(given, there):
            raise ValueError(
                f"{store.url} was begun with other arrays: samples {samples.start} .. {samples.stop - 1} of checkpoint "
                f"{name!r} differ in their {what}; choose another path."
            )


def given_fingerprint(k: int) -> dict[str, Any]:
    """What is known of sketches that somebody brings."""
    return {"projection": {"kind": "given", "dim": k}}


def given_arrays(sketches: Mapping[str, Any], who: str) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Sketches by checkpoint, each of which gives slices, and the shape that they share."""
    arrays = {name: x if hasattr(x, "shape") else np.asarray(x, np.float32) for name, x in sketches.items()}
    if not arrays:
        raise ValueError(f"{who} got no checkpoint; give sketches={{'name': array [n, t, k]}}.")
    shape = tuple(next(iter(arrays.values())).shape)
    for name, array in arrays.items():
        if len(array.shape) != 3 or tuple(array.shape) != shape or 0 in shape:
            raise ValueError(
                f"sketches of checkpoint {name!r} have shape {tuple(array.shape)}; all must share one non-empty "
                "[n, t, k]."
            )
    return arrays, (shape[0], shape[1], shape[2])


def rows_of(arrays: Mapping[str, Any], planes: Mapping[str, Planes], name: str, samples: slice) -> Rows:
    """Some samples at a checkpoint, in memory; without norms of their own, they have the sketches'."""
    own = {what: plane[name][samples] for what, plane in planes.items()}
    with np.errstate(over="ignore"):  # what no float32 holds is infinite then, which is told with its sample
        sketches = _numpy(arrays[name][samples]).astype(np.float32, copy=False)
        norms = own["norms"].astype(np.float32) if "norms" in own else _lengths(sketches).astype(np.float32)
        losses = own["losses"].astype(np.float32) if "losses" in own else None
    return Rows(sketches, norms, losses, own.get("timesteps"))


def _numpy(values: Any) -> npt.NDArray[Any]:
    """Values in memory; of torch's those, too, that NumPy refuses: bfloat16, on a device, part of a graph."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def given_weights(weights: Mapping[str, float] | Sequence[float] | None, arrays: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each checkpoint, from a mapping or in their order; ValueError where they are others."""
    if not isinstance(weights, Mapping):
        values = [1.0] * len(arrays) if weights is None else list(weights)
        if len(values) != len(arrays):
            raise ValueError(f"got {len(values)} weights for {len(arrays)} checkpoints; give one for each.")
        weights = dict(zip(arrays, values, strict=True))
    if set(weights) != set(arrays):
        raise ValueError(f"weights are given for {sorted(weights)}, sketches for {sorted(arrays)}; give one for each.")
    return {name: float(weights[name]) for name in arrays}


def timestep_tables(timesteps: Any, arrays: Mapping[str, Any], n: int) -> Planes | None:
    """Timesteps `[n, t]` by checkpoint, from such, from one table, or from one list `[t]`."""
    if timesteps is None or isinstance(timesteps, Mapping):
        return timesteps
    table = _numpy(timesteps)
    return {name: np.tile(table, (n, 1)) if table.ndim == 1 else table for name in arrays}


def _lengths(rows: Float32) -> npt.NDArray[np.float64]:
    """Of the last axis, without a copy in float64, beyond whose range no square falls."""
    lengths: npt.NDArray[np.float64] = np.sqrt(np.einsum("ntk,ntk->nt", rows, rows, dtype=np.float64))
    return lengths


def given_planes(arrays: Mapping[str, Any], shape: tuple[int, ...], **given: Planes | None) -> dict[str, Planes]:
    """What was given of norms, losses and timesteps, checked, `{what: {checkpoint: [n, t]}}`."""
    checked: dict[str, Planes] = {}
    for what, planes in given.items():
        if planes is None:
            continue
        if set(planes) != set(arrays):
            raise ValueError(f"{what} are given for {sorted(planes)}, sketches for {sorted(arrays)}; give the same.")
        own = checked[what] = {name: _numpy(planes[name]) for name in arrays}
        for name, plane in own.items():
            if plane.shape != shape[:2]:
                raise ValueError(
                    f"{what} of checkpoint {name!r} have shape {plane.shape}; its sketches need {shape[:2]}."
                )
            if what == "norms" and (plane < 0).any():
                raise ValueError(
                    f"norms of checkpoint {name!r} are negative, such as {plane[plane < 0][0]}; give lengths."
                )
            if what == "timesteps" and plane.dtype.kind not in "iu":
                raise ValueError(f"timesteps of checkpoint {name!r} have dtype {plane.dtype}; give integers.")
    return checked
