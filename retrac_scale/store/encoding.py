"""How float rows become stored rows and back: raw = stored x scale."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Dtype = Literal["int8", "float16", "float32"]
Float32 = npt.NDArray[np.float32]


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless rows can be stored in `dtype`."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {get_args(Dtype)}, got {dtype!r}.")


def encode(rows: Float32, dtype: Dtype) -> tuple[npt.NDArray[Any], Float32]:
    """Stored rows `[..., k]` and their scales `[...]`, one scale per row.

    int8 spreads a row's largest entry to +-127, float16 to +-1; float32 is stored as it is, with scale 1. A zero row
    has scale 0 (int8, float16).
    """
    if dtype == "float32":
        return rows.astype(np.float32, copy=False), np.ones(rows.shape[:-1], np.float32)
    top = np.float32(127 if dtype == "int8" else 1)
    scale = (np.abs(rows).max(-1) / top).astype(np.float32)
    unit = rows / np.where(scale > 0, scale, np.float32(1))[..., None]
    return (np.rint(unit) if dtype == "int8" else unit).astype(dtype), scale


def decode(rows: npt.NDArray[Any], scale: Float32) -> Float32:
    """Raw float32 rows."""
    raw: Float32 = rows.astype(np.float32) * scale[..., None]
    return raw
