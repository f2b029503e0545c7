"""Compiled passes over sorted texts, in UTF-8 and one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrac_scale.native.compiled import compiled


@compiled
def merge(text: Any, ends: Any, others: Any, other_ends: Any, out: Any) -> None:
    """Of each of some texts, twice the number of others before it, less one where it is none of them, into `[v]`.

    Both are sorted and distinct; so twice the place of another compares with that as the texts do.
    """
    place, start = 0, 0
    for number in range(len(ends)):
        stop, order = ends[number], 1
        while place < len(other_ends):
            first, last = other_ends[place - 1] if place else 0, other_ends[place]
            order = 0
            for step in range(min(stop - start, last - first)):
                order = int(np.int64(others[first + step]) - np.int64(text[start + step]))  # not of bytes, which wrap
                if order:
                    break
            if not order:
                order = (last - first) - (stop - start)
            if order >= 0:
                break
            place += 1
        out[number] = 2 * place - (order != 0 or place == len(other_ends))
        start = stop
