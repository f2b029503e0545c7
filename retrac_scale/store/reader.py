"""Reading a SketchStore: only committed blocks are ever seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.errors import GroupNotFoundError

from retrac_scale.arrays import Float32
from retrac_scale.store import commits, objects
from retrac_scale.store.encoding import decode
from retrac_scale.store.errors import DamagedStoreError, IncompleteStoreError
from retrac_scale.store.part import ROOT, Part, check_root, digest_of, plans_of
from retrac_scale.store.schema import ATTRIBUTE, CONTENT, CONTENT_WORDS, FORMAT_VERSION, Url, get_group, zarr_location

ALL = slice(None)
WHAT = "sketch store"
PARTS = "parts"

Words = npt.NDArray[np.uint64]
Read = Callable[[str], npt.NDArray[Any]]
"""Gives the stored values of a quantity of one block."""


class SketchStore:
    """Sketches `[c, n, t, k]` of per-sample gradients, with their norms, losses and timesteps.

    Get one from `open_store`, `sketch` or `write_store`. Arrays come back as NumPy, decoded, for all samples or a
    slice of them; `root` is the zarr group, for those who read the arrays themselves.

    A store is one part, or several when it has grown: samples, checkpoints and timesteps that were added stand in
    parts of their own, and are seen here as further rows, names and columns. Values measured otherwise (another
    `measure`) are another store in the same place, see `measurements`.
    """

    def __init__(self, parts: Sequence[Part], url: Url, whole: zarr.Group) -> None:
        self._parts = list(parts)
        self._whole = whole
        self.url = url
        self._cells: dict[tuple[str, str, str], Part] = {}
        for part in self._parts:
            for checkpoint in part.meta["checkpoints"]:
                cell = (part.same_samples, part.same_pairs, checkpoint)
                if cell in self._cells:
                    raise DamagedStoreError(
                        f"{url} holds checkpoint {checkpoint!r} twice for the same samples and timesteps, in parts "
                        f"{self._cells[cell].name!r} and {part.name!r}; remove one of them."
                    )
                self._cells[cell] = part

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

        The timestep plan is a list of plans where the store grew by timesteps, in the order of its timesteps.
        """
        merged = dict(self.meta["fingerprint"])
        if len(self._parts) > 1:
            every = [part.meta["fingerprint"] for part in self._parts]
            merged["checkpoints"] = {name: value for one in every for name, value in one.get("checkpoints", {}).items()}
            plans = {part.same_pairs: plans_of(part.meta["fingerprint"]) for part in self._parts}
            each = [plan for some in plans.values() for plan in some]
            merged["timesteps"] = each[0] if len(each) == 1 else each
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
        return np.concatenate([part.ids for part in self._segments])

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The user's columns, `{name: [n]}`."""
        names = self._segments[0].columns
        return {name: np.concatenate([part.columns[name] for part in self._segments]) for name in names}

    @property
    def deleted(self) -> npt.NDArray[np.bool_]:
        """Which samples are deleted, bool `[n]`, as it is now; an index leaves them out."""
        return np.concatenate([part.deleted for part in self._segments])

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Which samples are not deleted, bool `[n]`."""
        return ~self.deleted

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(n, t, k)."""
        steps = {part.same_pairs: part.shape[1] for part in self._parts}
        return sum(part.shape[0] for part in self._segments), sum(steps.values()), self._parts[0].shape[2]

    @property
    def blocks(self) -> list[slice]:
        """Sample ranges of the blocks, the units of writing and reading."""
        found, start = [], 0
        for part in self._segments:
            found += [slice(start + block.start, start + block.stop) for block in part.blocks]
            start += part.shape[0]
        return found

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
        return list(dict.fromkeys(measure_of(part) for part in open_parts(self._whole, self.url)))

    @property
    def revision(self) -> str:
        """A digest of all that determines the content now: descriptions, ids, tombstones and commit records."""
        state = []
        for part in self._parts:
            keys = [
                commits.commit_key(name, block)
                for name in part.meta["checkpoints"]
                for block in range(len(part.blocks))
            ]
            records = objects.read_all(part.root, keys)
            state += [part.name.encode(), part.meta["digest"].encode(), part.deleted.tobytes()]
            state += [record or b"-" for record in records.values()]
        return digest_of(b"".join(len(item).to_bytes(8, "little") + item for item in state))

    def refresh(self) -> SketchStore:
        """The store as it is now, with the parts that were added since it was opened."""
        measure = measure_of(self._parts[0])
        parts = [part for part in open_parts(self._whole, self.url) if measure_of(part) == measure]
        return SketchStore(parts, self.url, self._whole)

    def committed(self, checkpoint: str) -> npt.NDArray[np.bool_]:
        """Which blocks of a checkpoint are written, bool `[blocks]`."""
        self._check(checkpoint)
        done = [
            np.logical_and.reduce(
                [part.committed(checkpoint) if part else np.zeros(len(first.blocks), bool) for part in row]
            )
            for first, row in ((first, self._row(first, checkpoint)) for first in self._segments)
        ]
        return np.concatenate(done)

    @property
    def is_complete(self) -> bool:
        """Whether every block of every checkpoint is committed."""
        return all(self.committed(name).all() for name in self.checkpoints)

    def sketches(self, checkpoint: str, samples: slice = ALL) -> Float32:
        """Raw sketches, float32 `[n, t, k]`; their inner products estimate those of the gradients."""
        (sketches,) = self._gather(checkpoint, samples, "sketch")
        return sketches

    def sketches_and_norms(self, checkpoint: str, samples: slice = ALL) -> tuple[Float32, Float32]:
        """What `sketches` and `norms` give, at the cost of one search for the blocks."""
        sketches, norms = self._gather(checkpoint, samples, "sketch", "norm")
        return sketches, norms

    def stored(self, checkpoint: str, block: int) -> tuple[npt.NDArray[Any], Float32]:
        """One block as it is stored, without a copy where that is possible.

        Returns:
            rows `[n, t, k]` in the store's dtype (bfloat16 as uint16 bits) and scales `[n, t]`; raw = rows x scale.
        """
        self._check(checkpoint)
        ((first, number, _, samples),) = self._overlapping(self.blocks[block])
        reads = [read for read, _ in self._filled(first, checkpoint, number, samples)]
        sketch, scale = ([read(name) for read in reads] for name in ("sketch", "scale"))
        return (sketch[0], scale[0]) if len(reads) == 1 else (np.concatenate(sketch, 1), np.concatenate(scale, 1))

    def norms(self, checkpoint: str, samples: slice = ALL) -> Float32:
        """L2 norms of the full gradients (or their estimates, see the projection), float32 `[n, t]`."""
        (norms,) = self._gather(checkpoint, samples, "norm")
        return norms

    def losses(self, checkpoint: str, samples: slice = ALL) -> Float32:
        """Training losses, float32 `[n, t]`; mean squared errors where another function was differentiated."""
        (losses,) = self._gather(checkpoint, samples, "loss")
        return losses

    def timesteps(self, checkpoint: str, samples: slice = ALL) -> npt.NDArray[np.int64]:
        """Diffusion timesteps, int64 `[n, t]`."""
        (timesteps,) = self._gather(checkpoint, samples, "timestep")
        return timesteps

    def contents(self, checkpoint: str, samples: slice = ALL) -> Words:
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
        chosen = np.asarray(ids)
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

    @cached_property
    def _segments(self) -> list[Part]:
        """The first part over each set of samples; their samples one after the other are the store's."""
        found: dict[str, Part] = {}
        for part in self._parts:
            found.setdefault(part.same_samples, part)
        return list(found.values())

    @cached_property
    def _plans(self) -> list[str]:
        return list(dict.fromkeys(part.same_pairs for part in self._parts))

    def _row(self, segment: Part, checkpoint: str) -> list[Part | None]:
        """The parts that hold a checkpoint for the samples of a segment, one per timestep plan."""
        return [self._cells.get((segment.same_samples, plan, checkpoint)) for plan in self._plans]

    def _check(self, checkpoint: str) -> None:
        if checkpoint not in self.checkpoints:
            raise KeyError(f"the store has no checkpoint {checkpoint!r}; it has {self.checkpoints}.")

    def _gather(self, checkpoint: str, samples: slice, *quantities: str) -> list[npt.NDArray[Any]]:
        """Some samples' values of each quantity `[n, ...]`, put together from the blocks of all parts."""
        self._check(checkpoint)
        for quantity in quantities:
            if not self.has(quantity):
                raise ValueError(f"the store was written without {quantity}; give it to write_store.")
        n, t, k = self.shape
        chosen = range(*samples.indices(n))
        start, stop = (min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1]) + 1) if chosen else (0, 0)
        shapes = {"sketch": (t, k), CONTENT: (CONTENT_WORDS,)}
        types = {"timestep": np.int64, CONTENT: np.uint64}
        found: list[npt.NDArray[Any]] = [
            np.empty((stop - start, *shapes.get(name, (t,))), types.get(name, np.float32)) for name in quantities
        ]
        done = 0
        for first, number, rows, block in self._overlapping(slice(start, stop)):
            below, column = done + rows.stop - rows.start, 0
            for read, steps in self._filled(first, checkpoint, number, block):
                for quantity, values in zip(quantities, found, strict=True):
                    out = values[done:below] if quantity == CONTENT else values[done:below, column : column + steps]
                    if quantity == "sketch":
                        decode(read("sketch")[rows], read("scale")[rows], out=out)
                    else:
                        out[:] = read(quantity)[rows]
                column += steps
            done = below
        if chosen.step == 1:
            return found
        return [values[np.arange(chosen.start, chosen.stop, chosen.step) - start] for values in found]

    def _overlapping(self, samples: slice) -> Iterator[tuple[Part, int, slice, slice]]:
        """Blocks that hold some of the samples: segment, number in it, rows within the block, the whole block."""
        offset = 0
        for first in self._segments:
            size = first.meta["block_samples"]
            start, stop = max(samples.start - offset, 0), min(samples.stop - offset, first.shape[0])
            for number in range(start // size, -(-stop // size)) if start < stop else ():
                block = first.blocks[number]
                rows = slice(max(start, block.start) - block.start, min(stop, block.stop) - block.start)
                yield first, number, rows, slice(offset + block.start, offset + block.stop)
            offset += first.shape[0]

    def _filled(self, first: Part, checkpoint: str, number: int, samples: slice) -> list[tuple[Read, int]]:
        """For each timestep plan of a committed block, what reads its quantities, and its number of timesteps."""
        found: list[tuple[Read, int]] = []
        for part in self._row(first, checkpoint):
            record = part.record(checkpoint, number) if part else None
            if part is None or record is None:
                raise IncompleteStoreError(
                    f"checkpoint {checkpoint!r}, samples {samples.start} .. {samples.stop - 1} "
                    "are not written yet; run the same sketch(...) again, it computes only what is missing."
                )
            found.append((partial(part.read, checkpoint, block=number, record=record), part.shape[1]))
        return found

    def __repr__(self) -> str:
        n, t, k = self.shape
        return f"SketchStore({self.url!r}: {len(self.checkpoints)} checkpoints, {n} samples, {t} timesteps, k = {k})"


def open_store(
    url: Url, *, mode: Literal["r", "r+"] = "r", measure: str | None = None, part: str | None = None
) -> SketchStore:
    """Open an existing SketchStore, for reading unless mode is "r+".

    Args:
        url: a path or an fsspec URL.
        mode: "r+" is for workers that write blocks.
        measure: which of `store.measurements`; None for the first.
        part: the name of one part, to write its blocks; None for the whole store.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no sketch store, or of a newer format.
        DamagedStoreError: its metadata is not what was written.
    """
    root = open_root(url, WHAT, mode)
    parts = open_parts(root, url)
    if part is not None:
        chosen = [one for one in parts if one.name == part]
    else:
        first = measure_of(parts[0]) if measure is None else measure
        chosen = [one for one in parts if measure_of(one) == first]
    if not chosen:
        raise ValueError(f"{url} has no {'measure' if part is None else 'part'} {part or measure!r}.")
    return SketchStore(chosen, url, root)


def open_parts(root: zarr.Group, url: Url) -> list[Part]:
    """The parts of the store at a zarr group, that at its root first, then those that were added, in their order."""
    found = [_open_part(root, "", str(url))]
    for name in objects.names(root, PARTS):
        if name != ROOT:
            found.append(_open_part(root, name, f"{url}/{PARTS}/{name}"))
    parts = [part for part in found if part is not None]
    if not parts:
        raise ValueError(f"{url} was being created when its process ended; repeat the sketch(...) that began it.")
    return parts


def _open_part(root: zarr.Group, name: str, place: str) -> Part | None:
    """One part, None when it has not been laid out to the end."""
    content = objects.read(root, f"{PARTS}/{name}/{ROOT}" if name else ROOT)
    if content is None:
        raise DamagedStoreError(f"{place}/{ROOT} is missing; run `retrac-scale verify` on the store.")
    try:
        attribute = json.loads(content).get("attributes", {}).get(ATTRIBUTE)
    except (ValueError, AttributeError) as error:
        raise DamagedStoreError(f"{place}/{ROOT} is damaged: {error}.") from None
    check_description(attribute, WHAT, place)
    if attribute.get("creating"):
        return None
    meta = check_root(content, place)
    return Part(get_group(root, f"{PARTS}/{name}") if name else root, meta, name, place)


def measure_of(part: Part) -> str:
    """The measure that a part was sketched with, "given" for arrays that came from elsewhere."""
    return str(part.meta["fingerprint"].get("measure", "given"))


def check_description(attribute: Any, what: str, place: Url) -> None:
    """Raise ValueError unless a group's attribute describes a store (or an index) that this release can read."""
    if not isinstance(attribute, dict) or attribute.get("what") != what:
        raise ValueError(f"{place} is a zarr group but no {what}.")
    if not isinstance(attribute.get("format"), int) or attribute["format"] > FORMAT_VERSION:
        raise ValueError(
            f"{place} has format version {attribute.get('format')}, this release reads up to {FORMAT_VERSION}; "
            "update retrac_scale."
        )


def open_root(url: Url, what: str, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """Open the zarr group of a store or an index, checking that it is one of a known version.

    Raises:
        FileNotFoundError: there is no zarr group.
        ValueError: it is something else, or of a newer format.
        DamagedStoreError: its metadata cannot be read.
    """
    try:
        root = zarr.open_group(zarr_location(url), mode=mode)
    except (FileNotFoundError, NotADirectoryError, GroupNotFoundError) as error:
        raise FileNotFoundError(f"there is no {what} at {url}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{url}/{ROOT} is damaged: {error}.") from error
    check_description(root.attrs.get(ATTRIBUTE), what, url)
    return root
