"""Creating a SketchStore and writing its blocks: data first, the commit record last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.store.encoding import Dtype, Float32, check_dtype, encode
from retrac_scale.store.reader import SketchStore
from retrac_scale.store.schema import (
    ATTRIBUTE,
    FORMAT_VERSION,
    Url,
    block_samples,
    blocks,
    check_ids,
    differences,
    get_array,
    new_array,
    zarr_location,
)


def create_store(
    out: Url,
    *,
    shape: tuple[int, int, int],
    ids: npt.NDArray[Any],
    weights: Mapping[str, float],
    fingerprint: Mapping[str, Any],
    dtype: Dtype,
    quantities: Sequence[str] = ("loss", "timestep"),
) -> SketchStore:
    """An empty store, or the existing one of the same description, ready for `write_block`.

    Raises:
        ValueError: `out` holds something else; says which fields differ.
    """
    n, t, k = shape
    check_dtype(dtype)
    meta: dict[str, Any] = {
        "what": "sketch store",
        "format": FORMAT_VERSION,
        "shape": list(shape),
        "dtype": dtype,
        "block_samples": block_samples(n, t * k * np.dtype(dtype).itemsize),
        "checkpoints": dict(weights),
        "fingerprint": dict(fingerprint),
    }
    location = zarr_location(out)
    try:
        root = zarr.open_group(location, mode="r+")
    except FileNotFoundError:
        root = zarr.open_group(location, mode="w-")
        root.attrs[ATTRIBUTE] = {"creating": True}
    stored = root.attrs.get(ATTRIBUTE)
    if not isinstance(stored, dict):
        raise ValueError(f"{out} holds something that is no sketch store; choose another path.")
    if not stored.get("creating"):
        store = SketchStore(root, out)
        found = differences(store.meta, meta)
        if not found and not np.array_equal(store.ids, ids):
            found = ["the sample ids differ"]
        if found:
            raise ValueError(
                f"{out} already holds a different store: {'; '.join(found)}; "
                "choose another path, or repeat the call that began it."
            )
        return store
    _create_arrays(root, meta, ids, quantities)
    root.attrs[ATTRIBUTE] = meta  # last: a store that lacks it was never begun
    return SketchStore(root, out)


def _create_arrays(root: zarr.Group, meta: Mapping[str, Any], ids: npt.NDArray[Any], quantities: Sequence[str]) -> None:
    n, t, k = meta["shape"]
    size = meta["block_samples"]
    new_array(root, "id", shape=(n,), chunks=(n,), dtype=ids.dtype, dims=["sample"])[:] = ids
    for checkpoint in meta["checkpoints"]:
        group = root.create_group(checkpoint, overwrite=True)
        plane, cube = ["sample", "timestep"], ["sample", "timestep", "k"]
        new_array(group, "sketch", shape=(n, t, k), chunks=(size, t, k), dtype=meta["dtype"], dims=cube)
        for quantity in ("scale", "norm", *quantities):
            dtype = "int64" if quantity == "timestep" else "float32"
            new_array(group, quantity, shape=(n, t), chunks=(size, t), dtype=dtype, dims=plane)
        new_array(group, "committed", shape=(len(blocks(n, size)),), chunks=(1,), dtype="uint8", dims=["block"])


def write_block(
    store: SketchStore,
    checkpoint: str,
    block: int,
    sketches: Float32,
    norms: Float32,
    *,
    losses: Float32 | None = None,
    timesteps: npt.NDArray[np.int64] | None = None,
) -> None:
    """Write one block of a checkpoint and commit it.

    Args:
        store: from `create_store`.
        checkpoint: its name.
        block: number of the block, an index into `store.blocks`.
        sketches: raw `[n, t, k]` of the block's samples.
        norms: `[n, t]`; losses and timesteps likewise.

    Raises:
        ValueError: a value is NaN or infinite; names checkpoint, sample and timestep. Nothing is written then.
    """
    samples = store.blocks[block]
    steps = timesteps if timesteps is not None else np.tile(np.arange(sketches.shape[1]), (len(sketches), 1))
    for what, values in (("loss", losses), ("gradient norm", norms), ("gradient", sketches)):
        if values is not None:
            _check_finite(values, what, checkpoint, store.ids[samples], steps)
    rows, scale = encode(sketches, store.meta["dtype"])
    quantities: dict[str, npt.NDArray[Any] | None] = {
        "sketch": rows,
        "scale": scale,
        "norm": norms,
        "loss": losses,
        "timestep": timesteps,
    }
    for name, values in quantities.items():
        if values is not None:
            get_array(store.root, f"{checkpoint}/{name}")[samples] = values
    get_array(store.root, f"{checkpoint}/committed")[block] = 1


def _check_finite(
    values: npt.NDArray[Any], what: str, checkpoint: str, ids: npt.NDArray[Any], steps: npt.NDArray[Any]
) -> None:
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
) -> SketchStore:
    """Make a SketchStore out of arrays, for those who bring their own gradients.

    Args:
        out: path, fsspec URL, or None for memory.
        sketches: {checkpoint: raw sketches `[n, t, k]`}, unnormalised, scaled so that inner products estimate those of
            the gradients.
        norms: {checkpoint: L2 norms of the full gradients `[n, t]`}; None: the sketches' own norms.
        losses: {checkpoint: `[n, t]`}.
        timesteps: {checkpoint: `[n, t]`}, or one list `[t]` for all samples.
        ids: `[n]` unique integers or strings, default 0 .. n-1.
        weights: w_c per checkpoint, a mapping or in the order of `sketches`; default 1.
        dtype: "int8", "float16" or "float32".

    Returns:
        the complete store.

    Raises:
        ValueError: shapes that do not fit each other, values that are not finite, ids given twice, `out` in use.
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
        "norms": {name: np.linalg.norm(array, axis=2) for name, array in arrays.items()} if norms is None else norms,
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
    )
    if any(store.committed(name).any() for name in arrays):
        raise ValueError(f"{out} already holds a store; choose another path.")
    for name, array in arrays.items():
        for block, samples in enumerate(store.blocks):
            part = {key: None if plane is None else plane[name][samples] for key, plane in checked.items()}
            write_block(
                store,
                name,
                block,
                array[samples],
                part["norms"].astype(np.float32),  # type: ignore[union-attr]
                losses=part["losses"],
                timesteps=part["timesteps"],
            )
    return store


