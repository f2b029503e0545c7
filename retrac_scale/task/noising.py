"""How samples are noised, and what the model should predict: diffusion and flow matching.

A timestep is an integer t in 0 .. T-1, more noise the larger it is, for either kind.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from retrac_scale.task.denoisers import is_a
from retrac_scale.task.told_time import DATA_TIME, TO_DATA, UNIT_TIME, time_factor

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Noising(Protocol):
    """One of `Diffusion` and `Flow`; timesteps are int64 `[n]`, samples and noise `[n, ...]`."""

    def noisy(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model sees, `[n, ...]`."""

    def target(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What it should predict, `[n, ...]`."""

    def times(self, timesteps: Tensor) -> Tensor:
        """What it is told of the timesteps, `[n]`."""

    @property
    def described(self) -> str:
        """What the model is told and what it predicts, in symbols, for the fingerprints of stores."""


@dataclass(frozen=True, eq=False)
class Diffusion:
    """x_t = sqrt(a_t) x + sqrt(1 - a_t) e (Ho et al. 2020); the target is e, x, or v = sqrt(a_t) e - sqrt(1 - a_t) x.

    Attributes:
        alphas_cumprod: a_t, `[T]`.
        prediction_type: "epsilon", "sample" or "v_prediction" (Salimans and Ho 2022).
        log_sigma_time: the model is told log(s_t) / 4 instead of t, with s_t^2 = (1 - a_t) / a_t: Karras et al. 2022,
            whose (x + s_t e) / sqrt(1 + s_t^2) is this x_t.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    log_sigma_time: bool = False

    def noisy(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Noising`."""
        signal, share = self._roots(samples, timesteps)
        return signal * samples + share * noise

    def target(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Noising`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return samples
        signal, share = self._roots(samples, timesteps)
        return signal * noise - share * samples

    def times(self, timesteps: Tensor) -> Tensor:
        """The timesteps themselves, int64 `[n]`, or float32 `[n]`."""
        return -self.snr(timesteps).log() / 8 if self.log_sigma_time else timesteps

    @property
    def described(self) -> str:
        """See `Noising`."""
        return f"{'log(s) / 4' if self.log_sigma_time else 't'} -> {self.prediction_type}"

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal to noise ratio a_t / (1 - a_t), `[n]`."""
        signal = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return signal / (1 - signal)

    def _roots(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        signal = _as(self.alphas_cumprod, like, timesteps)
        return signal**0.5, (1 - signal) ** 0.5


@dataclass(frozen=True, eq=False)
class Flow:
    """x_t = (1 - s_t) x + s_t e with target e - x (Lipman et al. 2023; Esser et al. 2024, section 3).

    The timestep t stands for the noise level s_t = shift u / (1 + (shift - 1) u) with u = (t + 1) / T: entry
    T - 1 - t of a FlowMatchEulerDiscreteScheduler's training table.

    Attributes:
        sigmas: s_t, float32 `[T]`, rising.
        unit_time: the model is told s_t instead of T s_t.
        data_time: it is told the data's share, 1 - s_t, in place of the noise's.
        to_data: it predicts x - e.
        factor: what the time is multiplied with.
    """

    sigmas: Tensor
    unit_time: bool = False
    data_time: bool = False
    to_data: bool = False
    factor: float = 1.0

    def noisy(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Noising`."""
        sigma = _as(self.sigmas, samples, timesteps)
        return (1 - sigma) * samples + sigma * noise

    def target(self, samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Noising`."""
        return samples - noise if self.to_data else noise - samples

    def times(self, timesteps: Tensor) -> Tensor:
        """float32 `[n]`."""
        sigma = self.sigmas.to(timesteps.device)[timesteps]
        told = 1 - sigma if self.data_time else sigma
        return told * self.factor if self.unit_time else told * (self.factor * len(self.sigmas))

    @property
    def described(self) -> str:
        """See `Noising`."""
        share = "(1 - s)" if self.data_time else "s"
        factor = "" if self.factor == 1 else f"{self.factor:g} "
        return f"{factor}{share if self.unit_time else f'T {share}'} -> {'x - e' if self.to_data else 'e - x'}"


FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")


def noising_of(scheduler: Any, model: nn.Module) -> Diffusion | Flow:
    """How a model with this scheduler is trained.

    A model of a class that is not of diffusers, nor a subclass of one, is told T s_t in flow matching, as the training
    table of its scheduler says; T (1 - s_t) where that says `invert_sigmas`, and it then predicts x - e.

    Raises:
        ValueError: the scheduler is of another kind, or tells two things of the training.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    if is_flow(scheduler):
        _check_flow(scheduler)
        unit, data, to_data = (is_a(model, "diffusers", *names) for names in (UNIT_TIME, DATA_TIME, TO_DATA))
        turned = bool(config.get("invert_sigmas"))
        return Flow(flow_sigmas(config), unit, data or turned, to_data or turned, time_factor(model))
    if prediction not in PREDICTIONS:
        raise ValueError(f"the scheduler's prediction_type {prediction!r} is none of {', '.join(PREDICTIONS)}.")
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(f"{kind} is neither a diffusion scheduler with alphas_cumprod nor one of flow matching.")
    noising = Diffusion(scheduler.alphas_cumprod, prediction, log_sigma_time=_tells_log_sigma(config))
    _check_own_noise(scheduler, noising)
    return noising


def _tells_log_sigma(config: Any) -> bool:
    """Whether a model is told log(s_t) / 4 (Stable Video Diffusion): by v alone, as in EulerDiscreteScheduler."""
    return (config.get("timestep_type"), config.get("prediction_type")) == ("continuous", "v_prediction")


def _check_own_noise(scheduler: Any, noising: Diffusion) -> None:
    """Refuse a scheduler whose add_noise is not of diffusers and does something else than its table says."""
    add_noise = getattr(scheduler, "add_noise", None)
    if add_noise is None or str(add_noise.__module__).startswith("diffusers."):
        return
    steps = torch.tensor([0, len(noising.alphas_cumprod) // 2, len(noising.alphas_cumprod) - 1])
    clean, noise = torch.tensor([[0.3], [-0.8], [0.5]]), torch.tensor([[-0.6], [0.4], [0.9]])
    if not torch.allclose(add_noise(clean, noise, steps), noising.noisy(clean, noise, steps), rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{type(scheduler).__name__}.add_noise does something else than sqrt(a) x + sqrt(1 - a) e with the "
            "scheduler's alphas_cumprod, which is what is measured; give one whose table describes the training."
        )


def _check_flow(scheduler: Any) -> None:
    config, kind = scheduler.config, type(scheduler).__name__
    prediction, shift = config.get("prediction_type", "flow_prediction"), config.get("shift")
    if prediction != "flow_prediction":
        raise ValueError(
            f"the {kind}'s configuration says use_flow_sigmas and prediction_type {prediction!r}; only models of flow "
            "matching that predict the flow are known."
        )
    if "stages" in config:
        raise ValueError(f"{kind} noises in {config['stages']} stages of other sizes, which is not known here.")
    if shift is not None and getattr(scheduler, "shift", shift) != shift:
        raise ValueError(
            f"the {kind}'s shift was set to {scheduler.shift}, its configuration says {shift}; make it with the shift "
            "of the training: from_config(scheduler.config, shift=...)."
        )


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching."""
    config = scheduler.config
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return bool(flow) or is_a(scheduler, "diffusers", *FLOW_SCHEDULERS)


def flow_sigmas(config: Any) -> Tensor:
    """Noise levels s_t of a flow matching scheduler's training table, float32 `[T]`, rising with t.

    With `use_dynamic_shifting` training shifts nothing, as in diffusers: the shift there is the sampler's.
    """
    count = int(config["num_train_timesteps"])
    sigmas = torch.arange(1, count + 1, dtype=torch.float32) / count
    shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", config.get("flow_shift", 1.0)))
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def timestep_numbers(scheduler: Any, times: Tensor) -> Tensor:
    """The integers t, int64 `[n]`, of what flow matching loops call timesteps: `scheduler.timesteps[indices]`.

    The nearest noise level is taken, so that a loop that draws them from an interval can be recorded too.
    """
    sigmas = flow_sigmas(scheduler.config).to(torch.float64)
    wanted = times.to(torch.float64) / len(sigmas)
    above = torch.searchsorted(sigmas, wanted).clamp(max=len(sigmas) - 1)
    below = (above - 1).clamp(min=0)
    nearer = (wanted - sigmas[below]).abs() < (sigmas[above] - wanted).abs()
    return torch.where(nearer, below, above)


def _as(table: Tensor, like: Tensor, timesteps: Tensor) -> Tensor:
    """Entries of a table, broadcast over samples."""
    return table.to(like)[timesteps].reshape(-1, *(1,) * (like.ndim - 1))


def scheduler_spec(scheduler: Any) -> dict[str, Any]:
    """What of the scheduler determines the noisy images, as JSON has it: an array, trained_betas say, is a list."""
    config = dict(scheduler.config)
    keys = (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "trained_betas",
        "snr_shift_scale",
        "prediction_type",
        "rescale_betas_zero_snr",
        "shift",
        "flow_shift",
        "use_flow_sigmas",
        "use_dynamic_shifting",
    )
    found = {key: config[key] for key in keys if key in config}
    plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in found.items()}
    # of continuous ones alone: stores that say nothing of it were told integers
    told = {"timestep_type": config["timestep_type"]} if _tells_log_sigma(config) else {}
    return {"class": type(scheduler).__name__, **plain, **told}


def table_digest(scheduler: Any) -> str:
    """Of noise levels that are not those that the scheduler's configuration makes; empty where they are."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or is_flow(scheduler):
        return ""
    # diffusers takes what was given by position for a default, and would make another scheduler of it
    told = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    try:
        made = type(scheduler).from_config(told).alphas_cumprod
    except (AttributeError, TypeError):  # a scheduler that is not made by a configuration
        made = torch.zeros(0)
    if made.shape == table.shape and torch.allclose(made.to(table), table, rtol=1e-5, atol=1e-8):
        return ""
    return hashlib.blake2b(table.detach().cpu().double().numpy().tobytes(), digest_size=8).hexdigest()
