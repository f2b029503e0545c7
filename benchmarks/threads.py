"""Ways to run a compiled pass in several threads between two operations of torch, as a backward pass does.

    python -m benchmarks.threads
    NUMBA_THREADING_LAYER=workqueue python -m benchmarks.threads

One round is an operation of torch in its threads and a pass after it: in torch's own threads (`GOMP_parallel`, as the
package has it), in a pool of Python's, and in numba's own threads (`parallel=True`). In turns; milliseconds of rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.measurement_page import cpu_name
from retrac_scale.gradients.factored import FactoredGradients, pairs_of
from retrac_scale.native import threads
from retrac_scale.projections import folding

SIZES = {"small": (32, 96, 64), "middling": (32, 160, 64)}
"""Samples, features on both sides, positions."""
K = 2048


@numba.njit(parallel=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _in_numbas(
    left: Any,
    right: Any,
    steps: Any,
    meets: Any,
    met: Any,
    counts: Any,
    mixer: Any,
    accumulator: Any,
    signs: Any,
    shifts: Any,
    squares: Any,
    parts: Any,
) -> None:
    rows = len(accumulator)
    for part in numba.prange(parts):  # whose arguments may be arrays and numbers alone
        g, x = steps[0], steps[1]
        sides = (
            (left, (g[0], g[1], g[2], g[3]), (g[4], g[5], g[6])),
            (right, (x[0], x[1], x[2], x[3]), (x[4], x[5], x[6])),
            (meets, met, counts),
            mixer,
        )
        both, first, last = ((signs, shifts), (signs[:0], shifts[:0])), rows * part // parts, rows * (part + 1) // parts
        folding._form_and_fold(sides, accumulator, both, np.float32(1), squares, first, last)


def ways(n: int, size: int, positions: int, count: int) -> dict[str, Callable[[], None]]:
    """By name, what does a pass over n samples in some threads."""
    rng = np.random.default_rng(0)
    left, right = (torch.from_numpy(rng.standard_normal((n, 1, size, positions), dtype=np.float32)) for _ in range(2))
    pairs = pairs_of((1,), (1,), (1,), (0,), (positions,), (positions,))
    products = FactoredGradients(left, right, (), pairs)
    signs = rng.choice(np.array([-1, 1], np.int8), size * size), rng.integers(0, K, -(-size * size // K))
    sums, squares = torch.zeros(n, 2 * K), np.zeros(n)
    sides = products.sides()
    arguments = sides, sums.numpy(), (signs, folding._NONE), np.float32(1), squares
    steps = np.array([[*side[1], *side[2]] for side in sides[:2]])
    flat = sides[0][0], sides[1][0], steps, *sides[2], sides[3], sums.numpy(), *signs, squares, count
    team = threads._torch_team

    def ours() -> None:
        folding._formed_and_folded(arguments, n, products.nbytes)

    def pooled() -> None:
        threads._torch_team = lambda: None
        try:
            ours()
        finally:
            threads._torch_team = team

    return {"torch's": ours, "Python's": pooled, "numba's": lambda: _in_numbas(*flat)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores; {options.threads} threads")
    for name, size in SIZES.items():
        each = ways(*size, options.threads)
        x, weight = torch.ones(size[0] * size[2], size[1]), torch.ones(size[1], size[1])
        took: dict[str, list[float]] = {way: [] for way in ("torch alone", *each)}
        for _ in range(options.rounds):
            for way in took:
                started = time.perf_counter()
                x @ weight
                each.get(way, lambda: None)()
                took[way].append(1000 * (time.perf_counter() - started))
        said = ", ".join(
            f"{way} {min(times):.2f} ({np.quantile(times, 0.25):.2f}, {np.median(times):.2f})"
            for way, times in took.items()
        )
        print(f"{name}: least milliseconds (quartile, median) of {said}", flush=True)
    print(f"numba's threads: {numba.threading_layer()}")


if __name__ == "__main__":
    main()
