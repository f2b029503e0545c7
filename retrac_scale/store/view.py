"""A store seen at some of its checkpoints and timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Samples
from retrac_scale.store.reader import SketchStore
from retrac_scale.store.schema import CONTENT


class StoreView(SketchStore):
    """Reads what a part of another store's measurements would be; in this process alone, and without a URL.

    Args:
        store: the whole.
        checkpoints: names of some.
        places: of some timesteps, by their number in the whole.
    """

    def __init__(self, store: SketchStore, checkpoints: Sequence[str], places: Sequence[int]) -> None:
        super().__init__(store._parts, None, store._whole)
        self._of, self._names, self._places = store, list(checkpoints), np.asarray(places)

    @cached_property
    def weights(self) -> dict[str, float]:
        """See `SketchStore`."""
        return {name: weight for name, weight in self._of.weights.items() if name in self._names}

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """See `SketchStore`."""
        n, _, k = self._of.shape
        return n, len(self._places), k

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the whole, of these checkpoints."""
        whole = self._of.fingerprint
        if known := whole.get("checkpoints"):  # a store of arrays knows none
            whole["checkpoints"] = {name: known[name] for name in self._names if name in known}
        return whole

    def _gather(self, checkpoint: str, samples: Samples, *quantities: str) -> list[npt.NDArray[Any]]:
        gathered = self._of._gather(checkpoint, samples, *quantities)
        return [
            values if quantity == CONTENT else values[:, self._places]
            for quantity, values in zip(quantities, gathered, strict=True)
        ]
