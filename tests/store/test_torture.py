"""A writer killed at any instant leaves a store that the next one finishes, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = """
import sys
from pathlib import Path
from tests.torture import measure_fill, torture
folder = Path(sys.argv[1])
longest = max(0.05, measure_fill(folder) / 4)  # a few kills per store, and many stores
killed, finished = torture(folder, 30, seed=0, longest_s=longest)
assert killed >= 30
assert finished >= 1
"""


@pytest.mark.slow
def test_a_store_written_through_30_kills_is_identical_to_an_uninterrupted_one(tmp_path: Path) -> None:
    """In a process of its own, with one thread: writers are forked, and a fork has no threads of its parent's."""
    subprocess.run(
        [sys.executable, "-c", TORTURE, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
