"""What an estimator is: it makes rows of a store, and scores are their inner products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32, Samples
from retrac_scale.estimators.ridge import Damping, Ridge
from retrac_scale.runtime import kinds
from retrac_scale.store import SketchStore
from retrac_scale.store.part import measures_in

Pairing = Literal["cross", "matched"]


class Estimator(ABC):
    """Collapses a store's sketches into one row per checkpoint and sample; scores are inner products of rows.

    score(q, i) = sum_c w_c <row(c, q), train_row(c, i)>, its square where `squared`. Larger means that training on i
    lowers the loss of q more. Most estimators treat both sides alike; one with a `damping` has a ridge over the rows of
    all samples between them, one for each part of a row, which is solved when an index is built.

    A subclass is a frozen dataclass, known to indexes by its name. It says what one pair contributes, in `needs` what
    it takes from the training store beyond sketches and norms, and in `measures` which measured functions it is defined
    for (none: any).
    """

    kinds: ClassVar[dict[str, type[Estimator]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[tuple[str, ...]] = ()
    pairing: Pairing = "cross"
    squared: bool = False
    damping: Damping | None = None
    alone: ClassVar[bool] = True
    """Whether a training row, before a ridge is applied to it, is a function of its own sample alone."""

    def __init_subclass__(cls, named: bool = True) -> None:
        if named:
            kinds.enter(Estimator.kinds, cls, "an estimator")

    @abstractmethod
    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """What one pair contributes, `[n, t, k]`, from raw sketches `[n, t, k]` and norms `[n, t]`."""

    def check(self, store: SketchStore) -> None:
        """Raise ValueError, saying what to do, unless a store of either side was measured as the estimator wants it."""
        if not store.shape[0]:
            raise ValueError(f"{store.url or 'the store'} has no sample to ask about; give one or more.")
        measure = store.fingerprint.get("measure")
        if self.measures and measure is not None and measure not in self.measures:
            raise ValueError(
                f"{type(self).__name__} differentiates {' or '.join(self.measures)}, but {store.url or 'the store'} "
                f"was measured with {measure!r}; sketch with DiffusionTask(..., measure={self.measures[0]!r})."
            )
        if self.pairing == "matched":
            common_timesteps(store)
        elif len(measures := measures_in(store.fingerprint)) > 1:
            raise ValueError(
                f"{type(self).__name__} would average gradients of {' and '.join(measures)}, which have no mean; "
                "take an estimator with matched pairing, such as ReTracRidge(), or open the store under one measure."
            )

    def check_training(self, store: SketchStore) -> None:
        """As `check`, and ValueError unless the training side has the quantities that the estimator needs."""
        for quantity in self.needs:
            if not store.has(quantity):
                raise ValueError(
                    f"{type(self).__name__} needs each pair's {quantity}, which {store.url or 'the store'} lacks; "
                    "sketch the samples with sketch(...), or give it to write_store."
                )
        self.check(store)

    def rows(self, store: SketchStore, checkpoint: str, samples: Samples = slice(None)) -> Float32:
        """Rows of some samples at a checkpoint.

        Cross pairing: the mean over timesteps, `[n, k]`. Matched pairing: all timesteps side by side, `[n, t*k]`, so
        that the inner product is the sum over timesteps.
        """
        return self._row(self.stored_vectors(store, checkpoint, samples))

    def stored_vectors(self, store: SketchStore, checkpoint: str, samples: Samples = slice(None)) -> Float32:
        """What each stored pair of some samples contributes at a checkpoint, `[n, t, k]`."""
        return self.vectors(*store.sketches_and_norms(checkpoint, samples))

    def train_rows(
        self, store: SketchStore, checkpoint: str, samples: Samples = slice(None), ridges: Sequence[Ridge] = ()
    ) -> Float32:
        """Rows of some training samples at a checkpoint; `ridges` are fitted to its `rows`, one for each part."""
        return self.rows(store, checkpoint, samples)

    def query_rows(
        self, store: SketchStore, checkpoint: str, samples: Samples = slice(None), ridges: Sequence[Ridge] = ()
    ) -> Float32:
        """Rows of some queries at a checkpoint; `ridges` as in `train_rows`, none where an index does not hold them."""
        return self.rows(store, checkpoint, samples)

    def collapse(self, sketches: Float32, norms: Float32) -> Float32:
        """The rows of samples from their gradients, or sketches of them, `[n, t, k]` and norms `[n, t]`."""
        return self._row(self.vectors(sketches, norms))

    def _row(self, vectors: Float32) -> Float32:
        n, t, k = vectors.shape
        if self.pairing == "matched" or t == 1:
            return vectors.reshape(n, t * k)
        mean: Float32 = vectors.mean(1)
        return mean

    def parts(self, store: SketchStore) -> int:
        """How many vectors stand side by side in a row: one for each timestep under matched pairing, else one."""
        return store.shape[1] if self.pairing == "matched" else 1

    def width(self, store: SketchStore) -> int:
        """Entries of a row."""
        return self.parts(store) * store.shape[2]

    def spec(self) -> dict[str, Any]:
        """JSON description; `estimator_from_spec` reverses it."""
        return kinds.described(self)

    def _check_pairing(self) -> None:
        if self.pairing not in get_args(Pairing):
            raise ValueError(f"pairing must be one of {get_args(Pairing)}, got {self.pairing!r}.")


def estimator_from_spec(spec: Mapping[str, Any]) -> Estimator:
    """The estimator that an index was built with.

    Raises:
        ValueError: its class is not known in this process.
    """
    kind = kinds.find(Estimator.kinds, spec["kind"], "an estimator")
    return kind(**{key: value for key, value in spec.items() if key != "kind"})


def common_timesteps(store: SketchStore) -> list[int] | None:
    """The timesteps that all samples of a store share at every checkpoint, None when they do not say.

    Raises:
        ValueError: samples differ, so that matched pairing has no meaning.
    """
    if not store.has("timestep"):
        return None
    first: npt.NDArray[np.int64] | None = None
    for checkpoint in store.checkpoints:
        table = store.timesteps(checkpoint)
        first = table[0] if first is None else first
        if (table != first).any():
            raise ValueError(
                f"matched pairing needs the same timesteps for every sample; at checkpoint {checkpoint!r} they differ. "
                "Sketch with EvenlySpaced or Explicit, or use pairing='cross'."
            )
    assert first is not None
    return [int(t) for t in first]
