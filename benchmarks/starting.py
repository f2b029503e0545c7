"""How long a command takes that has next to nothing to do.

    python -m benchmarks.starting

makes a store of 300 samples and its index, and prints of five runs of each command the median seconds that passed, and
those that the CPU was busy for it, which other work on the machine changes little. The first run of all is not counted.
"""

from __future__ import annotations

import os
import resource
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
        _seconds(folder, COMMANDS[-1])
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
        print(f"{'':41} passed  busy")
        for command in COMMANDS:
            passed, busy = map(statistics.median, zip(*(_seconds(folder, command) for _ in range(RUNS)), strict=True))
            print(f"retrac-scale {command:28} {passed:6.2f} {busy:5.2f}")


def _seconds(folder: Path, command: str) -> tuple[float, float]:
    """That passed, and of the CPU (user and system)."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "retrac_scale.cli", *command.split()], cwd=folder, check=True, stdout=-3)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, busy


if __name__ == "__main__":
    main()
