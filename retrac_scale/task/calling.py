"""How denoisers of different classes are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.task.checkpoints import adapter_scales, weights_digest
from retrac_scale.task.denoisers import class_of_diffusers, is_a, settings, takes
from retrac_scale.task.identity import adapters_of
from retrac_scale.task.state import state_of
from retrac_scale.task.told_time import OWN_PIPELINES, OWN_WAY, TIMES_T, TO_DATA, UNIT_TIME, own_way

Call = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""call(model, noisy [n, c, ...], times [n], conditioning) -> prediction shaped like the clean sample."""

FLUX_GUIDANCE = 3.5
"""Default of --guidance_scale in diffusers' train_dreambooth_flux.py."""
LTX_SCALE = (8 / 25, 32, 32)
"""What LTXPipeline scales places by: frames and pixels to a latent's, at its default of 25 frames a second."""
ROTATED = {
    "AllegroTransformer3DModel": "image_rotary_emb",
    "CogVideoXTransformer3DModel": "image_rotary_emb",
    "ConsisIDTransformer3DModel": "image_rotary_emb",
    "HunyuanDiT2DModel": "image_rotary_emb",
    "StableAudioDiTModel": "rotary_embedding",
}
"""Classes that their pipelines tell of positions by an argument, and that answer otherwise without it."""


