"""Keeping freed memory in the process."""

from __future__ import annotations

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _LARGEST_BYTES = 2**31 - 1, 32 << 20


@cache
def keep_freed_pages() -> None:
    """Have glibc keep up to 2 GiB of freed memory and serve blocks up to 32 MiB from it; elsewhere, do nothing.

    A sketch frees all its activations after every batch, a query its copies of the queries. Given back to the system,
    their pages would have to be faulted in again for the next one, which costs a tenth of a small model's step, or of
    a scan of 100,000 rows. A training step keeps them by the accident that its gradients lie behind them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
