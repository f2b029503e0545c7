"""Products of bytes against NumPy's, whatever is left over at the edges of registers, tiles, blocks and steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrac_scale.native.int8 import AVAILABLE, BLOCK, multiply_one, multiply_several, packed

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this CPU has no such instructions")


@given(n=st.integers(1, BLOCK + 9), q=st.integers(1, 130), k=st.integers(1, 200), seed=st.integers(0, 99))
def test_sums_of_bytes_are_exact_for_every_shape(n: int, q: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, queries = (rng.integers(-128, 128, (count, k), dtype=np.int8) for count in (n, q))
    scale, unit = (2.0 ** rng.integers(-3, 4, count).astype(np.float32) for count in (n, q))
    found = np.full((n, q), np.nan, np.float32)
    multiply_several(rows, *packed(queries), scale, unit, found)
    np.testing.assert_array_equal(found, rows.astype(np.int64) @ queries.T.astype(np.int64) * scale[:, None] * unit)


@given(n=st.integers(1, 11), k=st.integers(1, 200), seed=st.integers(0, 99))
def test_sums_of_one_query_are_exact_for_every_shape(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, query = rng.integers(-128, 128, (n, k), dtype=np.int8), rng.integers(-128, 128, k, dtype=np.int8)
    scale = 2.0 ** rng.integers(-3, 4, n).astype(np.float32)
    found = np.full(n, np.nan, np.float32)
    multiply_one(rows, query, scale, np.float32(0.5), found)
    np.testing.assert_array_equal(found, rows.astype(np.int64) @ query.astype(np.int64) * scale * 0.5)


@pytest.mark.parametrize("q", [1, 17, 70])
def test_sums_that_pass_an_int32_on_the_way_come_back(q: int) -> None:
    k = (2**31 - 1) // 127**2
    rows, queries = np.full((3, k), 127, np.int8), np.full((q, k), 127, np.int8)
    rows[1] = -127
    found = np.empty((3, q), np.float32)
    multiply_several(rows, *packed(queries), np.ones(3, np.float32), np.ones(q, np.float32), found)
    alone = np.empty(3, np.float32)
    multiply_one(rows, queries[0], np.ones(3, np.float32), np.float32(1), alone)
    exact = rows.astype(np.float64) @ queries.T.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=2.0**-23)
    np.testing.assert_allclose(alone, exact[:, 0], rtol=2.0**-23)
