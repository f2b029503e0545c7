"""What each attribution method makes of a store: one small class each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from retrac_scale.store import SketchStore
from retrac_scale.store.compatibility import check_compatible
from retrac_scale.store.encoding import Float32

Pairing = Literal["cross", "matched"]


class Estimator(ABC):
    """Collapses a store's sketches into one row per checkpoint and sample; scores are inner products of rows.

    score(q, i) = sum_c w_c <row(c, q), row(c, i)>. Larger means that training on i lowers the loss of q more.
    """

    kinds: ClassVar[dict[str, type[Estimator]]] = {}
    pairing: Pairing = "cross"

    def __init_subclass__(cls) -> None:
        Estimator.kinds[cls.__name__] = cls

    @abstractmethod
    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """What one pair contributes, `[n, t, k]`, from raw sketches `[n, t, k]` and norms `[n, t]`."""

    def rows(self, store: SketchStore, checkpoint: str, samples: slice = slice(None)) -> Float32:
        """Rows of some samples at a checkpoint.

        Cross pairing: the mean over timesteps, `[n, k]`. Matched pairing: all timesteps side by side, `[n, t*k]`, so
        that the inner product is the sum over timesteps.
        """
        vectors = self.vectors(store.sketches(checkpoint, samples), store.norms(checkpoint, samples))
        if self.pairing == "matched":
            return vectors.reshape(len(vectors), -1)
        mean: Float32 = vectors.mean(1)
        return mean

    def width(self, store: SketchStore) -> int:
        """Entries of a row."""
        _, t, k = store.shape
        return t * k if self.pairing == "matched" else k

    def spec(self) -> dict[str, Any]:
        """JSON description; `estimator_from_spec` reverses it."""
        return {"kind": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    def _check_pairing(self) -> None:
        if self.pairing not in get_args(Pairing):
            raise ValueError(f"pairing must be one of {get_args(Pairing)}, got {self.pairing!r}.")


@dataclass(frozen=True)
class TracIn(Estimator):
    """Diffusion-TracIn: sum_c w_c < mean_t g(c,i,t), mean_s g(c,q,s) > (arXiv 2401.09031, after Pruthi et al. 2020).

    With recorded timesteps a sample has one t per checkpoint, the one it was trained at.
    """

    pairing: Pairing = "cross"

    def __post_init__(self) -> None:
        self._check_pairing()

    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """The gradients themselves."""
        return sketches


@dataclass(frozen=True)
class ReTrac(Estimator):
    """Diffusion-ReTrac: as TracIn, with every gradient divided by its full L2 norm (arXiv 2401.09031).

    Noise draws are averaged before the norm is taken, timesteps after it, and nothing is renormalised then. A gradient
    of norm zero has no direction and contributes zero.
    """

    pairing: Pairing = "cross"

    def __post_init__(self) -> None:
        self._check_pairing()

    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """Directions."""
        safe = np.where(norms > 0, norms, np.float32(1))
        directions: Float32 = np.where((norms > 0)[..., None], sketches / safe[..., None], np.float32(0))
        return directions


def estimator_from_spec(spec: Mapping[str, Any]) -> Estimator:
    """The estimator that an index was built with."""
    return Estimator.kinds[spec["kind"]](**{key: value for key, value in spec.items() if key != "kind"})


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


def self_influence(store: SketchStore, estimator: Estimator, *, queries: SketchStore | None = None) -> Float32:
    """Score of every sample with itself as the query, float32 `[n]`, block by block.

    With one recorded timestep per sample, ReTrac's direction is compared with itself and carries no information; give
    `queries`, the same samples sketched at the query timesteps, to have the paper's score.

    Args:
        store: the training side.
        estimator: TracIn() or ReTrac().
        queries: the query side, with the same ids in the same order; default: the store itself.
    """
    other = store if queries is None else queries
    if queries is not None:
        check_compatible(store.fingerprint, store.checkpoints, queries.fingerprint, queries.checkpoints)
        if not np.array_equal(store.ids, queries.ids):
            raise ValueError("self_influence needs queries with the same ids in the same order as the store.")
        if estimator.pairing == "matched" and common_timesteps(store) != common_timesteps(queries):
            raise ValueError("matched pairing needs the same timesteps on both sides; use pairing='cross'.")
    total = np.zeros(store.shape[0], dtype=np.float64)
    for checkpoint, weight in store.weights.items():
        for samples in store.blocks:
            left = estimator.rows(store, checkpoint, samples)
            right = left if queries is None else estimator.rows(other, checkpoint, samples)
            total[samples] += weight * np.einsum("nk,nk->n", left, right, dtype=np.float64)
    return total.astype(np.float32)
