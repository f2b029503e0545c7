"""Products of integers against NumPy's, whatever is left over at the edges of tiles, blocks and lines."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retrac_scale.native.products import BLOCK, multiply_integers


@given(n=st.integers(1, BLOCK + 3), q=st.integers(1, 9), k=st.integers(1, 140), seed=st.integers(0, 99))
def test_sums_of_integers_are_exact_for_every_shape(n: int, q: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(-127, 128, (n, k), dtype=np.int8)
    queries = rng.integers(-900, 901, (q, k), dtype=np.int16)  # sums that float32 holds exactly
    scale, unit = 2.0 ** rng.integers(-3, 4, n).astype(np.float32), 2.0 ** rng.integers(-3, 4, q).astype(np.float32)
    found = np.full((n, q), np.nan, np.float32)
    multiply_integers(rows, queries, scale, unit, found)
    np.testing.assert_array_equal(found, rows.astype(np.int64) @ queries.T.astype(np.int64) * scale[:, None] * unit)


def test_the_largest_sums_that_an_int32_holds_do_not_overflow_or_saturate() -> None:
    k = 2048
    largest = (2**31 - 1) // 127 // k
    rows = np.full((3, k), -127, dtype=np.int8)
    queries = np.array([[largest], [-largest], [largest], [1], [0]], dtype=np.int16).repeat(k, axis=1)
    found = np.empty((3, 5), np.float32)
    multiply_integers(rows, queries, np.ones(3, np.float32), np.ones(5, np.float32), found)
    exact = (rows.astype(np.int64) @ queries.T.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(found, exact)
