"""What each attribution method makes of a store: one small class each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from retrac_scale.store import SketchStore
from retrac_scale.store.encoding import Float32

Pairing = Literal["cross", "matched"]


class Estimator(ABC):
    """Collapses a store's sketches into one row per checkpoint and sample; scores are inner products of rows.

    score(q, i) = sum_c w_c <row(c, q), row(c, i)>. Larger means that training on i lowers the loss of q more.
    A subclass says what one pair contributes, and in `needs` what it takes from a store beyond sketches and norms.
    """

    kinds: ClassVar[dict[str, type[Estimator]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    pairing: Pairing = "cross"

    def __init_subclass__(cls) -> None:
        Estimator.kinds[cls.__name__] = cls

    @abstractmethod
    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """What one pair contributes, `[n, t, k]`, from raw sketches `[n, t, k]` and norms `[n, t]`."""

    def check(self, store: SketchStore) -> None:
        """Raise ValueError, naming what is missing, unless the store has what the estimator is made of."""
        for quantity in self.needs:
            if not store.has(quantity):
                raise ValueError(
                    f"{type(self).__name__} needs each pair's {quantity}, which {store.url or 'the store'} lacks; "
                    "sketch the samples with sketch(...), or give it to write_store."
                )
        if self.pairing == "matched":
            common_timesteps(store)

    def rows(self, store: SketchStore, checkpoint: str, samples: slice = slice(None)) -> Float32:
        """Rows of some samples at a checkpoint.

        Cross pairing: the mean over timesteps, `[n, k]`. Matched pairing: all timesteps side by side, `[n, t*k]`, so
        that the inner product is the sum over timesteps.
        """
        return self.collapse(store.sketches(checkpoint, samples), store.norms(checkpoint, samples))

    def collapse(self, sketches: Float32, norms: Float32) -> Float32:
        """The rows of samples from their gradients, or sketches of them, `[n, t, k]` and norms `[n, t]`."""
        vectors = self.vectors(sketches, norms)
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


@dataclass(frozen=True)
class GradDot(Estimator):
    """<phi(c,i), phi(c,q)> with phi = mean_t g (Charpiat et al. 2019); over several checkpoints this is TracInCP."""

    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """The gradients themselves."""
        return sketches


@dataclass(frozen=True)
class GradCos(Estimator):
    """The cosine of phi(c,i) and phi(c,q), phi = mean_t g (Charpiat et al. 2019); over several checkpoints this is GAS.

    Lengths are those of the mean sketches. A mean of length zero contributes zero.
    """

    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """The gradients, divided by the length of their mean over timesteps."""
        length = np.linalg.norm(sketches.mean(1), axis=1)[:, None, None]
        unit: Float32 = np.divide(sketches, length, out=np.zeros_like(sketches), where=length > 0)
        return unit


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
