"""What the demo compiles and imports later, prepared beside it by a process of its own, for it trains in one thread."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

IMPORTED_LATE = (
    "sympy",
    "scipy.stats",
    "sklearn.datasets",
    "zarr",
    "dask.array",
    "numba",
    "matplotlib.pyplot",
    "pandas",
)
"""By the demo: begun with these, the two processes do not turn the same sources into bytecode at the same time."""


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Have it prepared while inside, by what time other programs leave."""
    if (os.cpu_count() or 1) < 2:
        yield
        return
    with subprocess.Popen(
        [sys.executable, "-m", __name__], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.kill()  # what is kept on disk is put there whole


def main() -> None:
    """That process."""
    if hasattr(os, "nice"):
        os.nice(10)
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    from retrac_scale.demo import compile_beforehand

    compile_beforehand()


if __name__ == "__main__":
    main()
