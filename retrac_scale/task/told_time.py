"""What diffusers' own pipelines tell the denoisers of each class of time, and which way these predict.

Read from the pipelines of diffusers 0.42.1. T is the number of timesteps, s the noise's share in flow matching; x the
sample, e the noise.
"""

from __future__ import annotations

from torch import nn

from retrac_scale.task.denoisers import class_of_diffusers, is_a, settings

TIMES_T = frozenset(
    {
        "AllegroTransformer3DModel",
        "AudioLDM2UNet2DConditionModel",
        "BriaFiboTransformer2DModel",
        "BriaTransformer2DModel",
        "ChronoEditTransformer3DModel",
        "CogVideoXTransformer3DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "ConsisIDTransformer3DModel",
        "DiTTransformer2DModel",
        "DreamLiteTransformer2DModel",
        "DreamLiteUNetModel",
        "EasyAnimateTransformer3DModel",
        "ErnieImageTransformer2DModel",
        "HeliosTransformer3DModel",
        "HiDreamImageTransformer2DModel",
        "HunyuanDiT2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "I2VGenXLUNet",
        "JoyImageEditPlusTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "Kandinsky3UNet",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6SRTransformer3DModel",
        "Kandinsky6Transformer3DModel",
        "LTXVideoTransformer3DModel",
        "LatteTransformer3DModel",
        "MochiTransformer3DModel",
        "MotifVideoTransformer3DModel",
        "PixArtTransformer2DModel",
        "PriorTransformer",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "SanaVideoTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "StableAudioDiTModel",
        "Transformer2DModel",
        "TransformerTemporalModel",
        "UNet1DModel",
        "UNet2DConditionModel",
        "UNet2DModel",
        "UNet3DConditionModel",
        "UNetControlNetXSModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
        "WanAnimate2Transformer3DModel",
        "WanAnimateTransformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
    }
)
"""Told t in diffusion and T s in flow matching, as schedulers have them."""
UNIT_TIME = frozenset(
    {
        "AuraFlowTransformer2DModel",
        "BriaFibo2Transformer2DModel",
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "Flux3Transformer2DModel",
        "FluxTransformer2DModel",
        "Ideogram4Transformer2DModel",
        "Krea2Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "LongCatImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MiniMaxMusic3Transformer1DModel",
        "NucleusMoEImageTransformer2DModel",
        "OvisImageTransformer2DModel",
        "PRXTransformer2DModel",
        "QwenImage21Transformer2DModel",
        "QwenImageTransformer2DModel",
        "StableAudio3DiTModel",
        "ZImageTransformer2DModel",
    }
)
"""Told s in place of T s."""
DATA_TIME = frozenset(
    {
        "Ideogram4Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MiniMaxMusic3Transformer1DModel",
        "MochiTransformer3DModel",
        "ZImageTransformer2DModel",
    }
)
"""Told 1 - s in place of s."""
TO_DATA = DATA_TIME | {"HiDreamImageTransformer2DModel", "NucleusMoEImageTransformer2DModel"}
"""Predict x - e in place of e - x."""
OWN_WAY = {
    "AceStepTransformer1DModel": "is told a second time, timestep_r",
    "AnyFlowFARTransformer3DModel": "is told a second time, r_timestep",
    "AnyFlowTransformer3DModel": "is told a second time, r_timestep",
    "Cosmos3OmniTransformer": "is told the time of every modality",
    "CosmosTransformer3DModel": "is told s / (1 + s), s, or log(s) / 4, and preconditioned, depending on the pipeline",
    "GlmImageTransformer2DModel": "is told T s - 1",
    "LTX2VideoTransformer3DModel": "denoises video and sound together, each with a time of its own",
    "MiniMaxH3Transformer3DModel": "is told the time of every row of its tokens",
    "MiniMaxMusic3RVQDepthDecoder": "predicts tokens and denoises nothing",
    "MotionAdapter": "holds layers of another model and denoises nothing",
    "OmniGenTransformer2DModel": "is told what its pipeline's scheduler is set to, s or 1 - s",
    "RFD4ProteinaTransformer": "denoises a backbone and latents together, each with a time of its own",
    "SanaWMLTX2RefinerTransformer3DModel": "is told the time of every token",
    "SanaWMTransformer3DModel": "is told the time of every frame",
    "StableCascadeUNet": "is told a ratio between 0 and 1",
    "T5FilmDecoder": "is told t / T, after the encodings and the tokens",
    "UVit2DModel": "predicts masked tokens and is told of no time",
}
"""No convention of ours is theirs, so that a `call=` must say it."""

OWN_PIPELINES = {"PRXPixelPipeline": "its transformer predicts the image in place of the flow"}
"""Of whose denoisers the class alone says something else."""


def own_way(model: nn.Module) -> str:
    """Why a model of a class of diffusers cannot be told of time by a convention; empty if it can."""
    kind = class_of_diffusers(model)
    if kind is None or kind in TIMES_T | UNIT_TIME | TO_DATA:
        return ""
    return OWN_WAY.get(kind, "is none of the denoisers that this release knows")


def time_factor(model: nn.Module) -> float:
    """What the pipeline of a model multiplies its time by: Sana's alone do, by an entry of the configuration."""
    return (
        float(settings(model).get("timestep_scale", 1)) if is_a(model, "diffusers", "SanaTransformer2DModel") else 1.0
    )
