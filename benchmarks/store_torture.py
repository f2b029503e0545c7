"""Many more kills than the test: python -m benchmarks.store_torture --kills 1000"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.torture import measure_fill, torture

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole = measure_fill(Path(name))
        print(f"one uninterrupted run: {whole:.2f} s")
        killed, finished = torture(Path(name), arguments.kills, arguments.seed, longest_s=whole / 3)
    print(f"{killed} kills, {finished} stores finished through them, each identical to an uninterrupted one")
