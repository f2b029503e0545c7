"""DiffusionTask: model, scheduler and measurement, giving one differentiable value per (sample, timestep) pair."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrac_scale.task.accepted import Accepted
from retrac_scale.task.adapters import without_adapters
from retrac_scale.task.calling import Call, ThroughUNet, call_model, check_callable
from retrac_scale.task.checkpoints import COMPONENTS, Checkpoint, add_adapters, configuration, load_checkpoint
from retrac_scale.task.concepts import AGAINST, UNADAPTED, Told, Unadapted
from retrac_scale.task.denoisers import image_shape, takes, unwrapped
from retrac_scale.task.encoding import Encoder, load_pipeline
from retrac_scale.task.full_precision import in_float32
from retrac_scale.task.identity import adapters_of, code_known, code_of, known_by
from retrac_scale.task.items import CLASS_LABELS, Item
from retrac_scale.task.measures import OUTPUTS, AnyMeasure, checked, measure_name, measured_values
from retrac_scale.task.memory_order import channels_last, takes_any_order
from retrac_scale.task.noising import noising_of, table_digest
from retrac_scale.task.regions import REGION, cell_weights
from retrac_scale.task.state import state_of
from retrac_scale.task.weighting import Weighting, check_weighting


class DiffusionTask:
    """What is differentiated: the training loss, or another function, of one sample, timestep and noise draw.

    The model is put into eval mode on `device`; its gradients and weights are left alone.

    Args:
        model: a denoiser, called as `call` does; wrappers of training (DDP, torch.compile, PEFT's) are taken off it.
        scheduler: its noise scheduler, of diffusion (`alphas_cumprod`, `config.prediction_type`) or flow matching;
            what a sampler changes in it does not matter.
        measure: "mse" or "l1", the mean over all entries of the prediction error (the paper's own code uses L1), or
            `Huber(delta)` or `PseudoHuber(c)`; or a function of the prediction alone: its mean ("mean_output", for
            DAS), mean square ("mean_squared_output", for D-TRAK), or norm ("output_l1", "output_l2", "output_linf").
            Several, as a tuple, are sketched from one forward pass; where one is needed, the first counts.
        device: where to compute.
        autocast: None, or "bfloat16" for mixed precision.
        weighting: of the losses over timesteps, `MinSNR(gamma)`, `SD3Weighting(scheme)`; None is 1.
        encoder: VAE and text encoders, for items with pixels and prompts in place of latents and embeddings.
        call: how the model is called, `call(model, noisy, times, conditioning) -> prediction`; times are what
            `noising.times` says.

    Raises:
        ValueError: an option is unknown, or does not fit the scheduler, or it is not known how to call the model.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any,
        *,
        measure: AnyMeasure | Sequence[AnyMeasure] = "mse",
        device: str = "cpu",
        autocast: Literal["bfloat16"] | None = None,
        weighting: Weighting | None = None,
        encoder: Encoder | None = None,
        call: Call = call_model,
    ) -> None:
        given = checked(measure)
        if autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast must be None or 'bfloat16', got {autocast!r}.")
        model = unwrapped(model)
        if call is call_model:
            check_callable(model, None if encoder is None else encoder.pipeline)
        self.model = model.to(device).eval()
        # a few per cent faster; mixed precision is slower
        self._channels_last = torch.device(device).type == "cpu" and autocast is None and takes_any_order(model)
        self.scheduler = scheduler
        self.noising = noising_of(scheduler, model)
        self.weighting = weighting
        for one in () if weighting is None else (one for one in given if one not in OUTPUTS):
            check_weighting(weighting, self.noising, one)  # type: ignore[arg-type]
        self.encoder = encoder
        self.call = call
        self._items = Accepted(self.model, call, encoder, autocast, takes(self.model))
        self._measures: dict[str, AnyMeasure] = {measure_name(one, weighting): one for one in given}
        self.device = torch.device(device)
        self.autocast = autocast

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured, in words for the fingerprints of stores."""
        return tuple(self._measures)

    @property
    def measure(self) -> str:
        """The first of `measures`."""
        return self.measures[0]

    @property
    def told(self) -> Told:
        """What the model can be told of a concept."""
        return self._items.told

    @property
    def picture_shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of the pictures that the model, or the VAE before it, takes; None if not known."""
        shape = image_shape(self.model)
        if shape is None or self.encoder is None or self.encoder.cell is None:
            return shape
        _, height, width = shape
        space = self.encoder.cell[1]
        return int(self.encoder.vae.config.in_channels), space * height, space * width

    def picture_of(self, sample: Sequence[int]) -> tuple[int, int, int] | None:
        """`picture_shape` of the pictures that a store's samples `[c, h, w]`, pixels or latents, were made of."""
        shape = image_shape(self.model)
        if self.encoder is None or self.encoder.cell is None or len(sample) != 3:
            return self.picture_shape
        channels, space = int(self.encoder.vae.config.in_channels), self.encoder.cell[1]
        _, height, width = sample
        if sample[0] == channels and tuple(sample) != shape:
            return channels, height, width
        return channels, space * height, space * width

    def only(self, *measures: str) -> DiffusionTask:
        """The same task with some of its measures, in the order given."""
        one = copy.copy(self)
        one._measures = {name: self._measures[name] for name in measures}
        return one

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T of the scheduler; valid ones are 0 .. T-1."""
        return int(self.scheduler.config.num_train_timesteps)

    def measured(
        self, images: Tensor, timesteps: Tensor, noise: Tensor, conditioning: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The value to be differentiated and the training loss of each pair, for each measure, from one forward pass.

        Args:
            images: clean samples in the model's range, `[n, ...]`.
            timesteps: int64 `[n]`.
            noise: standard normal, shaped like `images`.
            conditioning: further arguments of the model's forward, batched alike; under `REGION` how much of each
                entry counts, after `AGAINST` the arguments that a concept is compared with, and under `UNADAPTED`
                anything if it is compared with the model without adapters.

        Returns:
            for each of `measures` values and losses, float32 `[n]` each; nothing is averaged over the batch. They are
            the same where the error is measured; for a function of the prediction the loss is the mean squared error.
        """
        images, noise = (x.to(self.device, self._items.dtype) for x in (images, noise))
        timesteps = timesteps.to(self.device)
        given = {name: value.to(self.device) for name, value in conditioning.items()}
        region = given.pop(REGION, None)
        against = {name[len(AGAINST) :]: given.pop(name) for name in list(given) if name.startswith(AGAINST)}
        noisy, target = self.noising.noisy(images, noise, timesteps), self.noising.target(images, noise, timesteps)
        if given.pop(UNADAPTED, None) is not None:
            with torch.no_grad(), without_adapters(self.model):
                other: Tensor | None = self._predicted(noisy, timesteps, given)
            prediction = self._predicted(noisy, timesteps, given)
        elif not against:
            prediction, other = self._predicted(noisy, timesteps, given), None
        else:  # both sides of a sample are rows of it, one after the other
            told = {name: torch.stack([given[name], against[name]], 1).flatten(0, 1) for name in given}
            both = self._predicted(noisy.repeat_interleave(2, 0), timesteps.repeat_interleave(2, 0), told)
            prediction, other = both[0::2], both[1::2]
        if prediction.shape != target.shape:
            raise ValueError(
                f"the model predicts {tuple(prediction.shape)} where {tuple(target.shape)} is expected; give a "
                "call(model, noisy, times, conditioning) that returns a prediction shaped like the samples."
            )
        factors = None if self.weighting is None else self.weighting(self.noising, timesteps)
        weights = 1.0 if region is None else region.expand_as(target)
        return [measured_values(one, prediction, target, weights, factors, other) for one in self._measures.values()]

    def _predicted(self, noisy: Tensor, timesteps: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        told = {name: self._as_weights(value) for name, value in given.items()}
        with self._precision():
            prediction = self.call(self.model, noisy, self.noising.times(timesteps), told)
        return prediction.float() if self.autocast else prediction

    def losses(self, images: Tensor, timesteps: Tensor, noise: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The training losses of `measured`, `[n]`, for the first measure."""
        return self.measured(images, timesteps, noise, conditioning)[0][1]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return channels_last(self.model) if self._channels_last else contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def in_full_precision(self) -> contextlib.AbstractContextManager[None]:
        """The model in float32 for a while, if its weights are of 16 bits and no `call=` has others beside it."""
        narrow = self._items.dtype.itemsize < 4 and self.call is call_model
        return in_float32(self.model) if narrow else contextlib.nullcontext()

    def load(self, name: str, checkpoint: Checkpoint) -> str:
        """Load a checkpoint into the model and return the hex digest of its weights; see `load_checkpoint`."""
        loader = None if self.encoder is None else type(self.encoder.pipeline)
        return load_checkpoint(self.model, name, checkpoint, loader)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        component: str | None = None,
        lora: str | os.PathLike[str] | None = None,
        variant: str | None = None,
        **options: Any,
    ) -> DiffusionTask:
        """The task of a diffusers folder: its denoiser and scheduler, with VAE and text encoders for the items.

        Args:
            path: a folder with model_index.json, or a name on the hub.
            component: which part is differentiated: "unet", "transformer", "controlnet" (beside a frozen U-Net),
                "transformer_2"; None takes the U-Net or the transformer.
            lora: a file or folder of LoRA adapters; they alone are differentiated, and checkpoints may be such files.
                As in diffusers, alpha is the rank where the file's metadata do not tell it.
            variant: of the weights, "fp16" say, where a folder holds several; None takes those without one, or the one
                that is there.
            options: as for `DiffusionTask`.

        Raises:
            ValueError: the folder holds no pipeline, or it has no such component.
        """
        pipeline = load_pipeline(path, variant)
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        name = component or next((name for name in COMPONENTS if name in parts), "")
        if name not in parts:
            raise ValueError(f"{path} has no {name or ' or '.join(COMPONENTS)}; its parts are {', '.join(parts)}.")
        for part in parts.values():
            part.requires_grad_(part is parts[name])
        if name == "controlnet":
            options.setdefault("call", ThroughUNet(parts["unet"]))
        if lora is not None:
            add_adapters(parts[name], lora, type(pipeline))
        return cls(parts[name], pipeline.scheduler, encoder=Encoder(pipeline), **options)

    @property
    def frozen(self) -> dict[str, str]:
        """What values depend on beside weights: hex digests of vae, text_encoder, unet; the model's configuration."""
        parts = {**({} if self.encoder is None else self.encoder.digests), **configuration(self.model)}
        return {**parts, "unet": self.call.digest} if isinstance(self.call, ThroughUNet) else parts

    @property
    def forward(self) -> dict[str, Any]:
        """How predictions are made of samples, beside weights and configuration: for the fingerprints of stores.

        A store of an earlier release has none of it.
        """
        return {
            "call": known_by(self.call, without=[*self.model.modules()]),
            "code": {**code_of(self.model), **code_known(self.weighting)},
            "adapters": adapters_of(self.model),
            "state": state_of(self.model),
            "autocast": self.autocast,
            "noising": f"{self.noising.described} {table_digest(self.scheduler)}".strip(),
        }

    def read_item(self, number: Any, item: Any) -> Item:
        """Take a dataset item apart and check it, without encoding anything; what the model does not take is left out.

        Args:
            number: names the item in errors.
            item: see `take_apart`.

        Raises:
            ValueError: naming the item, the shape found and the shape expected.
        """
        return self._items.read(number, item)

    def check_item(self, number: Any, item: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What the model takes of a dataset item: the clean sample and its conditioning.

        Pixels are encoded by the VAE unless they come under the key "latents", prompts by the text encoders.

        Raises:
            ValueError: see `read_item`.
        """
        return self.encoded(self.read_item(number, item))

    def encoded(self, found: Item) -> tuple[Tensor, dict[str, Tensor]]:
        """What `check_item` gives for an item that was read."""
        sample, conditioning = found.sample, self._told(found)
        if isinstance(found.against, Unadapted):
            conditioning[UNADAPTED] = torch.zeros(())
        elif found.against is not None:
            other = self._told(found.against)
            if other.keys() != conditioning.keys():
                raise ValueError(
                    f"a concept is told by {sorted(conditioning)} and compared with {sorted(other)}; give both sides "
                    "the same arguments."
                )
            conditioning |= {f"{AGAINST}{name}": value for name, value in other.items()}
        if self.encoder is not None and self._items.encodes(found):
            sample = self.encoder.latents(sample, self.device)
        if found.region is not None:
            conditioning[REGION] = cell_weights(found.region, sample.shape, self._items.frames_first)
        return sample.to(self._items.dtype), conditioning

    def _told(self, found: Item) -> dict[str, Tensor]:
        """What the model is told of an item, beside sample and time."""
        told = dict(found.conditioning)
        if found.label is not None:
            told[CLASS_LABELS] = found.label
        if self.encoder is not None and found.prompt is not None:
            factor = getattr(self.encoder.pipeline, "vae_scale_factor", 1) if found.encoded else 1
            size = [factor * side for side in found.sample.shape[-2:]]
            told = {**self.encoder.embeddings(found.prompt, size, self.device), **told}
        # in the weights' type: what is noised and predicted in half precision loses a per cent
        return {key: self._as_weights(value) for key, value in told.items()}

    def _as_weights(self, value: Tensor) -> Tensor:
        return value.to(self._items.dtype) if value.is_floating_point() else value
