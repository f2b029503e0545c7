"""The parts of a store side by side: which of them holds what, and values put together from their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32
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
        ((first, number, _, samples),) = self._overlapping(self.blocks[block])
        reads = [read for read, _ in self._filled(first, checkpoint, number, samples)]
        sketch, scale = ([read(name) for read in reads] for name in ("sketch", "scale"))
        return (sketch[0], scale[0]) if len(reads) == 1 else (np.concatenate(sketch, 1), np.concatenate(scale, 1))

    def gather(self, checkpoint: str, samples: slice, *quantities: str) -> list[npt.NDArray[Any]]:
        """Some samples' values of each quantity `[n, ...]`, decoded, from the blocks of all parts."""
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

    @cached_property
    def _plans(self) -> list[str]:
        return list(dict.fromkeys(part.same_pairs for part in self.parts))

    def _row(self, segment: Part, checkpoint: str) -> list[Part | None]:
        """The parts that hold a checkpoint for the samples of a segment, one per timestep plan."""
        return [self._cells.get((segment.same_samples, plan, checkpoint)) for plan in self._plans]

    def _overlapping(self, samples: slice) -> Iterator[tuple[Part, int, slice, slice]]:
        """Blocks that hold some of the samples: segment, number in it, rows within the block, the whole block."""
        offset = 0
        for first in self.segments:
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
                    "are not written yet; repeat the sketch(...) or write_store(...) that began it, it makes only what "
                    "is missing."
                )
            found.append((partial(part.read, checkpoint, block=number, record=record), part.shape[1]))
        return found
