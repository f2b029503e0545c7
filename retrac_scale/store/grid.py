"""The parts of a store side by side: which of them holds what, and values put together from their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32, Int64, Samples
from retrac_scale.store.encoding import decode
from retrac_scale.store.errors import DamagedStoreError, IncompleteStoreError
from retrac_scale.store.part import Part
from retrac_scale.store.schema import CONTENT, CONTENT_WORDS, Url

Read = Callable[[str], npt.NDArray[Any]]
"""Gives the stored values of a quantity of one block."""


class Grid:
    """Parts by the samples, the timestep plan and the checkpoints that they hold.

    Args:
        parts: of one store and measure, in their order.
        place: of the store, for messages.

    Raises:
        DamagedStoreError: two of them hold the same.
    """

    def __init__(self, parts: Sequence[Part], place: Url) -> None:
        self.parts = list(parts)
        self._cells: dict[tuple[str, str, str], Part] = {}
        for part in self.parts:
            for checkpoint in part.meta["checkpoints"]:
                cell = (part.same_samples, part.same_pairs, checkpoint)
                if cell in self._cells:
                    raise DamagedStoreError(
                        f"{place} holds checkpoint {checkpoint!r} twice for the same samples and timesteps, in parts "
                        f"{self._cells[cell].name!r} and {part.name!r}; remove one of them."
                    )
                self._cells[cell] = part

    @cached_property
    def segments(self) -> list[Part]:
        """The first part over each set of samples; their samples one after the other are the store's."""
        found: dict[str, Part] = {}
        for part in self.parts:
            found.setdefault(part.same_samples, part)
        return list(found.values())

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(n, t, k)."""
        steps = {part.same_pairs: part.shape[1] for part in self.parts}
        return sum(part.shape[0] for part in self.segments), sum(steps.values()), self.parts[0].shape[2]

    @property
    def blocks(self) -> list[slice]:
        """Sample ranges of the blocks."""
        found, start = [], 0
        for part in self.segments:
            found += [slice(start + block.start, start + block.stop) for block in part.blocks]
            start += part.shape[0]
        return found

    def committed(self, checkpoint: str) -> npt.NDArray[np.bool_]:
        """Which blocks of a checkpoint are written at every timestep plan, bool `[blocks]`."""
        done = [
            np.logical_and.reduce(
                [part.committed(checkpoint) if part else np.zeros(len(first.blocks), bool) for part in row]
            )
            for first, row in ((first, self._row(first, checkpoint)) for first in self.segments)
        ]
        return np.concatenate(done)

    def stored(self, checkpoint: str, block: int) -> tuple[npt.NDArray[Any], Float32]:
        """Rows `[n, t, k]` of a block as they are stored, and scales `[n, t]`; without a copy where possible."""
        ((first, number, _, samples),) = self._holding(np.array([self.blocks[block].start]))
        reads = [read for read, _ in self._filled(first, checkpoint, number, samples)]
        sketch, scale = ([read(name) for read in reads] for name in ("sketch", "scale"))
        return (sketch[0], scale[0]) if len(reads) == 1 else (np.concatenate(sketch, 1), np.concatenate(scale, 1))

    def gather(self, checkpoint: str, samples: Samples, *quantities: str) -> list[npt.NDArray[Any]]:
        """Some samples' values of each quantity `[n, ...]`, decoded, from the blocks of all parts, each read once."""
        n, t, k = self.shape
        places = np.array(range(*samples.indices(n)), np.int64) if isinstance(samples, slice) else samples
        order = None if (places[1:] >= places[:-1]).all() else np.argsort(places)
        places = places if order is None else places[order]
        shapes = {"sketch": (t, k), CONTENT: (CONTENT_WORDS,)}
        types = {"timestep": np.int64, CONTENT: np.uint64}
        found: list[npt.NDArray[Any]] = [
            np.empty((len(places), *shapes.get(name, (t,))), types.get(name, np.float32)) for name in quantities
        ]
        done = 0
        for first, number, rows, block in self._holding(places):
            below, column = done + len(rows), 0
            in_a_row = (np.diff(rows) == 1).all()  # read without a copy
            some = slice(rows[0], rows[-1] + 1) if in_a_row else rows
            for read, steps in self._filled(first, checkpoint, number, block):
                for quantity, values in zip(quantities, found, strict=True):
                    out = values[done:below] if quantity == CONTENT else values[done:below, column : column + steps]
                    if quantity == "sketch":
                        decode(read("sketch")[some], read("scale")[some], out=out)
                    else:
                        out[:] = read(quantity)[some]
                column += steps
            done = below
        return found if order is None else [values[np.argsort(order)] for values in found]

    @cached_property
    def _plans(self) -> list[str]:
        return list(dict.fromkeys(part.same_pairs for part in self.parts))

    def _row(self, segment: Part, checkpoint: str) -> list[Part | None]:
        """The parts that hold a checkpoint for the samples of a segment, one per timestep plan."""
        return [self._cells.get((segment.same_samples, plan, checkpoint)) for plan in self._plans]

    def _holding(self, places: Int64) -> Iterator[tuple[Part, int, Int64, slice]]:
        """Blocks that hold some samples, in their order: segment, number in it, rows within the block, the block."""
        offset = 0
        for first in self.segments:
            size = first.meta["block_samples"]
            start, stop = np.searchsorted(places, (offset, offset + first.shape[0]))
            own = places[start:stop] - offset
            for rows in np.split(own, np.flatnonzero(np.diff(own // size)) + 1) if len(own) else ():
                number = int(rows[0]) // size
                block = slice(offset + number * size, offset + min((number + 1) * size, first.shape[0]))
                yield first, number, rows - number * size, block
            offset += first.shape[0]

    def _filled(self, first: Part, checkpoint: str, number: int, samples: slice) -> list[tuple[Read, int]]:
        """For each timestep plan of a committed block, what reads its quantities, and its number of timesteps."""
        found: list[tuple[Read, int]] = []
        for part in self._row(first, checkpoint):
            record = part.record(checkpoint, number) if part else None
            if part is None or record is None:
                raise IncompleteStoreError(
                    f"checkpoint {checkpoint!r}, samples {samples.start} .. {samples.stop - 1} "
                    "are not written yet; repeat the sketch(...) or write_store(...) that began it, it makes only what "
                    "is missing."
                )
            found.append((partial(part.read, checkpoint, block=number, record=record), part.shape[1]))
        return found
