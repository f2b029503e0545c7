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
from tests.torture import contents, fill, measure_fill, stream, streamed, torture
folder = Path(sys.argv[1])
fill, contents = {"blocks": (fill, contents), "stream": (stream, streamed)}[sys.argv[2]]
longest = max(0.05, measure_fill(folder, fill) / 4)  # a few kills per store, and many stores
kills = int(sys.argv[3])
killed, finished = torture(folder, kills, seed=0, longest_s=longest, fill=fill, contents=contents)
assert killed >= kills
assert finished >= 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kills"), [("blocks", 30), ("stream", 8)])
def test_a_store_written_through_many_kills_is_that_of_an_uninterrupted_run(
    how: str, kills: int, tmp_path: Path
) -> None:
    """In a process of its own, with one thread: writers are forked, and a fork has no threads of its parent's."""
    subprocess.run(
        [sys.executable, "-c", TORTURE, str(tmp_path), how, str(kills)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
