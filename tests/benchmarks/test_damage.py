"""Damage to a store that grew and to its indexes is named, or serves no read."""

from __future__ import annotations

import pytest

from benchmarks import damage


@pytest.mark.filterwarnings("ignore")
def test_random_damages_are_named_or_harmless() -> None:
    for kind, counts in damage.run(count=12, first=0).items():
        assert counts.keys() <= {"named", "harmless", "nothing changed", "seen by verify"}, kind
        assert counts["named"] > 6
