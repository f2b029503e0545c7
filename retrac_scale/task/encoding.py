"""Pixels to latents and prompts to embeddings, by a diffusers pipeline."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.task.checkpoints import adapter_scales, weights_digest
from retrac_scale.task.identity import adapters_of
from retrac_scale.task.weights import frugal, with_variant

# what a pipeline's encode_prompt returns, by the names under which the denoiser takes it (diffusers 0.42.1)
_ONE, _MASKED = ("encoder_hidden_states",), ("encoder_hidden_states", "encoder_attention_mask")
EMBEDDINGS: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": _ONE,
    "StableDiffusionControlNetPipeline": _ONE,
    "StableDiffusionInstructPix2PixPipeline": _ONE,
    "StableDiffusionXLPipeline": (*_ONE, None, "added_cond_kwargs.text_embeds"),
    "StableDiffusion3Pipeline": (*_ONE, None, "pooled_projections"),
    "FluxPipeline": (*_ONE, "pooled_projections"),
    "PixArtAlphaPipeline": _MASKED,
    "PixArtSigmaPipeline": _MASKED,
    "SanaPipeline": _MASKED,
    "Lumina2Pipeline": _MASKED,
    "AuraFlowPipeline": _ONE,
    "CogView4Pipeline": _ONE,
    "CogVideoXPipeline": _ONE,
    "LattePipeline": _ONE,
    "WanPipeline": _ONE,
    "LTXPipeline": _MASKED,
    "MochiPipeline": _MASKED,
    "HunyuanVideoPipeline": (*_ONE, "pooled_projections", "encoder_attention_mask"),
}
FRAMES_FIRST = ("CogVideoXPipeline", "CogVideoXTransformer3DModel")
"""Pipelines and denoisers that take latents `[f, c, h, w]` where their VAE gives `[c, f, h, w]`."""
_IN_TIME = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_IN_SPACE = (
    "vae_scale_factor",
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
)

LONGEST = 2**20
"""Tokens; what transformers keeps as a limit where there is none is far beyond."""

SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""What of a VAE's configuration scales its latents."""


def load_pipeline(path: str | os.PathLike[str], variant: str | None = None) -> Any:
    """A diffusers pipeline in float32; parts that a local folder lacks, text encoders say, are None.

    Args:
        path: a folder, or a name on the hub.
        variant: of the weights; None takes those without one, or the only one that there is, such as fp16.

    Raises:
        ValueError: the folder holds no pipeline, or has not that variant.
    """
    from diffusers import DiffusionPipeline  # takes seconds, and who reads a store needs none of it

    folder = Path(path).expanduser()
    absent = {}
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise ValueError(
                f"{path} holds no model_index.json; give the folder of a whole pipeline (unet or transformer, "
                "scheduler, vae, text_encoder), or build DiffusionTask(model, scheduler) from its parts."
            )
        parts = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name, kind in parts.items() if isinstance(kind, list) and not (folder / name).is_dir()}
    place, options = folder if folder.is_dir() else path, {_dtype_name(): torch.float32, **absent}
    if variant is None:
        return with_variant(DiffusionPipeline.from_pretrained, place, **options)
    try:
        return DiffusionPipeline.from_pretrained(place, variant=variant, **frugal(), **options)
    except OSError as error:
        raise ValueError(f"{path} cannot be read in the variant {variant!r}: {error}") from error


