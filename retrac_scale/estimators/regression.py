"""Estimators with a ridge over all training rows between the two sides of a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from retrac_scale.arrays import Float32, Samples
from retrac_scale.estimators.base import Estimator, Pairing
from retrac_scale.estimators.inner import ReTrac, TracIn
from retrac_scale.estimators.ridge import Damping, Floats, Ridge
from retrac_scale.store import SketchStore
from retrac_scale.store.part import plans_of

ALL = slice(None)


@dataclass(frozen=True)
class Ridged(Estimator, named=False):
    """Estimators with a ridge between both sides of a score: one per checkpoint; matched, for each timestep too.

    Args:
        damping: lambda relative to the mean of the eigenvalues of sum_i phi phi^T that can differ from zero, that is to
            its trace over min(N, k); "auto" is `retrac_scale.estimators.ridge.AUTO`.
        squared: answer with the square of the score (summed over checkpoints), so that strong proponents and strong
            opponents both come first.
    """

    damping: Damping = "auto"
    squared: bool = False
    directions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_pairing()
        if self.damping == "auto":
            return
        if not isinstance(self.damping, Real) or isinstance(self.damping, bool) or not 0 <= self.damping < np.inf:
            raise ValueError(f'damping must be "auto" or a number of 0 or more, got {self.damping!r}.')
        if not isinstance(self.damping, int):  # NumPy's numbers are not JSON's
            object.__setattr__(self, "damping", float(self.damping))

    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """The gradients themselves, or their directions."""
        return ReTrac().vectors(sketches, norms) if self.directions else sketches

    def stored_vectors(self, store: SketchStore, checkpoint: str, samples: Samples = ALL) -> Float32:
        """See `ReTrac.stored_vectors` for directions."""
        pairing: Estimator = ReTrac() if self.directions else TracIn()
        return pairing.stored_vectors(store, checkpoint, samples)

    def train_rows(
        self, store: SketchStore, checkpoint: str, samples: Samples = ALL, ridges: Sequence[Ridge] = ()
    ) -> Float32:
        """phi, `[n, k]`, or what a subclass makes of it; K^-1 of that where samples carry the ridge; matched, for all
        timesteps side by side."""
        if not ridges:
            raise ValueError(f"{type(self).__name__} needs the ridge over all training rows; use build_index.")
        rows = self.rows(store, checkpoint, samples)
        parts = self._parted(rows, ridges)
        finished = self.finish(store, checkpoint, samples, parts, ridges)
        made = [ridge.of_samples(part) for ridge, part in zip(ridges, finished, strict=True)]
        if all(one is part for one, part in zip(made, parts, strict=True)):  # views of the rows, as they are
            return rows
        return _side_by_side(made)

    def query_rows(
        self, store: SketchStore, checkpoint: str, samples: Samples = ALL, ridges: Sequence[Ridge] = ()
    ) -> Float32:
        """phi, `[n, k]`; K^-1 phi where queries carry the ridge; matched, for all timesteps side by side."""
        rows = self.rows(store, checkpoint, samples)
        if not ridges:
            return rows
        parts = self._parted(rows, ridges)
        return _side_by_side([ridge.of_queries(part) for ridge, part in zip(ridges, parts, strict=True)])

    def finish(
        self, store: SketchStore, checkpoint: str, samples: Samples, parts: Sequence[Float32], ridges: Sequence[Ridge]
    ) -> Sequence[Floats]:
        """What stands for the training rows under the ridge, from those of `rows`, `[n, k]` for each ridge."""
        return parts

    def _parted(self, rows: Float32, ridges: Sequence[Ridge]) -> list[Float32]:
        return np.split(rows, len(ridges), axis=1)


@dataclass(frozen=True)
class ReTracRidge(Ridged):
    """sum_c w_c sum_t u(c,q,t)^T K_(c,t)^-1 u(c,i,t), K_(c,t) = sum_i u(c,i,t) u(c,i,t)^T + lambda I, u = g / |g|.

    Directions as in ReTrac, products at the same timestep on both sides, and between them a ridge for each checkpoint
    and timestep. In a store under common noise both sides see the same noise there. The score is then a kernel between
    two images under the same noise, not the double mean over independent draws of arXiv 2401.09031: it has the
    covariance of the two gradients over the noise besides, which tells how alike the images are. It is what
    `build_index` recommends for such stores, and `benchmarks.measurement` says how it compares.
    """

    pairing: ClassVar[Pairing] = "matched"  # type: ignore[misc]
    directions: ClassVar[bool] = True


@dataclass(frozen=True)
class TRAK(Ridged):
    """sum_c w_c phi(c,q)^T K_c^-1 phi(c,i), phi = mean_t g, K_c = sum_i phi(c,i) phi(c,i)^T + lambda I.

    Park, Georgiev, Ilyas, Leclerc, Madry 2023 (arXiv 2303.14186), with the loss as the model output, as used for
    diffusion models. TRAK's own code divides by the number of checkpoints and rescales each checkpoint's inverse, which
    leaves the order of a single checkpoint's scores as it is.

    Args:
        damping: see `Ridged`.
        squared: see `Ridged`.
        pairing: "matched" for the sum over timesteps of such products at the same one, each with a ridge of its own.
        directions: unit gradients in place of gradients, on both sides and in K.
    """

    pairing: Pairing = "cross"
    directions: bool = False  # type: ignore[misc]

    def spec(self) -> dict[str, Any]:
        """JSON description; without what was no option when the first indexes were described."""
        described = super().spec()
        usual = {"pairing": "cross", "directions": False}
        return {key: value for key, value in described.items() if key not in usual or value != usual[key]}


@dataclass(frozen=True)
class RelatIF(TRAK):
    """TRAK divided by |K^-1 phi(c,i)| at each checkpoint (Barshan, Brunet, Dziugaite 2020, arXiv 2003.11630)."""

    alone: ClassVar[bool] = False

    def finish(
        self, store: SketchStore, checkpoint: str, samples: Samples, parts: Sequence[Float32], ridges: Sequence[Ridge]
    ) -> Sequence[Floats]:
        """phi over the length of K^-1 phi; zero where that is zero."""
        solved = [ridge.apply(part) for part, ridge in zip(parts, ridges, strict=True)]
        return [_divided(part, np.linalg.norm(own, axis=1)) for part, own in zip(parts, solved, strict=True)]


@dataclass(frozen=True)
class RenormIF(TRAK):
    """TRAK divided by |phi(c,i)| at each checkpoint (Hammoudeh and Lowd 2022, arXiv 2201.10055)."""

    def finish(
        self, store: SketchStore, checkpoint: str, samples: Samples, parts: Sequence[Float32], ridges: Sequence[Ridge]
    ) -> Sequence[Floats]:
        """phi over its length; zero where that is zero."""
        return [_divided(part, np.linalg.norm(part.astype(np.float64), axis=1)) for part in parts]


@dataclass(frozen=True)
class DTRAK(TRAK):
    """TRAK of another differentiated function: the mean squared model output, or its norms.

    Zheng, Pang, Du, Jiang, Lin 2024 (arXiv 2311.00500). Both sides must be sketched with
    `DiffusionTask(measure="mean_squared_output")`, "output_l1", "output_l2" or "output_linf".
    """

    measures: ClassVar[tuple[str, ...]] = ("mean_squared_output", "output_l1", "output_l2", "output_linf")


@dataclass(frozen=True)
class DAS(TRAK):
    """(sum_c w_c phi(c,q)^T K_c^-1 ubar(c,i) r(c,i))^2 with ubar = mean_t g/|g| (Lin et al. 2024, arXiv 2410.18639).

    Both sides must be sketched with `DiffusionTask(measure="mean_output")`. r(c,i) is the mean over timesteps of the
    sample's residual root mean squared errors, which are first divided by their Euclidean length over timesteps; they
    are the roots of the training store's losses, so that the loss must be a mean squared error. Matched, u and r are
    those of the timestep.
    """

    measures: ClassVar[tuple[str, ...]] = ("mean_output",)
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    squared: bool = True

    def finish(
        self, store: SketchStore, checkpoint: str, samples: Samples, parts: Sequence[Float32], ridges: Sequence[Ridge]
    ) -> Sequence[Floats]:
        """u r."""
        residuals = np.sqrt(store.losses(checkpoint, samples).astype(np.float64))
        r = _divided(residuals, np.linalg.norm(residuals, axis=1))
        r = r if self.pairing == "matched" else r.mean(1, keepdims=True)
        directions = self._parted(ReTrac(self.pairing).rows(store, checkpoint, samples), ridges)
        return [part * own[:, None] for part, own in zip(directions, r.T, strict=True)]


def _side_by_side(parts: Sequence[Floats]) -> Float32:
    return np.concatenate(parts, axis=1, dtype=np.float32)


def _divided(rows: Floats, lengths: Floats) -> Floats:
    """Rows `[n, k]` over lengths `[n]`, zero where a length is."""
    divided: Floats = rows / np.where(lengths > 0, lengths, np.inf)[:, None]
    return divided


def of_losses(rows: Float32, measures: Sequence[str]) -> Float32:
    """Rows `[c, n, k]` of several measures side by side with zeros for functions of the output; of one as they are.

    A concept's score says what training did for it, and training lowers the loss alone.
    """
    of_output = {*DTRAK.measures, *DAS.measures}
    kept = np.array([len(measures) == 1 or one not in of_output for one in measures])
    return rows * kept.astype(np.float32).repeat(rows.shape[2] // len(kept))


def recommended(store: SketchStore) -> Estimator:
    """What to ask a store by: `ReTracRidge` under common noise, else `ReTrac`; `DTRAK` or `DAS` by its measure."""
    measure = store.fingerprint.get("measure")
    common = any(plan.get("noise") == "common" for plan in plans_of(store.fingerprint))
    for kind in (DTRAK, DAS):
        if measure in kind.measures:
            return kind(pairing="matched" if common else "cross")
    return ReTracRidge() if common else ReTrac()
