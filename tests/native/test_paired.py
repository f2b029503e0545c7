"""Products of bytes by pairs against NumPy's, at the edges of registers, tiles, blocks and steps, and of 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrac_scale.native.int8 import FOUR
from retrac_scale.native.paired import AVAILABLE, BLOCK, MOST, WIDEST, meeting, multiply_paired, packed

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this CPU has no such instructions")


@given(n=st.integers(1, BLOCK + 9), q=st.integers(1, 70), k=st.integers(1, 200), seed=st.integers(0, 99))
def test_sums_of_pairs_are_exact_for_every_shape(n: int, q: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, queries = rng.integers(-128, 128, (n, k), dtype=np.int8), rng.integers(-32, 33, (q, k), dtype=np.int8)
    scale, unit = (2.0 ** rng.integers(-3, 4, count).astype(np.float32) for count in (n, q))
    found = np.full((n, q), np.nan, np.float32)
    multiply_paired(rows, *packed(queries), scale, unit, found)
    np.testing.assert_array_equal(found, rows.astype(np.int64) @ queries.T.astype(np.int64) * scale[:, None] * unit)


@pytest.mark.parametrize("row", [-128, 127])
@pytest.mark.parametrize("entries", [[MOST - 1, 1, 0, 0], [0, 0, 127, 1], [32, 32, 32, 32], [-MOST, 0, 0, 0]])
def test_the_largest_entries_that_may_meet_fill_sixteen_bits_and_no_more(row: int, entries: list[int]) -> None:
    k = 48
    queries = np.zeros((1, k), np.int8)
    queries[0, [0, 1, FOUR, FOUR + 1]] = entries  # of two fours, the first halves meet
    assert meeting(queries.astype(np.float64)).tolist() == [MOST]
    found = np.empty((1, 1), np.float32)
    multiply_paired(np.full((1, k), row, np.int8), *packed(queries), *np.ones((2, 1), np.float32), found)
    assert found.item() == row * sum(entries)


@given(q=st.integers(1, 5), k=st.integers(1, 60), seed=st.integers(0, 99))
def test_what_meets_is_found_one_by_one(q: int, k: int, seed: int) -> None:
    queries = np.random.default_rng(seed).standard_normal((q, k))

    def most(query: Any) -> float:
        sums = []
        for start in range(0, k, 2 * FOUR):
            for half in (0, 2):
                those = [query[start + at + half : start + at + half + 2] for at in (0, FOUR)]
                one = np.concatenate(those)
                sums += [one[one > 0].sum(), -one[one < 0].sum()]
        return float(max(sums))

    np.testing.assert_allclose(meeting(queries), [most(query) for query in queries], rtol=1e-12)


def test_sums_of_the_widest_rows_stay_within_an_int32() -> None:
    rows, queries = np.full((2, WIDEST), 127, np.int8), np.full((1, WIDEST), MOST // 4, np.int8)
    rows[1] = -128
    found = np.empty((2, 1), np.float32)
    multiply_paired(rows, *packed(queries), np.ones(2, np.float32), np.ones(1, np.float32), found)
    assert found[:, 0].tolist() == [127 * MOST // 4 * WIDEST, -128 * MOST // 4 * WIDEST]
