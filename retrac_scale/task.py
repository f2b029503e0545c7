"""DiffusionTask: model, scheduler and measurement, giving one differentiable value per (sample, timestep) pair."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from retrac_scale.calling import Call, call_model
from retrac_scale.checkpoints import Checkpoint, load_checkpoint
from retrac_scale.noising import noising_of
from retrac_scale.weighting import Huber, PseudoHuber, Weighting

Measure = Literal["mse", "l1"]
IMAGE_KEYS = ("image", "images", "pixel_values", "sample", "input")


class DiffusionTask:
    """What is differentiated: the training loss of one sample at one timestep under one noise draw.

    The model is put into eval mode on `device`; its gradients and weights are left alone.

    Args:
        model: a denoiser, called as `call` does.
        scheduler: its noise scheduler, of diffusion (`alphas_cumprod`, `config.prediction_type`) or flow matching;
            what a sampler changes in it does not matter.
        measure: "mse" or "l1", the mean over all entries of the prediction error (the paper's own code uses L1), or
            `Huber(delta)` or `PseudoHuber(c)`.
        device: where to compute.
        autocast: None, or "bfloat16" for mixed precision.
        weighting: of the losses over timesteps, `MinSNR(gamma)`, `SD3Weighting(scheme)`; None is 1.
        call: how the model is called, `call(model, noisy, times, conditioning) -> prediction`.

    Raises:
        ValueError: an option is unknown, or does not fit the scheduler.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        *,
        measure: Measure | Huber | PseudoHuber = "mse",
        device: str = "cpu",
        autocast: Literal["bfloat16"] | None = None,
        weighting: Weighting | None = None,
        call: Call = call_model,
    ) -> None:
        if not isinstance(measure, (Huber, PseudoHuber)) and measure not in get_args(Measure):
            raise ValueError(f"measure must be Huber(), PseudoHuber() or one of {get_args(Measure)}, got {measure!r}.")
        if autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast must be None or 'bfloat16', got {autocast!r}.")
        self.model = model.to(device).eval()
        self.scheduler = scheduler
        self.noising = noising_of(scheduler, model)
        self.weighting = weighting
        if weighting is not None:
            weighting(self.noising, torch.zeros(1, dtype=torch.int64))
        self.call = call
        self._measure = measure
        self.device = torch.device(device)
        self.autocast = autocast

    @property
    def measure(self) -> str:
        """What is measured, in words for the fingerprint of a store."""
        return str(self._measure) if self.weighting is None else f"{self._measure} x {self.weighting}"

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T of the scheduler; valid ones are 0 .. T-1."""
        return int(self.scheduler.config.num_train_timesteps)

    def losses(self, images: Tensor, timesteps: Tensor, noise: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """One loss per pair.

        Args:
            images: clean samples in the model's range, `[n, ...]`.
            timesteps: int64 `[n]`.
            noise: standard normal, shaped like `images`.
            conditioning: further arguments of the model's forward, batched alike.

        Returns:
            float32 `[n]`, each the mean over the entries of the prediction; nothing is averaged over the batch.
        """
        images, noise, timesteps = (x.to(self.device) for x in (images, noise, timesteps))
        conditioning = {name: value.to(self.device) for name, value in conditioning.items()}
        noisy = self.noising.noisy(images, noise, timesteps)
        with self._precision():
            prediction = self.call(self.model, noisy, self.noising.times(timesteps), conditioning)
        error = (prediction.float() if self.autocast else prediction) - self.noising.target(images, noise, timesteps)
        losses: Tensor = self._entries(error).flatten(1).mean(1)
        return losses if self.weighting is None else losses * self.weighting(self.noising, timesteps).to(losses.dtype)

    def _entries(self, error: Tensor) -> Tensor:
        if not isinstance(self._measure, str):
            return self._measure(error)
        return error.square() if self._measure == "mse" else error.abs()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def load(self, name: str, checkpoint: Checkpoint) -> str:
        """Load a checkpoint into the model and return the hex digest of its weights; see `load_checkpoint`."""
        return load_checkpoint(self.model, name, checkpoint)

    def check_item(self, sample: Any, item: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Split a dataset item into image and conditioning, and check the image against the model's configuration.

        Raises:
            ValueError: naming the sample, the shape found and the shape expected.
        """
        image, conditioning = self._split(sample, item)
        expected = self._image_shape()
        if expected is not None and tuple(image.shape) != expected:
            raise ValueError(
                f"dataset item {sample} has shape {tuple(image.shape)}, but the model takes {expected}; "
                "resize or convert it in the dataset."
            )
        if not image.is_floating_point():
            raise ValueError(
                f"dataset item {sample} has dtype {image.dtype}; give floating point in the range that the model was "
                "trained on, usually -1 .. 1."
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"dataset item {sample} has NaN or infinite entries; repair it or leave it out.")
        return image, conditioning

    def _split(self, sample: Any, item: Any) -> tuple[Tensor, dict[str, Tensor]]:
        extra: Any = None
        if isinstance(item, Mapping):
            key = next((key for key in IMAGE_KEYS if key in item), None)
            if key is None:
                raise ValueError(f"dataset item {sample} has keys {list(item)}; name the image one of {IMAGE_KEYS}.")
            image, extra = item[key], {k: v for k, v in item.items() if k not in (key, "id")}
        elif isinstance(item, (tuple, list)):
            image, extra = item[0], item[1] if len(item) > 1 else None
        else:
            image = item
        if not isinstance(image, Tensor):
            raise ValueError(
                f"dataset item {sample} gives a {type(image).__name__} for the image; give a torch tensor."
            )
        if extra is not None and not isinstance(extra, Mapping):
            extra = {"class_labels": extra} if self._takes_labels() else None
        return image, {name: torch.as_tensor(value) for name, value in (extra or {}).items()}

    def _takes_labels(self) -> bool:
        config = self._config()
        return any(
            config.get(key) is not None for key in ("num_class_embeds", "class_embed_type", "num_embeds_ada_norm")
        )

    def _image_shape(self) -> tuple[int, ...] | None:
        config = self._config()
        channels, size = config.get("in_channels"), config.get("sample_size")
        if channels is None or size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return int(channels), int(height), int(width)

    def _config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = getattr(self.model, "config", {})
        return config if isinstance(config, Mapping) else {}
