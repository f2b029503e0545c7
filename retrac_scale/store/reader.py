"""Reading a SketchStore: only committed blocks are ever seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.arrays import Float32, Int64, Samples
from retrac_scale.columns import Places, as_ids
from retrac_scale.store import commits, objects
from retrac_scale.store.grid import Grid
from retrac_scale.store.opening import WHAT, measure_of, of_measures, open_parts, open_root
from retrac_scale.store.part import Part, measures_in, plans_of
from retrac_scale.store.schema import CONTENT, Url, digest_of

ALL = slice(None)

Words = npt.NDArray[np.uint64]


class SketchStore:
    """Sketches `[c, n, t, k]` of per-sample gradients, with their norms, losses and timesteps.

    Get one from `open_store`, `sketch` or `write_store`. Arrays come back as NumPy, decoded, for all samples, a
    slice of them, or those at some places `[m]`; `root` is the zarr group, for those who read the arrays themselves.

    A store is one part, or several when it has grown: samples, checkpoints and timesteps that were added stand in
    parts of their own, and are seen here as further rows, names and columns. Values measured otherwise (another
    `measure`) are another store in the same place, see `measurements`; opened together they are further columns.
    """

    def __init__(self, parts: Sequence[Part], url: Url, whole: zarr.Group) -> None:
        self._grid = Grid(parts, url)
        self._parts = self._grid.parts
        self._whole = whole
        self.url = url

    @property
    def root(self) -> zarr.Group:
        """The zarr group of the first part."""
        return self._parts[0].root

    @property
    def meta(self) -> dict[str, Any]:
        """The description of the first part."""
        return self._parts[0].meta

    @property
    def plan(self) -> dict[str, Any]:
        """How blocks are computed (batch size, threads, ...), recorded when the store was begun."""
        return dict(self.meta["plan"])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the sketches are a function of: projection, parameters, checkpoints, scheduler, measure, timesteps.

        The timestep plan is a list of plans where the store grew by timesteps, in the order of its timesteps, or holds
        several measures, of which there is a list then.
        """
        merged = dict(self.meta["fingerprint"])
        if len(self._parts) > 1:
            every = [part.meta["fingerprint"] for part in self._parts]
            digests = {name: value for one in every for name, value in one.get("checkpoints", {}).items()}
            plans = {part.same_pairs: plans_of(part.meta["fingerprint"]) for part in self._parts}
            each = [plan for some in plans.values() for plan in some]
            measures = _measures_of(self._parts)
            told = {
                "checkpoints": digests,
                "timesteps": each[0] if len(each) == 1 else each,
                "measure": measures if len(measures) > 1 else None,
            }
            merged |= {name: value for name, value in told.items() if value}  # a store of arrays knows neither
        return merged

    @property
    def checkpoints(self) -> list[str]:
        """Checkpoint names, in the order they were given."""
        return list(self.weights)

    @cached_property
    def weights(self) -> dict[str, float]:
        """Checkpoint weights w_c."""
        found: dict[str, float] = {}
        for part in self._parts:
            found |= {name: weight for name, weight in part.meta["checkpoints"].items() if name not in found}
        return found

    @cached_property
    def ids(self) -> npt.NDArray[Any]:
        """Sample ids `[n]`, int64 or str."""
        return _joined([part.ids for part in self._grid.segments])

    @cached_property
    def places(self) -> Places:
        """Where each sample stands."""
        return Places(self.ids)

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The user's columns, `{name: [n]}`: booleans, numbers, or texts as arrays of Python's strings."""
        names = self._grid.segments[0].columns
        return {name: _joined([part.columns[name] for part in self._grid.segments]) for name in names}

    def column(self, name: str, samples: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """One of the user's columns, or the ids under "id", of the samples at some places `[m]`.

        Of the others' texts only those in the same chunks are decoded, and nothing is kept.
        """
        parts = self._grid.segments
        starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        segment = np.searchsorted(starts, samples, side="right") - 1
        found = [part.column(name, samples[segment == i] - starts[i]) for i, part in enumerate(parts)]
        back = np.argsort(np.argsort(segment, kind="stable"), kind="stable")
        return found[0] if len(parts) == 1 else np.concatenate(found)[back]

    def columns_of(self, samples: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """The user's columns of the samples at some places `[m]`, `{name: [m]}`."""
        return {name: self.column(name, samples) for name in self.meta["columns"] if name != "id"}

    @property
    def deleted(self) -> npt.NDArray[np.bool_]:
        """Which samples are deleted, bool `[n]`, as it is now; an index leaves them out."""
        return np.concatenate([part.deleted for part in self._grid.segments])

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Which samples are not deleted, bool `[n]`."""
        return ~self.deleted

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, t, k)."""
        return self._grid.shape

    @property
    def blocks(self) -> list[slice]:
        """Sample ranges of the blocks, the units of writing and reading."""
        return self._grid.blocks

    @property
    def parts(self) -> list[SketchStore]:
        """The parts as stores of their own; blocks are written into one of them."""
        return [SketchStore([part], self.url, self._whole) for part in self._parts]

    @property
    def only_part(self) -> Part:
        """The part that this store consists of; `only_part.name` is what `open_store(url, part=...)` takes.

        Raises:
            ValueError: it has several.
        """
        if len(self._parts) > 1:
            raise ValueError(f"{self.url} has grown to {len(self._parts)} parts; choose one of store.parts.")
        return self._parts[0]

    @property
    def measurements(self) -> list[str]:
        """The measures that were sketched here; `open_store(url, measure=...)` opens each."""
        return _measures_of(open_parts(self._whole, self.url))

    @property
    def revision(self) -> str:
        """A digest of all that determines the content now: descriptions, ids, tombstones and commit records."""
        state = []
        for part in self._parts:
            state += [part.name.encode(), part.meta["digest"].encode(), part.deleted.tobytes(), *_records(part)]
        return _digest_of_all(state)

    @property
    def part_digests(self) -> list[list[str]]:
        """Of each part its name and a digest of its content but for tombstones: description, ids, commit records."""
        return [[part.name, _digest_of_all([part.meta["digest"].encode(), *_records(part)])] for part in self._parts]

    def refresh(self) -> SketchStore:
        """The store as it is now, with the parts that were added since it was opened."""
        return self.under(*_measures_of(self._parts))

    def under(self, *measures: str) -> SketchStore:
        """What stands in the same place under some measures, side by side, as `open_store` gives it."""
        return SketchStore(of_measures(open_parts(self._whole, self.url), measures, self.url), self.url, self._whole)

    def committed(self, checkpoint: str) -> npt.NDArray[np.bool_]:
        """Which blocks of a checkpoint are written, bool `[blocks]`."""
        self._check(checkpoint)
        return self._grid.committed(checkpoint)

    @property
    def is_complete(self) -> bool:
        """Whether every block of every checkpoint is committed."""
        return all(self.committed(name).all() for name in self.checkpoints)

    def sketches(self, checkpoint: str, samples: Samples = ALL) -> Float32:
        """Raw sketches, float32 `[n, t, k]`; their inner products estimate those of the gradients."""
        (sketches,) = self._gather(checkpoint, samples, "sketch")
        return sketches

    def sketches_and_norms(self, checkpoint: str, samples: Samples = ALL) -> tuple[Float32, Float32]:
        """What `sketches` and `norms` give, at the cost of one search for the blocks."""
        sketches, norms = self._gather(checkpoint, samples, "sketch", "norm")
        return sketches, norms

    def stored(self, checkpoint: str, block: int) -> tuple[npt.NDArray[Any], Float32]:
        """One block as it is stored, without a copy where that is possible.

        Returns:
            rows `[n, t, k]` in the store's dtype (bfloat16 as uint16 bits) and scales `[n, t]`; raw = rows x scale.
        """
        self._check(checkpoint)
        return self._grid.stored(checkpoint, block)

    def norms(self, checkpoint: str, samples: Samples = ALL) -> Float32:
        """L2 norms of the full gradients (or their estimates, see the projection), float32 `[n, t]`."""
        (norms,) = self._gather(checkpoint, samples, "norm")
        return norms

    def losses(self, checkpoint: str, samples: Samples = ALL) -> Float32:
        """Training losses, float32 `[n, t]`; mean squared errors where another function was differentiated."""
        (losses,) = self._gather(checkpoint, samples, "loss")
        return losses

    def timesteps(self, checkpoint: str, samples: Samples = ALL) -> npt.NDArray[np.int64]:
        """Diffusion timesteps, int64 `[n, t]`."""
        (timesteps,) = self._gather(checkpoint, samples, "timestep")
        return timesteps

    def contents(self, checkpoint: str, samples: Samples = ALL) -> Words:
        """What the rows of a checkpoint were computed from, uint64 `[n, 4]`, see `retrac_scale.sketching.content`."""
        (contents,) = self._gather(checkpoint, samples, CONTENT)
        return contents

    def written_contents(self, ids: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], Words | None]]:
        """Ids and contents of each committed block, of every measure, that holds some samples; without deleted ones.

        Contents are None where they were not kept, by an earlier release for one.
        """
        for part in open_parts(self._whole, self.url):
            alive = ~part.deleted
            asked = np.isin(part.ids, ids)
            for checkpoint in part.meta["checkpoints"]:
                for block, samples in enumerate(part.blocks):
                    record = part.record(checkpoint, block) if asked[samples].any() else None
                    if record is not None:
                        told = (
                            part.read(checkpoint, CONTENT, block, record)[alive[samples]] if CONTENT in record else None
                        )
                        yield part.ids[samples][alive[samples]], told

    def has(self, quantity: str) -> bool:
        """Whether the store carries 'loss', 'timestep', or 'content', which only `sketch` writes."""
        return all(quantity in part.meta["quantities"] for part in self._parts)

    def delete(self, ids: Sequence[Any] | npt.NDArray[Any]) -> int:
        """Mark samples as deleted; indexes built or refreshed after this leave them out.

        The rows stay on disk until the store is written anew. One process should delete at a time.

        Args:
            ids: ids of samples; those that are deleted already may be among them.

        Returns:
            how many samples are deleted now.

        Raises:
            ValueError: an id is not in the store; nothing is deleted then.
        """
        chosen = as_ids(np.asarray(ids))
        unknown = ~np.isin(chosen, self.ids)
        if unknown.any():
            raise ValueError(f"{self.url} has no sample {chosen[unknown].tolist()[0]!r}; nothing was deleted.")
        writable = zarr.open_group(self._whole.store_path.store.with_read_only(False), path=self._whole.path, mode="r+")
        for part in open_parts(writable, self.url):
            mask = np.isin(part.ids, chosen)
            if mask.any():
                part.delete(mask)
        return int(self.deleted.sum())

    def set_aside(self, ids: Sequence[Any]) -> None:
        """Take back the commits of all blocks that hold some samples, in every measure; `sketch` writes them anew."""
        for part in open_parts(self._whole, self.url):
            held = np.isin(part.ids, np.asarray(ids))
            for block, samples in enumerate(part.blocks):
                for checkpoint in part.meta["checkpoints"] if held[samples].any() else ():
                    part.set_aside(checkpoint, block)

    def _check(self, checkpoint: str) -> None:
        if checkpoint not in self.checkpoints:
            raise KeyError(f"the store has no checkpoint {checkpoint!r}; it has {self.checkpoints}.")

    def _gather(self, checkpoint: str, samples: Samples, *quantities: str) -> list[npt.NDArray[Any]]:
        """Some samples' values of each quantity `[n, ...]`, put together from the blocks of all parts."""
        self._check(checkpoint)
        for quantity in quantities:
            if not self.has(quantity):
                raise ValueError(f"the store was written without {quantity}; give it to write_store.")
        if not isinstance(samples, slice):
            samples = checked_places(samples, self.shape[0])
        return self._grid.gather(checkpoint, samples, *quantities)

    def __repr__(self) -> str:
        n, t, k = self.shape
        return f"SketchStore({self.url!r}: {len(self.checkpoints)} checkpoints, {n} samples, {t} timesteps, k = {k})"


