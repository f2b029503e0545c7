"""How float rows become stored rows and back: raw = stored x scale."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32
from retrac_scale.native.compiled import compiled
from retrac_scale.native.threads import over_rows

Dtype = Literal["int8", "float16", "float32", "bfloat16"]

TILE_ENTRIES = 2**17
"""16-bit rows are converted so many entries at a time per thread, to stay in a core's cache."""

FAINTEST = 2.0**-141
"""Least scale of an int8 row: a smaller one is too coarse a float32 for the largest entry to come to 127."""

INTEGER_STEP = 1.5 * 2**23
"""float32 numbers near it are the integers; the low byte of such a sum is the int8 that was added."""


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless rows can be stored in `dtype`."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {get_args(Dtype)}, got {dtype!r}.")


def array_dtype(dtype: Dtype) -> str:
    """The array type that holds rows of a dtype: bfloat16 is kept as its bits, since zarr has no such type."""
    return "uint16" if dtype == "bfloat16" else dtype


def encode(rows: Float32, dtype: Dtype) -> tuple[npt.NDArray[Any], Float32]:
    """Stored rows `[..., k]` and their scales `[...]`, one scale per row.

    int8 spreads a row's largest entry to +-127, float16 and bfloat16 (as uint16 bits) to +-1; float32 is stored as it
    is, with scale 1. A zero row has scale 0 (but 1 in float32), and so has one in int8 whose entries are all below
    4.6e-41. A row that is not finite has a scale that is not.
    """
    if dtype == "float32":
        return rows.astype(np.float32, copy=False), np.ones(rows.shape[:-1], np.float32)
    given = np.ascontiguousarray(rows, np.float32).reshape(-1, rows.shape[-1])
    stored = np.empty(given.shape, array_dtype(dtype))
    scale = np.empty(len(given), np.float32)
    if dtype == "int8":
        over_rows(lambda part: _to_int8(given[part], stored[part], scale[part]), len(given), given.nbytes)
    else:
        _to_half(given, stored, scale)
    return stored.reshape(rows.shape), scale.reshape(rows.shape[:-1])


def decode(rows: npt.NDArray[Any], scale: Float32, out: Float32 | None = None) -> Float32:
    """Raw float32 rows `[..., k]`, into `out` when it is given."""
    values = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
    raw: Float32 = np.multiply(values, scale[..., None], out=out, dtype=np.float32)
    return raw


@compiled
def _to_int8(rows: Any, stored: Any, scale: Any) -> None:
    """Rows `[n, k]`; a row's divisions hide the time in which the next row comes from memory to be measured."""
    n, k = rows.shape
    top = np.float32(0)
    for row in range(-1, n):
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


def _to_half(rows: Float32, stored: npt.NDArray[Any], scale: Float32) -> None:
    """Rows `[n, k]` to float16 or to the bits of bfloat16."""
    import torch  # takes seconds, which reading has no use for
    from torch.utils.dlpack import from_dlpack

    step = max(1, TILE_ENTRIES * torch.get_num_threads() // rows.shape[1])
    for start in range(0, len(rows), step):
        tile = slice(start, start + step)
        values = from_dlpack(rows[tile])
        scales = torch.amax(values.abs(), 1)
        units = values / torch.where(scales > 0, scales, 1.0)[:, None]
        scale[tile] = scales
        if stored.dtype == np.uint16:
            stored[tile] = _bfloat16_bits(units.numpy())
        else:
            torch.from_numpy(stored[tile]).copy_(units)


def _bfloat16_bits(values: Float32) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even, alike on every CPU."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return rounded.astype(np.uint16)
