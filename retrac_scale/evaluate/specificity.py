"""Specificity: do different queries get different answers?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def unique_fraction(ids: npt.NDArray[Any]) -> float:
    """Distinct ids in the union of M top-k lists, divided by M k; 1 when no two lists share a sample.

    Args:
        ids: `[q, k]`, e.g. `TopK.ids`.
    """
    return len(np.unique(ids)) / ids.size


def largest_share(ids: npt.NDArray[Any]) -> float:
    """The share of the M top-k lists in which the most frequent sample stands.

    Args:
        ids: `[q, k]`, e.g. `TopK.ids`.
    """
    return float(np.unique(ids, return_counts=True)[1].max() / len(ids))