def checked_places(places: npt.ArrayLike, n: int) -> Int64:
    """Places of samples as int64 `[m]`; IndexError unless they are integers from 0 to n - 1."""
    given = np.asarray(places)
    if given.ndim != 1 or (given.size and (given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= n)):
        raise IndexError(f"samples are chosen by a slice or by places from 0 to {n - 1}, got {places!r}.")
    return given.astype(np.int64)


def _joined(several: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return several[0] if len(several) == 1 else np.concatenate(several)


def _records(part: Part) -> list[bytes]:
    """The commit records of all blocks of a part, as they lie there."""
    names = part.meta["checkpoints"]
    keys = [commits.commit_key(name, block) for name in names for block in range(len(part.blocks))]
    return [record or b"-" for record in objects.read_all(part.root, keys).values()]


def _digest_of_all(items: Sequence[bytes]) -> str:
    return digest_of(b"".join(len(item).to_bytes(8, "little") + item for item in items))


def _measures_of(parts: Sequence[Part]) -> list[str]:
    """The measures of some parts, each once; those of samples that were taken from several stand in one part."""
    return list(dict.fromkeys(one or "given" for part in parts for one in measures_in(part.meta["fingerprint"])))


def open_store(
    url: Url,
    *,
    mode: Literal["r", "r+"] = "r",
    measure: str | Sequence[str] | None = None,
    part: str | None = None,
) -> SketchStore:
    """Open an existing SketchStore, for reading unless mode is "r+".

    Args:
        url: a path or an fsspec URL.
        mode: "r+" is for workers that write blocks.
        measure: which of `store.measurements`; None for the first. Several stand side by side, like further timesteps:
            scores of matched pairing are their sum.
        part: the name of one part, to write its blocks; None for the whole store.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no sketch store, or of a newer format; or it has no such measure or part.
        DamagedStoreError: its metadata is not what was written.
    """
    root = open_root(url, WHAT, mode)
    parts = open_parts(root, url)
    if part is not None:
        chosen = [one for one in parts if one.name == part]
        if not chosen:
            raise ValueError(f"{url} has no part {part!r}.")
    else:
        wanted = measure_of(parts[0]) if measure is None else measure
        chosen = of_measures(parts, [wanted] if isinstance(wanted, str) else list(dict.fromkeys(wanted)), url)
    return SketchStore(chosen, url, root)
