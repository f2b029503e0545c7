"""A store of format version 1, kept as it was written: every later release must read it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import retrac_scale as rs
from retrac_scale.store import Layout, verify_store

FIXTURE = Path(__file__).parents[1] / "data" / "store-v1.zarr"


def write(path: Path) -> rs.SketchStore:
    """How the fixture was made: python -m tests.store.test_fixture PATH."""
    n, t, k = 9, 2, 8
    raw = np.arange(n * t * k, dtype=np.float32).reshape(n, t, k) - 70
    return rs.write_store(
        path,
        {"early": raw, "late": -2 * raw},
        losses={"early": raw[..., 0], "late": raw[..., 1]},
        timesteps=[10, 900],
        ids=[f"scan-{i}" for i in range(n)],
        weights=[0.25, 0.5],
        columns={"label": np.arange(n) % 3, "kept": np.arange(n) > 2},
        layout=Layout(4),
    )


def test_a_store_of_format_1_opens_and_says_what_was_written(tmp_path: Path) -> None:
    stored, now = rs.open_store(FIXTURE), write(tmp_path / "now")
    assert stored.meta["format"] == 1
    assert verify_store(FIXTURE).is_whole
    assert stored.ids.tolist() == now.ids.tolist()
    assert stored.weights == {"early": 0.25, "late": 0.5}
    assert stored.columns["label"].tolist() == now.columns["label"].tolist()
    assert stored.columns["kept"].tolist() == now.columns["kept"].tolist()
    assert stored.alive.tolist() == [True] * 8 + [False]  # scan-8 was deleted when the fixture was made
    for name in ("early", "late"):
        np.testing.assert_array_equal(stored.sketches(name), now.sketches(name))
        np.testing.assert_array_equal(stored.norms(name), now.norms(name))
        np.testing.assert_array_equal(stored.losses(name), now.losses(name))
        assert stored.timesteps(name).tolist() == [[10, 900]] * 9


if __name__ == "__main__":
    write(Path(sys.argv[1])).delete(["scan-8"])
