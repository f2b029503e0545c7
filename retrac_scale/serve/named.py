"""Samples by the text of their ids, as requests name them."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrac_scale.arrays import Bools
from retrac_scale.columns import Places

SEARCHED = 2**16
"""Ids whose texts are made at a time when some are searched for."""


class Named:
    """Samples of an index or a store, found without a table of all their names.

    Args:
        places: of all ids.
        alive: which of them there are, `[n]`; None for all.
    """

    def __init__(self, places: Places, alive: Bools | None = None) -> None:
        self._places, self._alive = places, alive
        self._numbers = places.ids.dtype.kind in "iu"

    def id(self, name: str) -> Any:
        """The id that a text stands for, whether there is such a sample or not; None where it can be none."""
        if not self._numbers:
            return name
        try:
            number = int(name)
        except ValueError:
            return None
        return number if str(number) == name else None

    def place(self, name: str) -> int:
        """Where a sample stands; -1 where there is none of that name."""
        wanted = self.id(name)
        place = -1 if wanted is None else int(self._places.find([wanted])[0])
        return place if place >= 0 and (self._alive is None or self._alive[place]) else -1

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.place(name) >= 0

    def containing(self, text: str, count: int) -> list[str]:
        """The first names that contain a text."""
        found: list[str] = []
        ids = self._places.ids
        for start in range(0, len(ids), SEARCHED):
            some = slice(start, start + SEARCHED)
            names = ids[some] if self._alive is None else ids[some][self._alive[some]]
            names = names.astype(str)
            found += names[np.char.find(names, text) >= 0][: count - len(found)].tolist()
            if len(found) == count:
                break
        return found
