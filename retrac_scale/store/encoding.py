"""How float rows become stored rows and back: raw = stored x scale."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32

Dtype = Literal["int8", "float16", "float32", "bfloat16"]

TILE_ENTRIES = 2**17
"""16-bit rows are converted so many entries at a time per thread, to stay in a core's cache."""


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
        from retrac_scale.store.rounding import to_int8  # numba takes a second, which reading has no use for

        to_int8(given, stored, scale)
    else:
        _to_half(given, stored, scale)
    return stored.reshape(rows.shape), scale.reshape(rows.shape[:-1])


def decode(rows: npt.NDArray[Any], scale: Float32, out: Float32 | None = None) -> Float32:
    """Raw float32 rows `[..., k]`, into `out` when it is given."""
    values = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
    raw: Float32 = np.multiply(values, scale[..., None], out=out, dtype=np.float32)
    return raw


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
