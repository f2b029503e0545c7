"""How float rows become stored rows and back: raw = stored x scale."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Dtype = Literal["int8", "float16", "float32", "bfloat16"]
Float32 = npt.NDArray[np.float32]

TILE_ENTRIES = 2**17
"""Rows are converted so many entries at a time, to stay in cache."""


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
    is, with scale 1. A zero row has scale 0 (but 1 in float32).
    """
    if dtype == "float32":
        return rows.astype(np.float32, copy=False), np.ones(rows.shape[:-1], np.float32)
    flat = rows.reshape(-1, rows.shape[-1])
    stored = np.empty(flat.shape, array_dtype(dtype))
    scale = np.empty(len(flat), np.float32)
    top = np.float32(127 if dtype == "int8" else 1)
    step = max(1, TILE_ENTRIES // flat.shape[1])
    unit_tile = np.empty((step, flat.shape[1]), np.float32)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        largest = np.maximum(flat[part].max(1), -flat[part].min(1))
        scale[part] = largest / top
        divisor = np.where(scale[part] > 0, scale[part], np.float32(1)).astype(np.float32)
        unit: Float32 = np.divide(flat[part], divisor[:, None], out=unit_tile[: len(divisor)])
        if dtype == "int8":
            np.rint(unit, out=unit)
        np.copyto(stored[part], _bfloat16_bits(unit) if dtype == "bfloat16" else unit, casting="unsafe")
    return stored.reshape(rows.shape), scale.reshape(rows.shape[:-1])


def decode(rows: npt.NDArray[Any], scale: Float32, out: Float32 | None = None) -> Float32:
    """Raw float32 rows `[..., k]`, into `out` when it is given."""
    values = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
    raw: Float32 = np.multiply(values, scale[..., None], out=out, dtype=np.float32)
    return raw


def _bfloat16_bits(values: Float32) -> npt.NDArray[np.uint16]:
    """The upper 16 bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
