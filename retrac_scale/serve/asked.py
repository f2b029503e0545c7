"""What is asked about: a stored query, a training sample, or an upload, measured and remembered for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from retrac_scale.serve.uploads import Upload
from retrac_scale.store import SketchStore

Source = Literal["queries", "training", "uploads"]
Sketches = Mapping[str, SketchStore]
"""{index: sketches like its store}."""


@dataclass(frozen=True, eq=False)
class Measured:
    """An upload and its sketches, one after the other those of each of `upload.pieces`."""

    upload: Upload
    pieces: Sequence[Sketches]

    def __len__(self) -> int:
        """How many sketches an index's store has of it: of views nine."""
        return len(self.upload.views) or 1

    def of(self, index: str) -> list[SketchStore]:
        """Those for one index."""
        return [piece[index] for piece in self.pieces]


@dataclass(frozen=True)
class Asked:
    """A query by its place: where it comes from, and its id there; an upload that is being answered, itself."""

    source: Source
    id: str
    upload: Measured | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        """How many queries it is to a scan: in views nine."""
        return 1 if self.upload is None else len(self.upload)


class Uploads(OrderedDict[str, Measured]):
    """{key: upload}, the last used last, of which the first are forgotten.

    Args:
        most: how many sketches are kept; of one upload all, whatever their number.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def of(self, asked: Asked) -> Measured:
        """What an upload's key stands for; ValueError once it is forgotten."""
        kept = asked.upload or self.get(asked.id)
        if kept is None:
            raise ValueError(f"the upload {asked.id!r} is no longer remembered; send it again.")
        return kept

    def views(self, asked: Asked) -> tuple[str, ...]:
        """In which a query of any source is asked about."""
        return self.of(asked).upload.views if asked.source == "uploads" else ()

    def keep(self, measured: Measured) -> None:
        """Remember an upload, and forget others for it."""
        self[measured.upload.key] = measured
        while len(self) > 1 and sum(map(len, self.values())) > self.most:
            self.popitem(last=False)