def call_model(model: nn.Module, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Call a denoiser by its own signature.

    Args:
        model: called with the noisy sample first and the time under its name; classes in `LAYOUTS` get tokens.
        noisy: `[n, c, ...]`.
        times: `[n]`.
        conditioning: further arguments, batched alike; "added_cond_kwargs.text_embeds" goes into a nested dict, and
            "concatenated" is appended to the noisy sample's channels (inpainting, instruct-pix2pix, depth).

    Returns:
        the prediction `[n, c, ...]`; variances that some models predict in further channels are left off.

    Raises:
        ValueError: the model needs rotary embeddings of positions, which only its pipeline knows how to make, or the
            conditioning has an argument that is not the items' to give.
    """
    rotated = next((argument for kind, argument in ROTATED.items() if is_a(model, "diffusers", kind)), None)
    if rotated is not None and settings(model).get("use_rotary_positional_embeddings", True):
        raise ValueError(
            f"{type(model).__name__} is told of positions by {rotated}=, as its pipeline makes it; write a "
            "call(model, noisy, times, conditioning) that passes it, and give DiffusionTask(call=...) that."
        )
    arguments: dict[str, Any] = {}
    for name, value in conditioning.items():
        *outer, inner = name.split(".")
        place = arguments
        for key in outer:
            place = place.setdefault(key, {})
        place[inner] = value
    concatenated = arguments.pop("concatenated", None)
    inputs = noisy if concatenated is None else torch.cat([noisy, concatenated.to(noisy.dtype)], 1)
    layout = layout_of(model)
    if layout is None:
        prediction = _called(model, inputs, times, arguments)
    else:
        tokens, added = layout.arguments(model, inputs, arguments)
        prediction = layout.unpack(_called(model, tokens, times, {**added, **arguments}), noisy)
    return prediction.narrow(1, 0, noisy.shape[1]) if prediction.shape[1] == 2 * noisy.shape[1] else prediction


def check_callable(model: nn.Module, pipeline: object = None) -> None:
    """Raise ValueError for a model, or one of a pipeline, that `call_model` would call by a convention not its own.

    That is one of a class of diffusers that has a convention of its own, or that this release does not know; and one of
    a class of one's own that holds a denoiser of diffusers, or is called like one, whose pipeline tells it of time, or
    gives it images, in a way of its own.
    """
    advice = "write a call(model, noisy, times, conditioning), and give DiffusionTask(call=...) that."
    if why := own_way(model):
        raise ValueError(f"{class_of_diffusers(model)} {why}; {advice}")
    for kind, why in OWN_PIPELINES.items():
        if is_a(pipeline, "diffusers", kind):
            raise ValueError(f"{kind}: {why}; {advice}")
    special = {*UNIT_TIME, *TO_DATA, *OWN_WAY, *LAYOUTS, *ROTATED}
    if class_of_diffusers(model) in special | TIMES_T:
        return
    within = [type(part).__name__ for part in model.modules() if is_a(part, "diffusers", *special)]
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__name__ in special]
    if within or names:
        relation = f"holds a {within[0]}" if within else f"is called {names[0]} but is not the one of diffusers"
        raise ValueError(
            f"the model's class, {type(model).__name__}, {relation}, so how it takes images and time is not known; "
            f"give that model itself or a subclass, or {advice}"
        )


def _called(model: nn.Module, inputs: Tensor, times: Tensor, arguments: dict[str, Any]) -> Tensor:
    taken = takes(model)
    for name in arguments:
        if name in taken.reserved:
            raise ValueError(
                f"the model's argument {name!r} is not the items' to give: it is the noisy sample or time."
            )
    given = arguments if taken.time is None else {taken.time: times, **arguments}
    if "return_dict" in inspect.signature(model.forward).parameters:
        given = {**given, "return_dict": False}
    output = model(inputs, **given) if taken.time is not None else model(inputs, times, **given)
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    return prediction


@dataclass(frozen=True)
class Layout:
    """How images become a model's tokens and back.

    Attributes:
        arguments: (model, images, further arguments) -> tokens `[n, s, c]` and what the model needs to know of them.
        unpack: (tokens, images of the shape that they should have) -> images.
    """

    arguments: Callable[[nn.Module, Tensor, Mapping[str, Any]], tuple[Tensor, dict[str, Any]]]
    unpack: Callable[[Tensor, Tensor], Tensor]


def _pack(images: Tensor) -> Tensor:
    """`[n, c, h, w]` -> `[n, h w / 4, 4 c]`, patches of 2 x 2, channels before positions."""
    n, c, h, w = images.shape
    return images.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def _unpack(tokens: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return tokens.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def _flux(model: nn.Module, images: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    n, _, h, w = images.shape
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    added = {"img_ids": places.to(images), "txt_ids": images.new_zeros(arguments["encoder_hidden_states"].shape[1], 3)}
    if settings(model).get("guidance_embeds"):
        added["guidance"] = images.new_full((n,), FLUX_GUIDANCE)
    return _pack(images), added


def _qwen(model: nn.Module, images: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    return _pack(images), {"img_shapes": [[(1, images.shape[2] // 2, images.shape[3] // 2)]] * len(images)}


def _ltx(model: nn.Module, images: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    frames, height, width = images.shape[2:]
    shape = {"num_frames": frames, "height": height, "width": width}
    return images.flatten(2).mT, {**shape, "rope_interpolation_scale": LTX_SCALE}


LAYOUTS = {
    "FluxTransformer2DModel": Layout(_flux, _unpack),
    "ChromaTransformer2DModel": Layout(_flux, _unpack),
    "QwenImageTransformer2DModel": Layout(_qwen, _unpack),
    "LTXVideoTransformer3DModel": Layout(_ltx, lambda tokens, like: tokens.mT.reshape(like.shape)),
}


def layout_of(model: nn.Module) -> Layout | None:
    """How a model's tokens are made of images, None for one that takes images."""
    return next((layout for kind, layout in LAYOUTS.items() if is_a(model, "diffusers", kind)), None)


@dataclass(frozen=True, eq=False)
class ThroughUNet:
    """The call of a ControlNet that is trained beside a frozen U-Net.

    `DiffusionTask(controlnet, scheduler, call=ThroughUNet(unet))`; items bring "controlnet_cond" beside the U-Net's
    own conditioning.
    """

    unet: nn.Module

    def __post_init__(self) -> None:
        self.unet.requires_grad_(False).eval()

    @cached_property
    def digest(self) -> str:
        """Hex digest of the U-Net's weights, adapters and FreeU's factors or an IP adapter's scales."""
        adapters = adapters_of(self.unet)
        beside = f"{adapter_scales(self.unet)} {adapters}" if adapters else ""
        state = {name: value for name, value in state_of(self.unet).items() if not name.startswith("torch.")}
        return weights_digest(self.unet.state_dict(), f"{beside}{state}" if state else beside)

    def __call__(self, model: nn.Module, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """See `Call`."""
        own = {key: value for key, value in conditioning.items() if key != "controlnet_cond"}
        down, middle = model(noisy, times, **conditioning, return_dict=False)
        prediction: Tensor = self.unet.to(noisy.device)(
            noisy,
            times,
            **own,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return prediction