def _zip_weights(arrays: Mapping[str, Any], weights: Sequence[float] | None) -> dict[str, float]:
    values = [1.0] * len(arrays) if weights is None else list(weights)
    if len(values) != len(arrays):
        raise ValueError(f"got {len(values)} weights for {len(arrays)} checkpoints; give one for each.")
    return dict(zip(arrays, values, strict=True))


def _timestep_tables(timesteps: Any, arrays: Mapping[str, Any], n: int) -> Mapping[str, Any] | None:
    if timesteps is None or isinstance(timesteps, Mapping):
        return timesteps
    table = np.asarray(timesteps, dtype=np.int64)
    return {name: np.tile(table, (n, 1)) if table.ndim == 1 else table for name in arrays}


def _planes(
    what: str, planes: Mapping[str, Any], arrays: Mapping[str, Any], shape: tuple[int, int]
) -> dict[str, npt.NDArray[Any]]:
    if set(planes) != set(arrays):
        raise ValueError(f"{what} are given for {sorted(planes)}, sketches for {sorted(arrays)}; give the same.")
    checked = {name: np.asarray(planes[name]) for name in arrays}
    for name, plane in checked.items():
        if plane.shape != shape:
            raise ValueError(f"{what} of checkpoint {name!r} have shape {plane.shape}; its sketches need {shape}.")
    return checked
