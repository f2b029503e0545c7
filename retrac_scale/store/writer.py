"""Creating a SketchStore and writing its blocks: data first, the commit record last."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.arrays import Float32
from retrac_scale.columns import RESERVED, check_columns, check_ids, column_types
from retrac_scale.store import commits, objects
from retrac_scale.store.compatibility import as_told_by, kept_alike, library_versions
from retrac_scale.store.encoding import Dtype, array_dtype, check_dtype, decode, encode
from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.opening import WHAT, open_parts
from retrac_scale.store.part import ROOT, NewChunk, group_json, lay_out
from retrac_scale.store.reader import SketchStore
from retrac_scale.store.schema import (
    ATTRIBUTE,
    CONTENT,
    FORMAT_VERSION,
    Layout,
    Url,
    choose_layout,
    differences,
    zarr_location,
)

COMPARED = ("what", "shape", "dtype", "checkpoints", "fingerprint", "quantities")
"""What of a description must agree when a store is continued; layout and plan stand as they were recorded."""


def create_store(
    out: Url,
    *,
    shape: tuple[int, int, int],
    ids: npt.NDArray[Any],
    weights: Mapping[str, float],
    fingerprint: Mapping[str, Any],
    dtype: Dtype,
    quantities: Sequence[str] = ("loss", "timestep"),
    columns: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> SketchStore:
    """An empty store, or the existing one of the same description, ready for `write_block`.

    Of a store that has grown it is the part at the root that is compared and returned.

    Args:
        out: path, fsspec URL, or None for memory.
        shape: (n, t, k).
        ids: `[n]`.
        weights: w_c per checkpoint.
        fingerprint: what the sketches are a function of; compared when the store exists.
        dtype: how rows are stored.
        quantities: what is kept besides sketch, scale and norm.
        columns: `{name: [n]}`, booleans, numbers or strings.
        plan: how blocks are computed; when the store exists, its own plan stands.
        layout: how samples are cut into blocks; None chooses, and a store that exists keeps its own.

    Raises:
        ValueError: `out` holds something else; says which fields differ.
    """
    checked = check_columns(columns, shape[0])
    meta = describe(out, shape, weights, fingerprint, dtype, quantities, column_types(ids, checked), plan, layout)
    location = zarr_location(out)
    try:
        root = zarr.open_group(location, mode="r+")
    except FileNotFoundError:
        objects.write_new(objects.place_of(location), ROOT, group_json(unfinished(meta)))
        root = zarr.open_group(location, mode="r+")
    except FileExistsError:
        raise ValueError(f"{out} is a file; choose another path.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{out}/{ROOT} is damaged: {error}; run `retrac-scale verify` on it.") from error
    stored = root.attrs.get(ATTRIBUTE)
    if not isinstance(stored, dict) or stored.get("what") != WHAT:
        raise ValueError(f"{out} holds something that is no sketch store; choose another path.")
    if stored.get("creating"):
        begin(root, lay_out(meta, ids, checked))
    store = SketchStore(open_parts(root, out)[:1], out, root)
    found = mismatch(store, meta, ids, checked)
    if found:
        raise ValueError(
            f"{out} already holds a different store: {'; '.join(found)}; "
            "choose another path, or repeat the call that began it."
        )
    return store


def mismatch(
    store: SketchStore, meta: Mapping[str, Any], ids: npt.NDArray[Any], columns: Mapping[str, npt.NDArray[Any]]
) -> list[str]:
    """What of a description, ids and columns differs from those of a stored part; columns only where they are given."""
    given = {
        **meta,
        "fingerprint": as_told_by(store.meta["fingerprint"], meta["fingerprint"]),
        "quantities": kept_alike(store.meta["quantities"], meta["quantities"]),
    }
    found = differences({key: store.meta[key] for key in COMPARED}, {key: given[key] for key in COMPARED})
    if not found and not np.array_equal(store.ids, ids):
        found = ["the sample ids differ"]
    for name, values in columns.items():
        stored = store.columns.get(name)
        if stored is None or not np.array_equal(
            stored, values, equal_nan=stored.dtype.kind == values.dtype.kind == "f"
        ):
            found.append(f"column {name!r} differs")
    return found


def begin(root: zarr.Group, laid_out: Mapping[str, Any], description: str = ROOT) -> None:
    """Write the objects of an empty part, all that its description vouches for before the description."""
    objects.write_all(root, {key: value for key, value in laid_out.items() if key != description})
    objects.write_all(root, {description: laid_out[description]})


def unfinished(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a part that is being laid out."""
    return {"what": meta["what"], "format": meta["format"], "creating": True}


