"""The user's columns in an index: numbers as they are, texts as codes of their sorted distinct values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.columns import Column, Texts, joined
from retrac_scale.store.schema import get_array, get_group, new_array

PARTS = ("text", "end", "code")
"""Arrays of a column of texts, see `Texts`."""
Fetch = Callable[[zarr.Array[Any]], npt.NDArray[Any]]


def write_column(root: zarr.Group, name: str, parts: Iterable[npt.NDArray[Any]]) -> None:
    """Write a column `[n]` of an index, given in parts, in one chunk."""
    group = root.require_group("column")
    read: list[Column] = [values if values.dtype.kind in "biuf" else Texts.of(values) for values in parts]
    column = joined(read)
    if not isinstance(column, Texts):
        write_list(group, name, column)
        return
    arrays: list[npt.NDArray[Any]] = [column.text, column.ends, column.codes]
    for part, array in zip(PARTS, arrays, strict=True):
        write_list(group, f"{name}/{part}", array)


def read_column(root: zarr.Group, name: str, fetch: Fetch) -> Column:
    """A column of an index; those of earlier releases hold texts as they are, or their values so.

    Args:
        root: of the index, or of its segment.
        name: the column's.
        fetch: reads an array of numbers.
    """
    group = get_group(root, "column")
    if name in group.array_keys():
        array = get_array(group, name)
        return fetch(array) if array.dtype.kind in "biuf" else Texts.of(np.asarray(array[:]))
    inner = get_group(group, name)
    if "value" in inner.array_keys():
        values = np.asarray(get_array(inner, "value")[:]).tolist()
        return Texts.coded([value.encode() for value in values], fetch(get_array(inner, "code")))
    text, ends, codes = (fetch(get_array(inner, part)) for part in PARTS)
    return Texts(text, ends, codes)


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
