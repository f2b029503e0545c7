"""A scan by bit planes finds what the package's scan does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import bit_planes
from retrac_scale.native.compiled import has

WAYS = [bit_planes.by_int16, *([bit_planes.by_vnni] if has("avx512vnni") else [])]


@pytest.mark.parametrize("multiply", WAYS, ids=["int16", "VNNI"][: len(WAYS)])
def test_the_best_by_planes_are_the_best(multiply: Any) -> None:
    rng = np.random.default_rng(2)
    rows = rng.integers(-127, 128, (9001, 128), dtype=np.int8)
    queries = (rows[:3] + rng.normal(0, 50, (3, 128))).astype(np.float32)
    held = bit_planes.Held.of(rows, 1)
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        found, read = held.in_planes(query, 10, multiply)
        np.testing.assert_array_equal(found, held.plain(query, 10))
        assert read < len(rows)
