"""The ridges of an index that queries carry: their inverses, written once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import zarr

from retrac_scale.estimators.ridge import Ridge
from retrac_scale.index.segments import RIDGE
from retrac_scale.store.mapping import crc32c
from retrac_scale.store.schema import digest_of, get_array, new_array


def write_ridges(root: zarr.Group, ridges: Mapping[str, Sequence[Ridge]]) -> str | None:
    """Write the inverses of each checkpoint's ridges, float64 `[c, part, k, k]`; their name, None where samples carry
    them."""
    every = [list(own) for own in ridges.values()]
    if not every or not every[0][0].by_queries:
        return None
    told = [[ridge.describe(), crc32c(ridge.factors[0])] for own in every for ridge in own]
    name, k = digest_of(json.dumps(told).encode())[:8], len(every[0][0].factors[0])
    dims, shape = ["checkpoint", "part", "k", "l"], (len(every), len(every[0]), k, k)
    nan = float("nan")
    array = new_array(
        root, f"{RIDGE}/{name}", shape=shape, chunks=(1, 1, k, k), dtype="float64", dims=dims, fill_value=nan
    )
    for checkpoint, own in enumerate(every):
        for part, ridge in enumerate(own):
            array[checkpoint, part] = ridge.factors[0]
    return name


def read_ridges(
    root: zarr.Group, meta: Mapping[str, Any], fetch: Callable[[zarr.Array[Any], tuple[int, ...]], npt.NDArray[Any]]
) -> dict[str, list[Ridge]]:
    """For each checkpoint the ridges that queries carry; none where samples carry them, or there are none.

    Args:
        root: the index's group.
        meta: its description.
        fetch: gives a chunk of an array by its place.
    """
    if not meta.get(RIDGE):
        return {}
    array = get_array(root, f"{RIDGE}/{meta[RIDGE]}")
    found: dict[str, list[Ridge]] = {}
    for checkpoint, name in enumerate(meta["checkpoints"]):
        told = meta["fit"][name]
        every = told if isinstance(told, list) else [told]
        inverses = [fetch(array, (checkpoint, part, 0, 0))[0, 0] for part in range(len(every))]
        found[name] = [
            Ridge(one["rows"], one["damping"], one["lambda"], (inverse,), by_queries=True)
            for one, inverse in zip(every, inverses, strict=True)
        ]
    return found
