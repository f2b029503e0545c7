"""Creating a SketchStore and writing its blocks: data first, the commit record last."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.arrays import Float32
from retrac_scale.columns import RESERVED, check_columns, column_types
from retrac_scale.store import commits, objects
from retrac_scale.store.compatibility import as_told_by, kept_alike, library_versions
from retrac_scale.store.encoding import Dtype, array_dtype, check_dtype, encode
from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.opening import WHAT, open_parts
from retrac_scale.store.part import ROOT, NewChunk, Part, group_json, lay_out
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
    root = _root_at(out, meta)
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


def _root_at(out: Url, meta: Mapping[str, Any]) -> zarr.Group:
    """The zarr group at `out`, begun where there is none."""
    location = zarr_location(out)
    try:
        with contextlib.suppress(FileNotFoundError):
            return zarr.open_group(location, mode="r+")
        objects.write_new(objects.place_of(location), ROOT, group_json(unfinished(meta)))
        return zarr.open_group(location, mode="r+")
    except FileExistsError:
        raise ValueError(f"{out} is a file; choose another path.") from None
    except NotADirectoryError:
        raise ValueError(f"{out} is below a file; choose another path.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{out}/{ROOT} is damaged: {error}; run `retrac-scale verify` on it.") from error


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
        if not isinstance(name, str):
            raise ValueError(f"a checkpoint is called {name!r}, which is no string; give it a string as its name.")
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
    given = Rows(sketches, norms, losses, timesteps, contents)
    chunks = chunks_of(part, checkpoint, block, part.ids[part.blocks[block]], given)
    keys = {name: part.chunk_key(checkpoint, name, block) for name in chunks}
    with told_of_block(f"block {block} of checkpoint {checkpoint!r}", part.place):
        objects.write_all(part.root, {keys[name]: new for name, new in chunks.items()})
        checksums = {name: new.checksum for name, new in chunks.items()}
        record = commits.pack(part.meta["digest"], checkpoint, block, checksums)
        objects.write_all(part.root, {commits.commit_key(checkpoint, block): record})


@contextlib.contextmanager
def told_of_block(what: str, place: Any) -> Iterator[None]:
    """An OSError says what could not be written, and that the rest stands."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{what} could not be written to {place}: {error.strerror or error}; what was committed before stands, "
            "repeat the call once that is repaired",
        ) from error


@dataclass(frozen=True, eq=False)
class Rows:
    """What is measured of some samples at one checkpoint, `[n, t, k]` and `[n, t]`; see `write_block`."""

    sketches: Float32
    norms: Float32
    losses: Float32 | None = None
    timesteps: npt.NDArray[np.int64] | None = None
    contents: npt.NDArray[np.uint64] | None = None

    def each(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Rows:
        """The same change of all that there is, such as some of the samples."""
        return replace(self, **{name: change(values) for name, values in vars(self).items() if values is not None})

    @staticmethod
    def joined(several: Sequence[Rows]) -> Rows:
        """Several, one after the other."""
        if len(several) == 1:
            return several[0]
        there = [name for name, values in vars(several[0]).items() if values is not None]
        return replace(several[0], **{name: np.concatenate([vars(one)[name] for one in several]) for name in there})


def chunks_of(
    part: Part, checkpoint: str, block: int, ids: npt.NDArray[Any], rows: Rows, place: int | None = None
) -> dict[str, NewChunk]:
    """The chunks of one block by quantity, made while they are written; the samples' ids are for messages.

    Args:
        part: laid out.
        checkpoint: its name.
        block: number of the block, for messages.
        ids: of its samples, `[n]`.
        rows: of them.
        place: the chunks' place in the arrays; None for `block`.

    Raises:
        ValueError: shapes that do not fit, a loss or a norm that is not finite; a sketch is told when it is written.
    """
    count, sketches = len(ids), rows.sketches
    steps = _steps(rows)
    for what, plane in (("loss", rows.losses), ("gradient norm", rows.norms)):
        if plane is not None:
            _check_finite(plane, what, checkpoint, ids, steps)
    given: dict[str, Any] = {
        "sketch": sketches,
        "norm": rows.norms,
        "loss": rows.losses,
        "timestep": rows.timesteps,
        CONTENT: rows.contents,
    }
    scale = np.empty((count, *part.shape[1:2]), np.float32)

    def stored() -> Iterator[npt.NDArray[Any]]:
        """The rows as they are stored, some at a time; fills `scale`."""
        array = part.array(f"{checkpoint}/sketch")
        size = max(1, objects.SLICE // (math.prod(array.shape[1:]) * array.dtype.itemsize))
        for start in range(0, count, size):
            some = slice(start, start + size)
            encoded, scale[some] = encode(sketches[some], part.meta["dtype"])
            if part.meta["dtype"] == "float32" or not np.isfinite(scale[some]).all():
                _check_finite(sketches[some], "gradient", checkpoint, ids[some], steps[some])
            yield encoded

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
        chunks[quantity] = NewChunk(array, block if place is None else place, values[quantity])
    return chunks


def check_rows(rows: Rows, checkpoint: str, ids: npt.NDArray[Any]) -> None:
    """Raise ValueError, naming the first sample, where rows have a value that is NaN or infinite."""
    steps = _steps(rows)
    for what, values in (("gradient", rows.sketches), ("loss", rows.losses), ("gradient norm", rows.norms)):
        if values is not None:
            _check_finite(values, what, checkpoint, ids, steps)


def _steps(rows: Rows) -> npt.NDArray[np.int64]:
    """The timesteps `[n, t]` of rows, or their numbers."""
    n, t, _ = rows.sketches.shape
    return rows.timesteps if rows.timesteps is not None else np.tile(np.arange(t), (n, 1))


def _check_finite(
    values: npt.NDArray[Any], what: str, checkpoint: str, ids: npt.NDArray[Any], steps: npt.NDArray[Any]
) -> None:
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):  # one pass without a temporary; an overflow is looked into below
            return
    finite = np.isfinite(values)
    if not finite.all():
        sample, timestep = np.argwhere(~finite)[0][:2]
        raise ValueError(
            f"the {what} is NaN or infinite at checkpoint {checkpoint!r}, sample {ids[sample]}, timestep "
            f"{steps[sample, timestep]}; check that checkpoint and that image, or leave them out."
        )
