"""Segments of an index: rows of consecutive samples, written once and never changed, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from zarr.storage import StorePath

from retrac_scale.arrays import Bools, Int64
from retrac_scale.columns import Column, joined
from retrac_scale.index.columns import Fetch, column_names, read_column
from retrac_scale.store import objects
from retrac_scale.store.part import ROOT
from retrac_scale.store.schema import blocks, get_array, get_group, new_array

ARRAYS = ("row", "scale", "norm", "id")
FOLDER, DELETED, RIDGE, KEPT = "segments", "deleted", "ridge", "kept"
ONE_OF = (DELETED, RIDGE)
"""Folders of which an index holds what its description names, under the same name."""
AT_ROOT = (*ARRAYS, KEPT, "column")
UNSEALED = (ROOT, *(f"{folder}/{ROOT}" for folder in (FOLDER, *ONE_OF)))
"""Objects of an index that no seal is about: its description, and what holds nothing."""
MOST = 64
"""Segments of an index; beyond, it is built whole."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows of those of the store's samples `start` .. `stop` that were not deleted when it was written.

    Attributes:
        root: the index's group.
        name: "" for the segment at the root, else its name below `segments`.
        start: place in the store of the first sample that it is about.
        stop: behind the last.
    """

    root: zarr.Group
    name: str
    start: int = 0
    stop: int = 0

    @property
    def prefix(self) -> str:
        """What the keys of its objects begin with."""
        return prefix_of(self.name)

    @cached_property
    def group(self) -> zarr.Group:
        """Its own group."""
        return get_group(self.root, self.prefix.rstrip("/")) if self.name else self.root

    @cached_property
    def arrays(self) -> dict[str, zarr.Array[Any]]:
        """Its arrays by name."""
        return {name: get_array(self.group, name) for name in ARRAYS}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, n, k)."""
        c, n, k = self.arrays["row"].shape
        return c, n, k

    @property
    def chunks(self) -> list[slice]:
        """Ranges of its rows that are one chunk each."""
        return blocks(self.shape[1], self.arrays["row"].chunks[1])

    @cached_property
    def places(self) -> Int64:
        """Where the sample of each row stands in the store, `[n]`."""
        if self.shape[1] == self.stop - self.start:
            return np.arange(self.start, self.stop)
        kept = unpacked(get_array(self.group, KEPT), self.stop - self.start)
        return self.start + np.flatnonzero(kept)

    def place(self, row: int) -> int:
        """That of one row."""
        return self.start + row if self.shape[1] == self.stop - self.start else int(self.places[row])

    def described(self) -> dict[str, Any]:
        """What the index's description says of it."""
        return {"name": self.name, "start": self.start, "stop": self.stop}


def segments_of(root: zarr.Group, meta: Mapping[str, Any]) -> list[Segment]:
    """The segments of an index, those of earlier releases in one."""
    return [Segment(root, **one) for one in meta.get("segments", [{"name": ""}])]


def place_of(segments: Sequence[Segment], row: int) -> int:
    """Where the sample of a row of several segments, one after the other, stands in the store."""
    for segment in segments:
        if row < segment.shape[1]:
            return segment.place(row)
        row -= segment.shape[1]
    raise IndexError(row)


def prefix_of(name: str) -> str:
    """What the keys of a segment's objects begin with."""
    return f"{FOLDER}/{name}/" if name else ""


def column_of(segments: Sequence[Segment], name: str, fetch: Fetch) -> Column:
    """A column of all segments."""
    return joined([read_column(segment.group, name, fetch) for segment in segments])


def names_of_columns(segments: Sequence[Segment]) -> list[str]:
    """Names of the user's columns, sorted."""
    return column_names(segments[0].group)


def write_packed(root: zarr.Group, name: str, values: Bools) -> None:
    """Write booleans `[n]`, eight to a byte."""
    packed = np.packbits(values)
    new_array(root, name, shape=packed.shape, chunks=packed.shape, dtype="uint8", dims=["byte"])[:] = packed


def unpacked(array: zarr.Array[Any], count: int) -> Bools:
    """What `write_packed` wrote."""
    return np.unpackbits(np.asarray(array[:]), count=count).astype(bool)


def holds(meta: Mapping[str, Any], key: str) -> bool:
    """Whether an object belongs to the index of such a description."""
    names = [one["name"] for one in meta["segments"]]
    first, _, rest = key.partition("/")
    if key.endswith(".partial") or key in UNSEALED:
        return False
    if first == FOLDER:
        return rest.partition("/")[0] in {*names} - {""}
    if first in ONE_OF:
        return rest.partition("/")[0] == meta.get(first)
    return "" in names and first in AT_ROOT


def sweep(place: StorePath, meta: Mapping[str, Any]) -> None:
    """Remove segments, marks and ridges but those of the index of such a description."""
    names = [one["name"] for one in meta["segments"]]
    for folder in AT_ROOT if "" not in names else ():
        objects.delete_folder(place, folder)
    for above, held in ((FOLDER, {*names}), *((folder, {meta.get(folder)}) for folder in ONE_OF)):
        for name in objects.names(place, above):
            if name not in held and name != ROOT:
                objects.delete_folder(place, f"{above}/{name}")
