"""DiffusionTask: model, scheduler and measurement, giving one differentiable value per (sample, timestep) pair."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from retrac_scale.measures import OUTPUTS

Measure = Literal["mse", "l1", "mean_output", "mean_squared_output", "output_l1", "output_l2", "output_linf"]
StateDict = Mapping[str, Tensor]
Checkpoint = StateDict | str | os.PathLike[str] | Callable[[], StateDict]

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors")
IMAGE_KEYS = ("image", "images", "pixel_values", "sample", "input")


class DiffusionTask:
    """What is differentiated: the training loss, or another function, of one sample, timestep and noise draw.

    The model is put into eval mode on `device`; its gradients and weights are left alone.

    Args:
        model: a diffusers denoiser called as `model(noisy, timesteps, **conditioning)`.
        scheduler: its noise scheduler (`add_noise`, `config.num_train_timesteps`, `config.prediction_type`).
        measure: "mse" or "l1", the mean over all entries of the prediction error (the paper's own code uses L1); or a
            function of the prediction alone: its mean ("mean_output", for DAS), mean square ("mean_squared_output", for
            D-TRAK), or norm ("output_l1", "output_l2", "output_linf").
        device: where to compute.
        autocast: None, or "bfloat16" for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        *,
        measure: Measure = "mse",
        device: str = "cpu",
        autocast: Literal["bfloat16"] | None = None,
    ) -> None:
        if measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {get_args(Measure)}, got {measure!r}.")
        if autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast must be None or 'bfloat16', got {autocast!r}.")
        self.model = model.to(device).eval()
        self.scheduler = scheduler
        self.measure: Measure = measure
        self.device = torch.device(device)
        self.autocast = autocast

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T of the scheduler; valid ones are 0 .. T-1."""
        return int(self.scheduler.config.num_train_timesteps)

    def measured(
        self, images: Tensor, timesteps: Tensor, noise: Tensor, conditioning: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The value to be differentiated and the training loss of each pair, from one forward pass.

        Args:
            images: clean samples in the model's range, `[n, ...]`.
            timesteps: int64 `[n]`.
            noise: standard normal, shaped like `images`.
            conditioning: further arguments of the model's forward, batched alike.

        Returns:
            values and losses, float32 `[n]` each; nothing is averaged over the batch. They are the same under "mse" and
            "l1"; otherwise the loss is the mean squared error.
        """
        images, noise, timesteps = (x.to(self.device) for x in (images, noise, timesteps))
        conditioning = {name: value.to(self.device) for name, value in conditioning.items()}
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        with self._precision():
            prediction = self.model(noisy, timesteps, **conditioning, return_dict=False)[0]
        prediction = prediction.float() if self.autocast else prediction
        error = prediction - self._target(images, noise, timesteps)
        entries = error.abs() if self.measure == "l1" else error.square()
        losses = entries.flatten(1).mean(1)
        return OUTPUTS[self.measure](prediction.flatten(1)) if self.measure in OUTPUTS else losses, losses

    def losses(self, images: Tensor, timesteps: Tensor, noise: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The training losses of `measured`, `[n]`."""
        return self.measured(images, timesteps, noise, conditioning)[1]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return images
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(images, noise, timesteps)
            return velocity
        raise ValueError(f"the scheduler's prediction_type {kind!r} is none of 'epsilon', 'sample', 'v_prediction'.")

    def load(self, name: str, checkpoint: Checkpoint) -> str:
        """Load a checkpoint into the model and return the hex digest of its weights.

        Raises:
            ValueError: it does not fit the model; names the checkpoint and the first parameters that differ.
        """
        state = read_checkpoint(name, checkpoint)
        own = self.model.state_dict()
        missing = [key for key in own if key not in state]
        unknown = [key for key in state if key not in own]
        shapes = [
            f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
        if missing or unknown or shapes:
            faults = [f"it lacks {missing[0]}"] * bool(missing) + [f"it has an unknown {unknown[0]}"] * bool(unknown)
            raise ValueError(
                f"checkpoint {name!r} does not fit the model: {'; '.join(faults + shapes[:1])}; "
                "build the model with the configuration that the checkpoint was trained with."
            )
        self.model.load_state_dict(state)
        return weights_digest(self.model.state_dict())

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


def read_checkpoint(name: str, checkpoint: Checkpoint) -> StateDict:
    """The state dict of a checkpoint given as such, as a file or diffusers folder, or as a callable that returns it."""
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if callable(checkpoint):
        return checkpoint()
    path = Path(checkpoint)
    if path.is_dir():
        file = next((path / file for file in WEIGHT_FILES if (path / file).exists()), None)
        if file is None:
            raise ValueError(f"checkpoint {name!r}: the folder {path} holds none of {', '.join(WEIGHT_FILES)}.")
        path = file
    if not path.exists():
        raise ValueError(f"checkpoint {name!r}: there is no file {path}.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: StateDict = load_file(path)
        return tensors
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    weights: StateDict = state.get("model", state)
    return weights


def weights_digest(state: StateDict) -> str:
    """Hex digest of names and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
