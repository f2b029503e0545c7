"""Damage to a store that grew and to its indexes is named, or serves no read."""

from __future__ import annotations

import sys

import pytest

from benchmarks import damage


def test_random_damages_are_named_or_harmless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["damage", "--count", "12"])
    with pytest.raises(SystemExit) as end:
        damage.main()
    assert end.value.code == 0
    store, indexes = capsys.readouterr().out.splitlines()
    assert "named" in store
    assert "named" in indexes
