"""Estimators whose training rows are preconditioned by a ridge over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np

from retrac_scale.estimators.base import Estimator
from retrac_scale.estimators.inner import ReTrac
from retrac_scale.estimators.ridge import Damping, Ridge
from retrac_scale.store import SketchStore
from retrac_scale.store.encoding import Float32, Float64

ALL = slice(None)


@dataclass(frozen=True)
class TRAK(Estimator):
    """sum_c w_c phi(c,q)^T K_c^-1 phi(c,i), phi = mean_t g, K_c = sum_i phi(c,i) phi(c,i)^T + lambda I.

    Park, Georgiev, Ilyas, Leclerc, Madry 2023 (arXiv 2303.14186), with the loss as the model output, as used for
    diffusion models. TRAK's own code divides by the number of checkpoints and rescales each checkpoint's inverse, which
    leaves the order of a single checkpoint's scores as it is.

    Args:
        damping: lambda relative to the mean eigenvalue of sum_i phi phi^T, that is to its trace over k; "auto" chooses
            by Ledoit and Wolf's rule, see `retrac_scale.estimators.ridge.shrinkage`.
        squared: answer with the square of the score (summed over checkpoints), so that strong proponents and strong
            opponents both come first.
    """

    damping: Damping = "auto"
    squared: bool = False

    def __post_init__(self) -> None:
        if self.damping == "auto":
            return
        if not isinstance(self.damping, Real) or isinstance(self.damping, bool) or not 0 <= self.damping < np.inf:
            raise ValueError(f'damping must be "auto" or a number of 0 or more, got {self.damping!r}.')
        if not isinstance(self.damping, int):  # NumPy's numbers are not JSON's
            object.__setattr__(self, "damping", float(self.damping))

    def vectors(self, sketches: Float32, norms: Float32) -> Float32:
        """The gradients themselves."""
        return sketches

    def train_rows(
        self, store: SketchStore, checkpoint: str, samples: slice = ALL, ridge: Ridge | None = None
    ) -> Float32:
        """K^-1 phi, `[n, k]`, or what a subclass makes of it."""
        if ridge is None:
            raise ValueError(f"{type(self).__name__} needs the ridge over all training rows; use build_index.")
        return self.finish(store, checkpoint, samples, ridge).astype(np.float32)

    def finish(self, store: SketchStore, checkpoint: str, samples: slice, ridge: Ridge) -> Float64:
        """The training rows in float64."""
        return ridge.apply(self.rows(store, checkpoint, samples))


@dataclass(frozen=True)
class RelatIF(TRAK):
    """TRAK divided by |K^-1 phi(c,i)| at each checkpoint (Barshan, Brunet, Dziugaite 2020, arXiv 2003.11630)."""

    def finish(self, store: SketchStore, checkpoint: str, samples: slice, ridge: Ridge) -> Float64:
        """K^-1 phi over its own length; zero where that is zero."""
        solved = super().finish(store, checkpoint, samples, ridge)
        return _divided(solved, np.linalg.norm(solved, axis=1))


@dataclass(frozen=True)
class RenormIF(TRAK):
    """TRAK divided by |phi(c,i)| at each checkpoint (Hammoudeh and Lowd 2022, arXiv 2201.10055)."""

    def finish(self, store: SketchStore, checkpoint: str, samples: slice, ridge: Ridge) -> Float64:
        """K^-1 phi over the length of phi; zero where that is zero."""
        rows = self.rows(store, checkpoint, samples).astype(np.float64)
        return _divided(ridge.apply(rows), np.linalg.norm(rows, axis=1))


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
    are the roots of the training store's losses, so that the loss must be a mean squared error.
    """

    measures: ClassVar[tuple[str, ...]] = ("mean_output",)
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    squared: bool = True

    def finish(self, store: SketchStore, checkpoint: str, samples: slice, ridge: Ridge) -> Float64:
        """K^-1 ubar r."""
        residuals = np.sqrt(store.losses(checkpoint, samples).astype(np.float64))
        r = _divided(residuals, np.linalg.norm(residuals, axis=1)).mean(1)
        solved: Float64 = ridge.apply(ReTrac().rows(store, checkpoint, samples)) * r[:, None]
        return solved


def _divided(rows: Float64, lengths: Float64) -> Float64:
    """Rows `[n, k]` over lengths `[n]`, zero where a length is."""
    divided: Float64 = rows / np.where(lengths > 0, lengths, np.inf)[:, None]
    return divided
