"""Images in memory, with what a model is told of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """A dataset in memory; ids may begin with a word: noise of one's own depends on the id, and queries have their own.

    Attributes:
        images: pixels in -1 .. 1, or latents, `[n, c, size, size]`.
        word: None for ids 0 .. n-1.
        given: what else the model is told of each, {name: `[n, ...]`}.
    """

    images: Tensor
    word: str | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        told = {name: values[row] for name, values in self.given.items()}
        return (self.images[row], told) if told else self.images[row]

    @property
    def ids(self) -> list[Any]:
        """Sample ids."""
        return list(range(len(self))) if self.word is None else [f"{self.word}-{row}" for row in range(len(self))]

    @property
    def digest(self) -> str:
        """Of pixels and of what is given, BLAKE2b, 12 bytes in hex."""
        made = hashlib.blake2b(digest_size=12)
        for values in (self.images, *self.given.values()):
            made.update(values.numpy().tobytes())
        return made.hexdigest()

    def some(self, rows: Any, word: str | None = None) -> Images:
        """Those of a slice, mask or list, renumbered."""
        given = {name: values[rows] for name, values in self.given.items()}
        return replace(self, images=self.images[rows], word=word, given=given)


def joined(parts: Sequence[Images]) -> Images:
    """One after the other, renumbered."""
    given = {name: torch.cat([part.given[name] for part in parts]) for name in parts[0].given}
    return Images(torch.cat([part.images for part in parts]), given=given)