def describe(
    out: Url,
    shape: tuple[int, int, int],
    weights: Mapping[str, float],
    fingerprint: Mapping[str, Any],
    dtype: Dtype,
    quantities: Sequence[str],
    columns: Mapping[str, str],
    plan: Mapping[str, Any] | None,
    layout: Layout | None,
) -> dict[str, Any]:
    """The description of a part, without its digests."""
    n, t, k = shape
    check_dtype(dtype)
    for name in weights:
        if not name or {"/", "\\"} & {*name} or name.startswith(".") or name in (*RESERVED, *columns):
            raise ValueError(f"a checkpoint cannot be called {name!r} in a store; give it another name.")
        if not np.isfinite(weights[name]):
            raise ValueError(f"the weight of checkpoint {name!r} is {weights[name]}; give a finite number.")
    layout = layout or choose_layout(out, n, t * k * np.dtype(array_dtype(dtype)).itemsize)
    meta = {
        "what": WHAT,
        "format": FORMAT_VERSION,
        "shape": [n, t, k],
        "dtype": dtype,
        "block_samples": layout.block_samples,
        "chunk_samples": layout.chunk_samples,
        "checkpoints": dict(weights),
        "quantities": ["sketch", "scale", "norm", *quantities],
        "columns": dict(columns),
        "fingerprint": dict(fingerprint),
        "plan": dict(plan or {}),
        "written_by": library_versions(),
    }
    readable: dict[str, Any] = json.loads(json.dumps(meta))
    return readable


