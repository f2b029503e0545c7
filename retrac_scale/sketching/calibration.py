"""Choosing the batch size, the fastest that fits in memory, and the number of threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import Tensor

SMALLEST, LARGEST = 8, 256
TURNS, QUICK = 3, 0.1
"""Runs of each number of threads, by turns; and seconds, below which a batch is run so often once more if it is no
faster than the last one."""
WORTHWHILE = 1.05
"""A batch twice as large is tried as long as the last one was this much faster per row."""
SECONDS = 5.0
LONG = 0.25
"""Seconds of a row that keeps the machine busy by itself: more of them at a time are no faster."""
FEW = 16 * LARGEST
"""Rows, about as many as all measurements of a small model go through."""
AT_ONCE = 64
"""So few rows are one batch, if they fit, on all threads: any measurement takes longer than they do."""
MEMORY_SHARE = 0.25
"""Of the free memory. Activations, their gradients and the allocator's slack take about three times what is kept for
the backward pass."""


def fastest_batch(run: Callable[[int], Tensor], most: int, device: torch.device, sharing: int = 1) -> tuple[int, float]:
    """Rows per backward pass, and the seconds that they take.

    Args:
        run: sketches a batch of so many rows and returns its losses.
        most: rows there are.
        device: whose memory counts.
        sharing: processes that share it.
    """
    most = fitting(kept_bytes(run), min(most, LARGEST), device, sharing)
    rows, took, best, left = min(SMALLEST, most), 0.0, 0.0, SECONDS
    alone = _seconds(run, 1, device)
    if alone > LONG and (alone := min(alone, _seconds(run, 1, device))) > LONG:
        return rows, rows * alone
    tried = rows
    while True:
        now = _least_seconds(run, tried, device, WORTHWHILE * best)
        if tried / now <= WORTHWHILE * best:
            return rows, took
        rows, took, best, left = tried, now, tried / now, left - now
        tried *= 2
        if tried > most or 4 * now > left:  # twice as many rows, twice
            return rows, took


def fitting(kept: int, most: int, device: torch.device, sharing: int = 1) -> int:
    """So many rows, or as many as fit in memory, where each keeps `kept_bytes`; others as for `fastest_batch`."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return min(most, max(1, int(MEMORY_SHARE / sharing * free / max(1, 3 * kept))))


def fastest(run: Callable[[int], Tensor], most: int, device: torch.device, sharing: int = 1) -> tuple[int, int]:
    """Rows per backward pass, and threads: as many as torch is set to, or one.

    Several threads wait for each other, on a busy machine longer than one would work; small models gain nothing.
    Arguments as for `fastest_batch`.
    """
    if most <= AT_ONCE:
        return fitting(kept_bytes(run), most, device, sharing), torch.get_num_threads()
    rows, took = fastest_batch(run, most, device, sharing)
    threads = _threads(run, device, rows if 4 * took < SECONDS else 1, TURNS if took < QUICK else 2)
    if threads == torch.get_num_threads():
        return rows, threads
    with torch_threads(threads):
        return fastest_batch(run, most, device, sharing)[0], threads


def as_before(
    run: Callable[[int], Tensor], most: int, device: torch.device, rows: int, threads: int, kept: int
) -> tuple[int, int]:
    """The same for FEW rows, sketched like a store's, which stand in place of measurements longer than the work.

    A single thread may have been a worker's: whether it is faster is told by a part of the work, or a row of each.

    Args:
        run: as for `fastest_batch`.
        most: likewise.
        device: likewise.
        rows: of the store.
        threads: likewise.
        kept: `kept_bytes` of the run.
    """
    rows, share = fitting(kept, min(rows, most), device), most // (4 * TURNS)
    if threads > 1:
        return rows, min(threads, torch.get_num_threads())
    return rows, _threads(run, device, min(rows, max(1, share)), TURNS if share else 1)


def _threads(run: Callable[[int], Tensor], device: torch.device, rows: int, turns: int) -> int:
    """torch's, or one if that is faster for so many rows, by so many runs of each."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type == "cuda":
        return threads
    took = dict.fromkeys((threads, 1), float("inf"))
    with torch_threads(threads):  # set back
        for count in (threads, 1) * turns:
            torch.set_num_threads(count)
            took[count] = min(took[count], _seconds(run, rows, device))
    return threads if took[threads] <= took[1] else 1


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch on so many threads: rounding depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _least_seconds(run: Callable[[int], Tensor], rows: int, device: torch.device, rate: float) -> float:
    """Of some runs: what is made once, as compiled passes are, makes the first one longer, a busy machine any.

    Two are enough that go through more rows a second than `rate`.
    """
    least = min(_seconds(run, rows, device) for _ in range(2))
    for _ in range(TURNS if least < QUICK and rows / least <= rate else 0):
        least = min(least, _seconds(run, rows, device))
    return least


def _seconds(run: Callable[[int], Tensor], rows: int, device: torch.device) -> float:
    start = time.perf_counter()
    run(rows)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def kept_bytes(run: Callable[[int], Tensor]) -> int:
    """What one row keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run(1)
    return sum(kept.values())
