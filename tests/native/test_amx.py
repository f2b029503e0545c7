"""Products of matrices of bytes against NumPy's, whatever is left over at the edges of registers, blocks and lines."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrac_scale.native import amx
from retrac_scale.native.amx import BLOCK, SIDE, multiply_pieces, packed

pytestmark = pytest.mark.skipif(not amx.AVAILABLE, reason="this CPU has no such instructions")


def products(rows: np.ndarray, queries: np.ndarray, scale: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """By the pass, `[n, q]`; what stands around them stays."""
    n, q = len(rows), len(queries)
    found = np.full((n + 2, q), np.nan, np.float32)
    multiply_pieces(rows, packed(queries), scale, np.pad(unit, (0, -q % SIDE)), found[1:-1])
    assert np.isnan(found[[0, -1]]).all()
    return found[1:-1]


@given(n=st.integers(1, 2 * BLOCK + 9), q=st.integers(1, 70), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_sums_of_matrices_are_exact_for_every_shape(n: int, q: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, queries = (rng.integers(-128, 128, (count, k), dtype=np.int8) for count in (n, q))
    scale, unit = (2.0 ** rng.integers(-3, 4, count).astype(np.float32) for count in (n, q))
    exact = rows.astype(np.int64) @ queries.T.astype(np.int64) * scale[:, None] * unit
    np.testing.assert_array_equal(products(rows, queries, scale, unit), exact)


def test_the_largest_sums_of_an_int32_are_reached() -> None:
    k = (2**31 - 1) // 127**2
    rows, queries = np.full((3, k), 127, np.int8), np.full((17, k), 127, np.int8)
    rows[1] = -127
    exact = rows.astype(np.float64) @ queries.T.astype(np.float64)
    np.testing.assert_allclose(products(rows, queries, *np.ones((2, 17), np.float32)), exact, rtol=2.0**-23)


def test_threads_have_registers_of_their_own() -> None:
    rng = np.random.default_rng(0)
    rows, queries = (rng.integers(-128, 128, (count, 2048), dtype=np.int8) for count in (200, 40))
    ones = np.ones(200, np.float32)
    expected = rows.astype(np.int64) @ queries.T.astype(np.int64)
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(30):
            here = slice(number, number + 150)
            if not np.array_equal(products(rows[here], queries, ones[here], ones[:40]), expected[here]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