def write_block(
    store: SketchStore,
    checkpoint: str,
    block: int,
    sketches: Float32,
    norms: Float32,
    *,
    losses: Float32 | None = None,
    timesteps: npt.NDArray[np.int64] | None = None,
    contents: npt.NDArray[np.uint64] | None = None,
) -> None:
    """Write one block of a checkpoint, force it to the disk, and commit it.

    Two processes may write the same block: both write the same values, whichever comes last.

    Args:
        store: one part, from `create_store` or `open_store(url, mode="r+", part=...)`.
        checkpoint: its name.
        block: number of the block, an index into `store.blocks`.
        sketches: raw `[n, t, k]` of the block's samples.
        norms: `[n, t]`; losses and timesteps likewise.
        contents: `[n, 4]`, see `retrac_scale.sketching.content`; not kept by a store of an earlier release.

    Raises:
        ValueError: a value is NaN or infinite; names checkpoint, sample and timestep. Nothing is written then.
        OSError: the disk is full, or the like; what was committed before stands.
    """
    part = store.only_part
    samples = part.blocks[block]
    steps = timesteps if timesteps is not None else np.tile(np.arange(sketches.shape[1]), (len(sketches), 1))
    for what, plane in (("loss", losses), ("gradient norm", norms)):
        if plane is not None:
            _check_finite(plane, what, checkpoint, part.ids[samples], steps)
    given: dict[str, Any] = {
        "sketch": sketches,
        "norm": norms,
        "loss": losses,
        "timestep": timesteps,
        CONTENT: contents,
    }
    count = samples.stop - samples.start
    scale = np.empty((count, *part.shape[1:2]), np.float32)

    def stored() -> Iterator[npt.NDArray[Any]]:
        """The rows as they are stored, some at a time; fills `scale`."""
        array = part.array(f"{checkpoint}/sketch")
        size = max(1, objects.SLICE // (math.prod(array.shape[1:]) * array.dtype.itemsize))
        for start in range(0, count, size):
            some = slice(start, start + size)
            rows, scale[some] = encode(sketches[some], part.meta["dtype"])
            if part.meta["dtype"] == "float32" or not np.isfinite(scale[some]).all():
                _check_finite(sketches[some], "gradient", checkpoint, part.ids[samples][some], steps[some])
            yield rows

    # sketch is the first of the quantities, so that scale is full when its turn comes
    values: dict[str, Iterable[Any]] = {name: [array] for name, array in given.items()}
    values |= {"sketch": stored(), "scale": [scale]}
    chunks: dict[str, NewChunk] = {}
    for quantity in part.meta["quantities"]:
        array = part.array(f"{checkpoint}/{quantity}")
        expected = (count, *array.shape[1:])
        if quantity != "scale" and np.shape(given[quantity]) != expected:
            raise ValueError(
                f"block {block} of checkpoint {checkpoint!r} needs {quantity} of shape {expected}, got "
                f"{np.shape(given[quantity])}."
            )
        chunks[quantity] = NewChunk(array, block, values[quantity])
    try:
        objects.write_all(part.root, {part.chunk_key(checkpoint, name, block): new for name, new in chunks.items()})
        checksums = {name: new.checksum for name, new in chunks.items()}
        record = commits.pack(part.meta["digest"], checkpoint, block, checksums)
        objects.write_all(part.root, {commits.commit_key(checkpoint, block): record})
    except OSError as error:
        raise OSError(
            error.errno,
            f"block {block} of checkpoint {checkpoint!r} could not be written to {part.place}: "
            f"{error.strerror or error}; what was committed before stands, repeat the call once that is repaired",
        ) from error


def _check_finite(
    values: npt.NDArray[Any], what: str, checkpoint: str, ids: npt.NDArray[Any], steps: npt.NDArray[Any]
) -> None:
    flat = values.reshape(-1)
    if np.isfinite(np.dot(flat, flat)):  # one pass without a temporary; an overflow is looked into below
        return
    finite = np.isfinite(values)
    if not finite.all():
        sample, timestep = np.argwhere(~finite)[0][:2]
        raise ValueError(
            f"the {what} is NaN or infinite at checkpoint {checkpoint!r}, sample {ids[sample]}, timestep "
            f"{steps[sample, timestep]}; check that checkpoint and that image, or leave them out."
        )


def write_store(
    out: Url,
    sketches: Mapping[str, Any],
    *,
    norms: Mapping[str, Any] | None = None,
    losses: Mapping[str, Any] | None = None,
    timesteps: Mapping[str, Any] | Sequence[int] | npt.NDArray[Any] | None = None,
    ids: Sequence[Any] | npt.NDArray[Any] | None = None,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    dtype: Dtype = "int8",
    columns: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> SketchStore:
    """Make a SketchStore out of arrays, for those who bring their own gradients.

    Called again with the same arrays after it was interrupted, or a repair, it writes the blocks that are missing.

    Args:
        out: path, fsspec URL, or None for memory.
        sketches: {checkpoint: raw sketches `[n, t, k]`}, unnormalised, scaled so that inner products estimate those of
            the gradients.
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
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in sketches.items()}
    if not arrays:
        raise ValueError("write_store got no checkpoint; give sketches={'name': array [n, t, k]}.")
    shape = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        if array.ndim != 3 or array.shape != shape or 0 in shape:
            raise ValueError(
                f"sketches of checkpoint {name!r} have shape {array.shape}; all must share one non-empty [n, t, k]."
            )
    n, t, k = shape
    weight_of = dict(weights) if isinstance(weights, Mapping) else _zip_weights(arrays, weights)
    if set(weight_of) != set(arrays):
        raise ValueError(
            f"weights are given for {sorted(weight_of)}, sketches for {sorted(arrays)}; give one for each."
        )
    planes = {
        "norms": {name: _lengths(array) for name, array in arrays.items()} if norms is None else norms,
        "losses": losses,
        "timesteps": _timestep_tables(timesteps, arrays, n),
    }
    checked = {name: None if plane is None else _planes(name, plane, arrays, (n, t)) for name, plane in planes.items()}
    store = create_store(
        out,
        shape=(n, t, k),
        ids=check_ids(ids, n),
        weights={name: float(weight_of[name]) for name in arrays},
        fingerprint={"projection": {"kind": "given", "dim": k}},
        dtype=dtype,
        quantities=[q for q, plane in (("loss", losses), ("timestep", timesteps)) if plane is not None],
        columns=columns,
        layout=layout,
    )
    if store.is_complete:
        raise ValueError(f"{out} already holds a store; choose another path.")
    for name, array in arrays.items():
        for block, samples in enumerate(store.blocks):
            part = {key: None if plane is None else plane[name][samples] for key, plane in checked.items()}
            norm = part["norms"].astype(np.float32)  # type: ignore[union-attr]
            if store.committed(name)[block]:
                _check_same(store, name, samples, array[samples], norm)
                continue
            write_block(store, name, block, array[samples], norm, losses=part["losses"], timesteps=part["timesteps"])
    return store


def _check_same(store: SketchStore, name: str, samples: slice, sketches: Float32, norms: Float32) -> None:
    """Raise ValueError unless a block that is there holds these sketches and norms."""
    there = decode(*encode(sketches, store.meta["dtype"]))
    if not (np.array_equal(there, store.sketches(name, samples)) and np.array_equal(norms, store.norms(name, samples))):
        raise ValueError(
            f"{store.url} was begun with other arrays: samples {samples.start} .. {samples.stop - 1} of checkpoint "
            f"{name!r} differ; choose another path."
        )


def _zip_weights(arrays: Mapping[str, Any], weights: Sequence[float] | None) -> dict[str, float]:
    values = [1.0] * len(arrays) if weights is None else list(weights)
    if len(values) != len(arrays):
        raise ValueError(f"got {len(values)} weights for {len(arrays)} checkpoints; give one for each.")
    return dict(zip(arrays, values, strict=True))


def _timestep_tables(timesteps: Any, arrays: Mapping[str, Any], n: int) -> Mapping[str, Any] | None:
    if timesteps is None or isinstance(timesteps, Mapping):
        return timesteps
    table = np.asarray(timesteps)
    return {name: np.tile(table, (n, 1)) if table.ndim == 1 else table for name in arrays}


def _lengths(rows: Float32) -> npt.NDArray[np.float64]:
    """Of the last axis, without a copy in float64, beyond whose range no square falls."""
    lengths: npt.NDArray[np.float64] = np.sqrt(np.einsum("ntk,ntk->nt", rows, rows, dtype=np.float64))
    return lengths


def _planes(
    what: str, planes: Mapping[str, Any], arrays: Mapping[str, Any], shape: tuple[int, int]
) -> dict[str, npt.NDArray[Any]]:
    if set(planes) != set(arrays):
        raise ValueError(f"{what} are given for {sorted(planes)}, sketches for {sorted(arrays)}; give the same.")
    checked = {name: np.asarray(planes[name]) for name in arrays}
    for name, plane in checked.items():
        if plane.shape != shape:
            raise ValueError(f"{what} of checkpoint {name!r} have shape {plane.shape}; its sketches need {shape}.")
        if what == "norms" and (plane < 0).any():
            raise ValueError(f"norms of checkpoint {name!r} are negative, such as {plane[plane < 0][0]}; give lengths.")
        if what == "timesteps" and plane.dtype.kind not in "iu":
            raise ValueError(f"timesteps of checkpoint {name!r} have dtype {plane.dtype}; give integers.")
    return checked
