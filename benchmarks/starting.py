"""How long a command takes that has next to nothing to do.

    python -m benchmarks.starting

makes a store of 300 samples and its index, and prints the median of five runs of each command, in seconds.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import retrac_scale as rs

RUNS = 5
COMMANDS = ("--help", "info s.zarr", "info i.zarr", "query i.zarr --ids 7 -k 10", "query i.zarr q.zarr -k 10")


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder, steps = Path(name), [125, 375, 625, 875]
        store = rs.write_store(folder / "s.zarr", {"c": rng.standard_normal((300, 4, 512))}, timesteps=steps)
        rs.write_store(folder / "q.zarr", {"c": rng.standard_normal((12, 4, 512))}, timesteps=steps)
        rs.build_index(store, rs.ReTracRidge(), folder / "i.zarr")
        for command in COMMANDS:
            seconds = [_seconds(folder, command) for _ in range(RUNS)]
            print(f"retrac-scale {command:28} {statistics.median(seconds):.2f}")


def _seconds(folder: Path, command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "retrac_scale.cli", *command.split()], cwd=folder, check=True, stdout=-3)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
