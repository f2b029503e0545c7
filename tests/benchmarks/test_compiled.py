"""Compiled passes compute what plain torch computes, also where nothing is a whole tile."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import compiled


@pytest.mark.parametrize(
    ("ways", "tolerance"),
    [
        (compiled.linear(2, 20, 12), 1e-5),
        (compiled.convolution(2, 5, 4), 1e-5),
        (compiled.formed(3, 5000), 1e-5),
        (compiled.norms(2, 4, 16), 1e-5),
        (compiled.encoding(9, 100), 1 / 127),
        (compiled.scan(1, 43, 100), 0.02),
        (compiled.scan(7, 43, 100), 0.02),
        (compiled.again(50, 70), 1e-12),
    ],
    ids=["linear", "convolution", "formed", "norms", "encoding", "a query", "queries", "again"],
)
def test_a_compiled_pass_computes_what_plain_torch_does(ways: Any, tolerance: float) -> None:
    compiled.check(ways, tolerance)
