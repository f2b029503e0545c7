"""The compiled pass that makes int8 rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32
from retrac_scale.native.compiled import compiled
from retrac_scale.native.threads import over_rows

FAINTEST = 2.0**-141
"""Least scale of an int8 row: a smaller one is too coarse a float32 for the largest entry to come to 127."""

INTEGER_STEP = 1.5 * 2**23
"""float32 numbers near it are the integers; the low byte of such a sum is the int8 that was added."""


def to_int8(rows: Float32, stored: npt.NDArray[np.int8], scale: Float32) -> None:
    """Spread each row's largest entry to +-127: rows `[n, k]` to stored ones and their scales `[n]`."""
    over_rows(lambda part: _to_int8(rows[part], stored[part], scale[part]), len(rows), rows.nbytes)


@compiled
def _to_int8(rows: Any, stored: Any, scale: Any) -> None:
    """Rows `[n, k]`; a row's divisions hide the time in which the next row comes from memory to be measured."""
    n, k = rows.shape
    top = np.float32(0)
    for row in range(-1 if n > 0 else 0, n):
        following = rows[min(row + 1, n - 1)]
        step = top / np.float32(127)
        bits = np.int32(0)
        if row < 0:
            for place in range(k):
                bits = max(bits, _magnitude(following[place]))
        else:
            scale[row] = step if not step < FAINTEST else 0
            given, integers = rows[row], stored[row]
            for place in range(k):
                integers[place] = _nearest(given[place] / step)
                bits = max(bits, _magnitude(following[place]))
            if step < FAINTEST:
                integers[:] = 0
        top = _float(bits)


@compiled
def _nearest(quotient: Any) -> Any:
    """The integer, in a float32's low byte."""
    return np.float32(quotient + np.float32(INTEGER_STEP)).view(np.int32) & np.int32(0xFF)


@compiled
def _magnitude(value: Any) -> Any:
    """Of a float32, as an integer that orders like it; NaN comes last."""
    return np.float32(value).view(np.int32) & np.int32(0x7FFFFFFF)


@compiled
def _float(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)
