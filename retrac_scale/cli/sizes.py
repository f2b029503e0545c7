"""Bytes and seconds as people read them."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """Such as 2.05 GB, with 10^9 bytes to a GB.

    >>> in_bytes(2_048_000_000), in_bytes(512)
    ('2.05 GB', '512 bytes')
    """
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g} bytes"


def in_time(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.5 h, 2.1 days.

    >>> in_time(40), in_time(750), in_time(12_600)
    ('40 s', '12 min', '3.5 h')
    """
    if seconds < 0.001:
        return "less than 1 ms"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
