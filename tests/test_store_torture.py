"""A writer killed at any instant leaves a store that the next one finishes, bit for bit."""

from __future__ import annotations

from pathlib import Path

from tests.torture import measure_fill, torture


def test_a_store_written_through_30_kills_is_identical_to_an_uninterrupted_one(tmp_path: Path) -> None:
    longest = max(0.05, measure_fill(tmp_path) / 4)  # a few kills per store, and many stores
    killed, finished = torture(tmp_path, 30, seed=0, longest_s=longest)
    assert killed >= 30
    assert finished >= 1
