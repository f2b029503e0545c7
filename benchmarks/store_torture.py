"""Many more kills than the test: python -m benchmarks.store_torture [kills] [seed]"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.torture import measure_fill, torture

if __name__ == "__main__":
    kills, seed = (
        (int(value) for value in (*sys.argv[1:], "1000", "0")[:2]) if len(sys.argv) != 2 else (int(sys.argv[1]), 0)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = measure_fill(folder)
        print(f"one uninterrupted run: {whole:.2f} s")
        killed, finished = torture(folder, kills, seed, longest_s=whole / 3)
        print(f"{killed} kills, {finished} stores finished through them, all identical to an uninterrupted one")
