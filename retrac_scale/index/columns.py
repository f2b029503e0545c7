"""The user's columns in an index: numbers as they are, texts as codes of their sorted distinct values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.columns import Column, Texts
from retrac_scale.store.schema import get_array, get_group, new_array


def write_column(root: zarr.Group, name: str, values: npt.NDArray[Any]) -> None:
    """Write a column `[n]` of an index, in one chunk."""
    group = root.require_group("column")
    if values.dtype.kind in "biuf":
        write_list(group, name, values)
        return
    texts = Texts.of(values)
    write_list(group, f"{name}/value", texts.values)
    write_list(group, f"{name}/code", texts.codes)


def read_column(root: zarr.Group, name: str, some: slice = slice(None)) -> Column:
    """A column of an index, or of some of its samples; those of earlier releases hold texts as they are."""
    group = get_group(root, "column")
    if name in group.array_keys():
        values = np.asarray(get_array(group, name)[some])
        return values if values.dtype.kind in "biuf" else Texts.of(values)
    stored, codes = (np.asarray(get_array(group, f"{name}/{part}")[some]) for part in ("value", "code"))
    return Texts(np.array(stored.tolist(), dtype=str), codes)


def column_names(root: zarr.Group) -> list[str]:
    """Names of an index's columns, sorted."""
    group = get_group(root, "column")
    return sorted([*group.array_keys(), *group.group_keys()])


def write_list(group: zarr.Group, name: str, values: npt.NDArray[Any], size: int | None = None) -> None:
    """Write an array `[n]` of numbers or texts in chunks of so many entries, or in one."""
    plain = values.dtype.kind in "biuf"
    dtype = values.dtype if plain else "string"
    length = size or max(1, len(values))
    new_array(group, name, shape=values.shape, chunks=(length,), dtype=dtype, dims=["sample"])[:] = (
        values if plain else values.astype(object)
    )
