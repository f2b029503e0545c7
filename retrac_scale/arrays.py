"""Types of arrays by their entries."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[Any]
"""Of samples, int64 or str."""
Samples = slice | Int64
"""Some of a store's, by a slice or by their places `[m]`, in any order."""
