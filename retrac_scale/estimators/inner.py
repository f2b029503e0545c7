"""Inner products of gradients or of their directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrac_scale.arrays import Float32, Samples
from retrac_scale.estimators.base import Estimator, Pairing
from retrac_scale.store import SketchStore


@dataclass(frozen=True)
class TracIn(Estimator):
    """Diffusion-TracIn: sum_c w_c < mean_t g(c,i,t), mean_s g(c,q,s) > (arXiv 2401.09031, after Pruthi et al. 2020).

    With recorded timesteps a sample has one t per checkpoint, the one it was trained at. In a store sketched while
    training, a visit that was not made counts as zero: samples that were trained more often have more influence.
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
    of norm zero has no direction and contributes zero. The mean is over the visits that were made, where a store was
    sketched while training: directions do not count how often a sample was trained.
    """

    pairing: Pairing = "cross"

    def __post_init__(self) -> None:
        self._check_pairing()

    def stored_vectors(self, store: SketchStore, checkpoint: str, samples: Samples = slice(None)) -> Float32:
        """Directions, those of the visits made scaled up so that the mean over all slots is the mean over them."""
        vectors = super().stored_vectors(store, checkpoint, samples)
        slots = vectors.shape[1]
        if slots > 1 and store.has("timestep"):
            made = (store.timesteps(checkpoint, samples) >= 0).sum(1)
            if (made < slots).any():
                vectors *= (slots / np.maximum(made, 1)).astype(np.float32)[:, None, None]
        return vectors

    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """Directions."""
        lengths: Float32 = np.where(norms > 0, norms, np.float32(np.inf))
        return sketches / lengths[..., None]


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
        length = np.linalg.norm(sketches.mean(1).astype(np.float64), axis=1)[:, None, None].astype(np.float32)
        unit: Float32 = np.divide(sketches, length, out=np.zeros_like(sketches), where=length > 0)
        return unit