@dataclass(frozen=True, eq=False)
class Encoder:
    """The VAE, tokenizers and text encoders of a pipeline.

    Attributes:
        pipeline: as diffusers loads it; a pipeline without VAE leaves samples as they are.
    """

    pipeline: Any

    @property
    def vae(self) -> Any:
        """The VAE, None when the model works on pixels."""
        return getattr(self.pipeline, "vae", None)

    @property
    def reads(self) -> bool:
        """Whether prompts can be encoded."""
        return type(self.pipeline).__name__ in EMBEDDINGS and self.pipeline.tokenizer is not None

    @property
    def cell(self) -> tuple[int, int] | None:
        """How many frames, and how many pixels in each direction, become one latent; None without a VAE."""
        if self.vae is None:
            return None
        halved = len(self.vae.config.get("block_out_channels", [0])) - 1  # where the pipeline does not say it, as DiT's
        kinds = ([getattr(self.pipeline, name, None) for name in names] for names in (_IN_TIME, _IN_SPACE))
        time, space = (next((int(x) for x in found if x), None) for found in kinds)
        return time or 1, space or 2**halved

    def cut(self, prompts: Sequence[str]) -> tuple[int, int]:
        """How many prompts are longer than the tokenizer takes, so that their ends are lost, and its limit in tokens.

        Of tokenizers without a limit of their own, none.
        """
        tokenizer = self.pipeline.tokenizer
        most = int(tokenizer.model_max_length)
        if most > LONGEST:
            return 0, most
        different = {one: len(tokenizer(one, verbose=False).input_ids) for one in dict.fromkeys(prompts)}
        return sum(different[one] > most for one in prompts), most

    @cached_property
    def digests(self) -> dict[str, str]:
        """Hex digests of VAE and text encoders, weights and the scale of latents, by their names in the pipeline."""
        found = {}
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module) and (name == "vae" or name.startswith("text_encoder")):
                scale = repr([self.vae.config.get(key) for key in SCALES]) if name == "vae" else ""
                adapters = adapters_of(part)
                scale += f"{adapter_scales(part)} {adapters}" if adapters else ""
                found[name] = weights_digest(part.state_dict(), scale)
        return found

    @torch.no_grad()
    def latents(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Pixels `[3, ...]` of one sample in -1 .. 1 become latents `[c, ...]` on the CPU, scaled as for training.

        The mode of the VAE's posterior is taken, where training draws from it anew each time.
        """
        vae = self.vae.to(device)
        encoded = vae.encode(pixels[None].to(device, vae.dtype))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        shift = _per_channel(vae, "latents_mean", latents, vae.config.get("shift_factor") or 0.0)
        spread = _per_channel(vae, "latents_std", latents, 1.0)
        latents = (latents - shift) / spread * (vae.config.get("scaling_factor") or 1.0)
        if type(self.pipeline).__name__ in FRAMES_FIRST:
            latents = latents.transpose(1, 2)
        return latents[0].float().cpu()  # type: ignore[no-any-return]

    @torch.no_grad()
    def embeddings(self, prompt: str, size: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """What the denoiser is told of a prompt, without the batch axis, on the CPU.

        Args:
            prompt: of one sample.
            size: height and width of its pixels, which SDXL is told too.
            device: where to compute.

        Raises:
            ValueError: it is not known how this pipeline's embeddings reach its denoiser.
        """
        kind = type(self.pipeline).__name__
        if not self.reads:
            raise ValueError(
                f"this {kind} has no tokenizer, or it is not known how its prompts reach the denoiser; compute the "
                "embeddings with its encode_prompt and give them in the items, named as the denoiser's arguments."
            )
        self.pipeline.to(device)
        options = {
            "prompt": prompt,
            "prompt_2": None,
            "prompt_3": None,
            "device": device,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        taken = inspect.signature(self.pipeline.encode_prompt).parameters
        returned = self.pipeline.encode_prompt(**{name: value for name, value in options.items() if name in taken})
        found = {
            name: value[0].cpu()
            for name, value in zip(EMBEDDINGS[kind], returned, strict=False)
            if name is not None and value is not None
        }
        if "added_cond_kwargs.text_embeds" in found:  # original size, crop, target size: uncropped
            height, width = size
            found["added_cond_kwargs.time_ids"] = torch.tensor([height, width, 0, 0, height, width]).float()
        return found


def _per_channel(vae: Any, name: str, latents: Tensor, otherwise: float) -> Tensor | float:
    """A statistic that the VAE keeps for each latent channel, in its configuration or as a buffer."""
    values = vae.config[name] if name in vae.config else getattr(vae, name, None)
    if values is None:
        return otherwise
    return torch.as_tensor(values).to(latents).reshape(1, -1, *(1,) * (latents.ndim - 2))


def _dtype_name() -> str:
    """What diffusers calls the weights' type: where it resolves both names, the older one is warned of."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
