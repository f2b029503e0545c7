"""How float rows become stored rows and back: raw = stored x scale."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Dtype = Literal["int8", "float16", "float32", "bfloat16"]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

TILE_ENTRIES = 2**17
"""Rows are converted so many entries at a time per thread, to stay in a core's cache."""

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
    stored = np.empty(rows.shape, array_dtype(dtype))
    k = rows.shape[-1]
    source = from_dlpack(np.ascontiguousarray(rows, np.float32).reshape(-1, k))
    target = torch.from_numpy(stored.view(np.int16) if dtype == "bfloat16" else stored).view(-1, k)
    scale = torch.empty(len(source))
    top = torch.tensor(127.0 if dtype == "int8" else 1.0)
    integers = torch.full((k,), INTEGER_STEP)
    step = max(1, TILE_ENTRIES * torch.get_num_threads() // k)
    unit = torch.empty(min(step, len(source)), k)
    for start in range(0, len(source), step):
        tile = slice(start, min(start + step, len(source)))
        values, scales, units = source[tile], scale[tile], unit[: tile.stop - start]
        torch.div(torch.abs(values, out=units).amax(1), top, out=scales)
        if dtype == "int8":  # divided and rounded in one pass; of the NaN of a zero row the low byte is 0
            target[tile] = torch.addcdiv(integers, values, scales[:, None], out=units).view(torch.int32)
        else:
            torch.div(values, torch.where(scales > 0, scales, 1.0)[:, None], out=units)
            target[tile] = _bfloat16_bits(units) if dtype == "bfloat16" else units
    if dtype == "int8" and (faint := (scale > 0) & (scale < FAINTEST)).any():
        target[faint], scale[faint] = 0, 0
    return stored, scale.numpy().reshape(rows.shape[:-1])


def decode(rows: npt.NDArray[Any], scale: Float32, out: Float32 | None = None) -> Float32:
    """Raw float32 rows `[..., k]`, into `out` when it is given."""
    values = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
    raw: Float32 = np.multiply(values, scale[..., None], out=out, dtype=np.float32)
    return raw


def _bfloat16_bits(values: Tensor) -> Tensor:
    """The upper 16 bits as int16, rounded to nearest, ties to even, alike on every CPU."""
    bits = values.numpy().view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return torch.from_numpy(rounded.view(np.int16))
