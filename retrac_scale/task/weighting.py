"""How losses are weighted over timesteps, and measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from retrac_scale.task.noising import Diffusion, Flow


class Weighting(Protocol):
    """A frozen dataclass, whose repr goes into the store's fingerprint."""

    def __call__(self, noising: Diffusion | Flow, timesteps: Tensor) -> Tensor:
        """Factors of the losses, `[n]`, at timesteps `[n]`; ValueError if it does not apply to the noising."""


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) in terms of the clean sample (Hang et al., arXiv 2303.09556).

    Divided by SNR for a model that predicts e, by SNR + 1 for one that predicts v: `--snr_gamma` of diffusers'
    train_text_to_image.py. Without gamma, SNR itself: train_unconditional.py's weights for prediction_type "sample".
    """

    gamma: float | None = 5.0

    def __post_init__(self) -> None:
        if self.gamma is not None:
            _check_positive("MinSNR", "gamma", self.gamma)

    def __call__(self, noising: Diffusion | Flow, timesteps: Tensor) -> Tensor:
        """See `Weighting`."""
        if not isinstance(noising, Diffusion):
            raise ValueError("MinSNR weights losses of diffusion, not of flow matching; use SD3Weighting.")
        snr = noising.snr(timesteps)
        gamma = math.inf if self.gamma is None else self.gamma
        if noising.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)
        clean = snr.clamp(max=gamma)
        return clean / (snr + 1) if noising.prediction_type == "v_prediction" else clean


@dataclass(frozen=True)
class SD3Weighting:
    """Weights by noise level s of diffusers' flow matching examples (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Args:
        scheme: "sigma_sqrt" is s^-2, "cosmap" 2 / (pi (1 - 2 s + 2 s^2)); "none", "logit_normal" and "mode", which
            choose timesteps, weight none: `--weighting_scheme`.
        precondition_outputs: the error is that of the clean sample, s times the velocity's, so that its squares are
            weighted by s^2 more, and nothing but squares can be: the default of train_dreambooth_sd3.py, absent from
            the examples of other models.
    """

    scheme: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"] = "none"
    precondition_outputs: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"):
            raise ValueError(f"SD3Weighting knows no scheme {self.scheme!r}; see its docstring.")

    def __call__(self, noising: Diffusion | Flow, timesteps: Tensor) -> Tensor:
        """See `Weighting`."""
        if not isinstance(noising, Flow):
            raise ValueError("SD3Weighting weights losses of flow matching, not of diffusion; use MinSNR.")
        sigma = noising.sigmas.to(timesteps.device)[timesteps]
        weights = torch.ones_like(sigma)
        if self.scheme == "sigma_sqrt":
            weights = sigma**-2
        elif self.scheme == "cosmap":
            weights = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return weights * sigma**2 if self.precondition_outputs else weights


@dataclass(frozen=True)
class Huber:
    """Half the square up to delta, linear beyond it: torch's huber_loss, for delta 1 its smooth_l1_loss."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("Huber", "delta", self.delta)

    def __call__(self, error: Tensor) -> Tensor:
        """Of every entry."""
        return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.delta)


@dataclass(frozen=True)
class PseudoHuber:
    """2 c (sqrt(error^2 + c^2) - c), diffusers' `--loss_type huber` with a constant c (Khrapov, arXiv 2403.16728)."""

    c: float = 0.1

    def __post_init__(self) -> None:
        _check_positive("PseudoHuber", "c", self.c)

    def __call__(self, error: Tensor) -> Tensor:
        """Of every entry."""
        return 2 * self.c * ((error.square() + self.c**2).sqrt() - self.c)


Loss = Literal["mse", "l1"] | Huber | PseudoHuber


def _check_positive(kind: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{kind} needs a {name} above 0, got {value}.")


def check_loss(loss: Any) -> None:
    """Raise ValueError unless it is a `Loss`."""
    if not isinstance(loss, (Huber, PseudoHuber)) and loss not in ("mse", "l1"):
        raise ValueError(f"the loss in training must be 'mse', 'l1', Huber() or PseudoHuber(), got {loss!r}.")


def check_weighting(weighting: Weighting, noising: Diffusion | Flow, measure: Any) -> None:
    """Raise ValueError if a weighting does not apply to losses of this noising, or to what is measured of the error."""
    weighting(noising, torch.zeros(1, dtype=torch.int64))
    absolute = measure == "l1" or isinstance(measure, (Huber, PseudoHuber))
    if absolute and getattr(weighting, "precondition_outputs", False):
        raise ValueError(f"precondition_outputs weights squared errors, not {measure}; use measure='mse'.")
