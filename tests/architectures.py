"""A tiny configuration of every denoiser class of diffusers, and their gradients by the oracle.

Sizes follow diffusers' own tests (Apache 2.0), smaller where they can be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

import retrac_scale as rs
from retrac_scale.gradients.nested import mapped, tensors
from tests.oracle import gradient

SAMPLES = 2


@dataclass(frozen=True)
class Architecture:
    """A tiny configuration of a denoiser and what its forward takes."""

    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]  # normal, per sample; the first axis is folded into the batch
    timestep: str = "timestep"
    given: dict[str, Any] = field(default_factory=dict)  # per sample, as above
    shared: dict[str, Any] = field(default_factory=dict)  # the same for all samples
    name: str = ""  # the class, where the case is called otherwise
    double: bool = True  # whether all of its forward can run in float64
    samples: int = SAMPLES
    refused: str = ""  # what check_model says of it


TEXT = (1, 6, 8)
UNET = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CROSS = UNET | {"cross_attention_dim": 8, "attention_head_dim": 2}
VIDEO = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "out_channels": 2, "num_layers": 2}
WAN = VIDEO | {
    "attention_head_dim": 12,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "cross_attn_norm": True,
    "rope_max_seq_len": 16,
}
ANYFLOW = WAN | {"gate_value": 0.25, "deltatime_type": "r"}
FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}
JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 8,
    "num_layers": 1,
    "rope_dim_list": [4, 6, 6],
}
FLEX = "cannot be differentiated on this device.*FlexAttention does not support backward on CPU"
GENERATOR = torch.Generator().manual_seed(2)


def reference_cache(states: Tensor) -> Any:
    """What a reference pass leaves for the denoising passes of WanAnimate2Transformer3DModel."""
    cache = WanAnimate2KVCache(1)
    cache.get(0).store(states, states)
    return cache


PLACES = torch.cartesian_prod(*map(torch.arange, (1, 4, 4, 1))).float()
IDS = {"img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)), "txt_ids": torch.zeros(6, 3)}

ARCHITECTURES = {
    "UNet1DModel": Architecture(
        {
            "in_channels": 2,
            "out_channels": 2,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
            "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
        },
        {"sample": (1, 2, 16)},
        timestep="",
        given={"timestep": torch.tensor([0.2, 0.7])},
    ),
    "UNet2DModel": Architecture(
        UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        {"sample": (1, 2, 8, 8)},
    ),
    "UNet2DModel, resnet resampling, class labels": Architecture(
        UNET
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "class_embed_type": None,
            "num_class_embeds": 5,
        },
        {"sample": (1, 2, 8, 8)},
        given={"class_labels": torch.tensor([3, 1])},
        name="UNet2DModel",
    ),
    "UNet2DConditionModel": Architecture(
        CROSS
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "use_linear_projection": True,
        },
        {"sample": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "UNet3DConditionModel": Architecture(
        CROSS
        | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        {"sample": (1, 2, 3, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "UNetMotionModel": Architecture(
        UNET
        | {
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "motion_max_seq_length": 4,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        {"sample": (1, 2, 3, 8, 8), "encoder_hidden_states": (3, 6, 8)},
    ),
    "UNetSpatioTemporalConditionModel": Architecture(
        {
            "in_channels": 2,
            "out_channels": 2,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        {"sample": (1, 3, 2, 8, 8), "encoder_hidden_states": (1, 1, 8), "added_time_ids": (1, 3)},
    ),
    "Kandinsky3UNet": Architecture(
        {
            "in_channels": 2,
            "time_embedding_dim": 4,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 4,
            "encoder_hid_dim": 8,
        },
        {"sample": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
        given={"encoder_attention_mask": torch.ones(SAMPLES, 6)},
    ),
    "StableCascadeUNet": Architecture(
        {
            "in_channels": 2,
            "out_channels": 2,
            "conditioning_dim": 8,
            "block_out_channels": (8, 8),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
            "switch_level": (False,),
            "clip_text_in_channels": 8,
            "clip_text_pooled_in_channels": 8,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
            "timestep_ratio_embedding_dim": 8,
        },
        {
            "sample": (1, 2, 8, 8),
            "clip_text_pooled": (1, 1, 8),
            "clip_text": TEXT,
            "clip_img": (1, 1, 8),
        },
        timestep="",
        given={"timestep_ratio": torch.tensor([0.002, 0.03])},
    ),
    "UVit2DModel": Architecture(
        {
            "hidden_size": 8,
            "hidden_dropout": 0.0,
            "cond_embed_dim": 8,
            "micro_cond_encode_dim": 2,
            "micro_cond_embed_dim": 10,
            "encoder_hidden_size": 8,
            "vocab_size": 9,
            "codebook_size": 8,
            "in_channels": 8,
            "block_out_channels": 8,
            "num_res_blocks": 1,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "attention_dropout": 0.0,
            "intermediate_size": 16,
            "block_num_heads": 2,
            "sample_size": 4,
        },
        {"encoder_hidden_states": TEXT, "pooled_text_emb": (1, 8), "micro_conds": (1, 5)},
        timestep="",
        given={"input_ids": torch.arange(32).reshape(SAMPLES, 4, 4) % 9},
    ),
    "DiTTransformer2DModel": Architecture(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 2,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 5,
        },
        {"hidden_states": (1, 2, 8, 8)},
        given={"class_labels": torch.tensor([3, 1])},
    ),
    "PixArtTransformer2DModel": Architecture(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 2,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "use_additional_conditions": False,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
        shared={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "PriorTransformer": Architecture(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 2,
            "embedding_dim": 8,
            "num_embeddings": 6,
            "additional_embeddings": 4,
        },
        {"hidden_states": (1, 8), "proj_embedding": (1, 8), "encoder_hidden_states": TEXT},
    ),
    "SD3Transformer2DModel": Architecture(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 2,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "out_channels": 2,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT, "pooled_projections": (1, 8)},
    ),
    "FluxTransformer2DModel": Architecture(
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "guidance_embeds": True,
        },
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT, "pooled_projections": (1, 8), "guidance": (1,)},
        shared=IDS,
    ),
    "ChromaTransformer2DModel": Architecture(
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT},
        shared=IDS,
    ),
    "AuraFlowTransformer2DModel": Architecture(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 2,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "out_channels": 2,
            "pos_embed_max_size": 16,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "SanaTransformer2DModel": Architecture(
        {
            "patch_size": 1,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "LuminaNextDiT2DModel": Architecture(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 2,
            "hidden_size": 24,
            "num_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "learn_sigma": False,
            "cross_attention_dim": 8,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
        given={"encoder_mask": torch.ones(SAMPLES, 6)},
        shared={
            "image_rotary_emb": torch.randn(384, 384, 4, generator=torch.Generator().manual_seed(0)),
            "cross_attention_kwargs": {},
        },
    ),
    "Lumina2Transformer2DModel": Architecture(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 2,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 8,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
        given={"encoder_attention_mask": torch.ones(SAMPLES, 6, dtype=torch.bool)},
    ),
    "HunyuanVideoTransformer3DModel": Architecture(
        {
            "in_channels": 2,
            "out_channels": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "guidance_embeds": True,
            "text_embed_dim": 8,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        {
            "hidden_states": (1, 2, 1, 4, 4),
            "encoder_hidden_states": TEXT,
            "pooled_projections": (1, 8),
            "guidance": (1,),
        },
        given={"encoder_attention_mask": torch.ones(SAMPLES, 6)},
    ),
    "QwenImageTransformer2DModel": Architecture(
        {
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "axes_dims_rope": (2, 2, 4),
        },
        {"hidden_states": (1, 16, 8), "encoder_hidden_states": TEXT},
        given={"encoder_hidden_states_mask": torch.ones(SAMPLES, 6, dtype=torch.int64)},
        shared={"img_shapes": [(1, 4, 4)] * SAMPLES},
    ),
    "CogView4Transformer2DModel": Architecture(
        {
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
        given={
            "original_size": torch.full((SAMPLES, 2), 64),
            "target_size": torch.full((SAMPLES, 2), 64),
            "crop_coords": torch.zeros(SAMPLES, 2, dtype=torch.int64),
        },
    ),
    "CogVideoXTransformer3DModel": Architecture(
        VIDEO
        | {
            "time_embed_dim": 4,
            "text_embed_dim": 8,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
        },
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "WanTransformer3DModel": Architecture(
        WAN,
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "WanVACETransformer3DModel": Architecture(
        VIDEO
        | {
            "attention_head_dim": 12,
            "text_dim": 8,
            "freq_dim": 8,
            "ffn_dim": 16,
            "cross_attn_norm": True,
            "rope_max_seq_len": 16,
            "vace_layers": [0, 1],
            "vace_in_channels": 6,
        },
        {
            "hidden_states": (1, 2, 2, 8, 8),
            "encoder_hidden_states": TEXT,
            "control_hidden_states": (1, 6, 2, 8, 8),
        },
    ),
    "AllegroTransformer3DModel": Architecture(
        VIDEO
        | {
            "num_layers": 1,
            "cross_attention_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 2,
            "caption_channels": 8,
        },
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "LTXVideoTransformer3DModel": Architecture(
        VIDEO | {"num_layers": 1, "cross_attention_dim": 16, "caption_channels": 8},
        {"hidden_states": (1, 32, 2), "encoder_hidden_states": TEXT},
        given={"encoder_attention_mask": torch.ones(SAMPLES, 6, dtype=torch.bool)},
        shared={"num_frames": 2, "height": 4, "width": 4},
    ),
    "MochiTransformer3DModel": Architecture(
        VIDEO | {"pooled_projection_dim": 8, "text_embed_dim": 8, "time_embed_dim": 4, "max_sequence_length": 6},
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
        given={"encoder_attention_mask": torch.ones(SAMPLES, 6, dtype=torch.bool)},
    ),
    "LatteTransformer3DModel": Architecture(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 1,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 2,
        },
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "HunyuanDiT2DModel": Architecture(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 2,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 6,
            "text_len_t5": 6,
            "activation_fn": "gelu-approximate",
        },
        {
            "hidden_states": (1, 2, 8, 8),
            "encoder_hidden_states": TEXT,
            "encoder_hidden_states_t5": TEXT,
            "image_meta_size": (1, 6),
        },
        given={
            "style": torch.zeros(SAMPLES, dtype=torch.int64),
            "text_embedding_mask": torch.ones(SAMPLES, 6),
            "text_embedding_mask_t5": torch.ones(SAMPLES, 6),
        },
        shared={"image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)]},
    ),
    "I2VGenXLUNet": Architecture(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
        },
        {
            "sample": (1, 4, 2, 8, 8),
            "image_latents": (1, 4, 2, 8, 8),
            "image_embeddings": (1, 8),
            "encoder_hidden_states": TEXT,
        },
        given={"fps": torch.tensor([8.0, 16.0])},
    ),
    "DreamLiteUNetModel": Architecture(
        {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnNoSelfAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "block_out_channels": (8, 16),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        {"sample": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "DreamLiteTransformer2DModel": Architecture(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        },
        {"hidden_states": (1, 8, 4, 4), "encoder_hidden_states": TEXT},
        timestep="",
    ),
    "Transformer2DModel": Architecture(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "in_channels": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        },
        {"hidden_states": (1, 8, 4, 4), "encoder_hidden_states": TEXT},
        timestep="",
    ),
    "AceStepTransformer1DModel": Architecture(
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "sliding_window": 16,
        },
        {"hidden_states": (1, 8, 8), "encoder_hidden_states": (1, 6, 16), "context_latents": (1, 8, 16)},
        given={"timestep_r": torch.tensor([0.1, 0.4])},
    ),
    "AnyFlowTransformer3DModel": Architecture(
        ANYFLOW,
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
        timestep="",
        given={
            "timestep": torch.tensor([[200.0, 300.0], [700.0, 800.0]]),
            "r_timestep": torch.full((SAMPLES, 2), 90.0),
        },
    ),
    "AnyFlowFARTransformer3DModel": Architecture(
        ANYFLOW | {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
        timestep="",
        given={
            "timestep": torch.tensor([[200.0, 300.0], [700.0, 800.0]]),
            "r_timestep": torch.full((SAMPLES, 2), 90.0),
        },
        shared={"chunk_partition": [1, 1]},
        refused=FLEX,
    ),
    "BriaTransformer2DModel": Architecture(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT},
        shared=IDS,
    ),
    "BriaFiboTransformer2DModel": Architecture(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "text_encoder_dim": 8,
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 6, 16)},
        given={"text_encoder_layers": [torch.randn(SAMPLES, 6, 8, generator=GENERATOR) for _ in range(2)]},
        shared=IDS,
    ),
    "BriaFibo2Transformer2DModel": Architecture(
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (8, 4, 4),
            "axes_lens": (64, 16, 16),
        },
        {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 2, 6, 8)},
        timestep="",
        given={"timestep": torch.tensor([0.2, 0.7])},
    ),
    "ChronoEditTransformer3DModel": Architecture(
        WAN | {"rope_temporal_skip_len": 8, "rope_max_seq_len": 64},
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "CogView3PlusTransformer2DModel": Architecture(
        {
            "in_channels": 2,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "out_channels": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
        given={
            "original_size": torch.full((SAMPLES, 2), 64),
            "target_size": torch.full((SAMPLES, 2), 64),
            "crop_coords": torch.zeros(SAMPLES, 2, dtype=torch.int64),
        },
    ),
    "ConsisIDTransformer3DModel": Architecture(
        VIDEO
        | {
            "num_layers": 1,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT, "id_cond": (1, 2)},
        given={"id_vit_hidden": [torch.randn(SAMPLES, 2, 2, generator=GENERATOR)]},
    ),
    "CosmosTransformer3DModel": Architecture(
        VIDEO
        | {
            "attention_head_dim": 12,
            "mlp_ratio": 2,
            "text_embed_dim": 8,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
            "patch_size": (1, 2, 2),
            "concat_padding_mask": False,
            "extra_pos_embed_type": "learnable",
        },
        {"hidden_states": (1, 2, 1, 8, 8), "encoder_hidden_states": TEXT},
        shared={"fps": 30},
        double=False,
    ),
    "Cosmos3OmniTransformer": Architecture(
        {
            "head_dim": 6,
            "hidden_act": "relu2",
            "hidden_size": 12,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "qk_norm_for_text": False,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        {},
        timestep="",
        shared={
            "input_ids": torch.tensor([1, 2]),
            "text_indexes": torch.tensor([0, 1]),
            "position_ids": torch.arange(6).repeat(3, 1),
            "und_len": 2,
            "sequence_length": 6,
            "vision_tokens": [torch.randn(1, 2, 1, 2, 2, generator=GENERATOR)],
            "vision_token_shapes": [(1, 2, 2)],
            "vision_sequence_indexes": torch.arange(2, 6),
            "vision_mse_loss_indexes": torch.arange(2, 6),
            "vision_timesteps": torch.full((4,), 300.0),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
        samples=1,
    ),
    "EasyAnimateTransformer3DModel": Architecture(
        VIDEO
        | {
            "attention_head_dim": 16,
            "mmdit_layers": 1,
            "patch_size": 2,
            "sample_height": 8,
            "sample_width": 8,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "time_position_encoding_type": "3d_rope",
        },
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "ErnieImageTransformer2DModel": Architecture(
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 8,
            "rope_axes_dim": (8, 4, 4),
        },
        {"hidden_states": (1, 4, 4, 4), "text_bth": TEXT},
        given={"text_lens": torch.full((SAMPLES,), 6)},
    ),
    "Flux2Transformer2DModel": Architecture(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": [2, 2, 2, 2],
        },
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT, "guidance": (1,)},
        shared={"img_ids": PLACES, "txt_ids": torch.zeros(6, 4)},
    ),
    "Flux3Transformer2DModel": Architecture(
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "timestep_channels": 8,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT},
        timestep="",
        given={"timestep": torch.tensor([0.2, 0.7])},
        shared={"img_ids": PLACES, "txt_ids": torch.zeros(6, 4)},
        double=False,
    ),
    "GlmImageTransformer2DModel": Architecture(
        {
            "patch_size": 2,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 8,
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
        given={
            "prior_token_id": torch.arange(32).reshape(SAMPLES, 16) % 7,
            "prior_token_drop": torch.zeros(SAMPLES, 16, dtype=torch.bool),
            "target_size": torch.full((SAMPLES, 2), 8.0),
            "crop_coords": torch.zeros(SAMPLES, 2),
        },
    ),
    "HeliosTransformer3DModel": Architecture(
        {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
        | {
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
        },
        {
            "hidden_states": (1, 2, 2, 8, 8),
            "encoder_hidden_states": TEXT,
            "latents_history_short": (1, 2, 1, 8, 8),
            "latents_history_mid": (1, 2, 1, 8, 8),
            "latents_history_long": (1, 2, 4, 8, 8),
        },
        given={
            "indices_hidden_states": torch.ones(SAMPLES, 2),
            "indices_latents_history_short": torch.ones(SAMPLES, 1),
            "indices_latents_history_mid": torch.ones(SAMPLES, 1),
            "indices_latents_history_long": torch.ones(SAMPLES, 4),
        },
    ),
    "HiDreamImageTransformer2DModel": Architecture(
        {
            "patch_size": 2,
            "in_channels": 2,
            "out_channels": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        {
            "hidden_states": (1, 2, 8, 8),
            "encoder_hidden_states_t5": TEXT,
            "pooled_embeds": (1, 8),
        },
        timestep="timesteps",
        given={"encoder_hidden_states_llama3": [torch.randn(SAMPLES, 6, 4, generator=GENERATOR) for _ in range(2)]},
    ),
    "HunyuanVideo15Transformer3DModel": Architecture(
        VIDEO
        | {
            "num_layers": 1,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 8,
            "text_embed_2_dim": 8,
            "image_embed_dim": 4,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        {"hidden_states": (1, 2, 1, 4, 4), "encoder_hidden_states": TEXT, "encoder_hidden_states_2": TEXT},
        given={
            "encoder_attention_mask": torch.ones(SAMPLES, 6),
            "encoder_attention_mask_2": torch.ones(SAMPLES, 6),
            "image_embeds": torch.zeros(SAMPLES, 3, 4),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Architecture(
        {
            "in_channels": 2,
            "out_channels": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 8,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
            "image_condition_type": None,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        {
            "hidden_states": (1, 2, 3, 4, 4),
            "encoder_hidden_states": TEXT,
            "pooled_projections": (1, 8),
            "image_embeds": TEXT,
            "guidance": (1,),
            "latents_clean": (1, 2, 2, 4, 4),
            "latents_history_2x": (1, 2, 2, 4, 4),
            "latents_history_4x": (1, 2, 8, 4, 4),
        },
        given={"encoder_attention_mask": torch.ones(SAMPLES, 6)},
        shared={
            "indices_latents": torch.ones(3),
            "indices_latents_clean": torch.ones(2),
            "indices_latents_history_2x": torch.ones(2),
            "indices_latents_history_4x": torch.ones(8),
        },
    ),
    "HunyuanImageTransformer2DModel": Architecture(
        {
            "in_channels": 2,
            "out_channels": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "guidance_embeds": True,
            "text_embed_dim": 8,
            "text_embed_2_dim": 8,
            "rope_axes_dim": (4, 4),
        },
        {
            "hidden_states": (1, 2, 4, 4),
            "encoder_hidden_states": TEXT,
            "encoder_hidden_states_2": TEXT,
            "guidance": (1,),
        },
        given={
            "encoder_attention_mask": torch.ones(SAMPLES, 6, dtype=torch.bool),
            "encoder_attention_mask_2": torch.ones(SAMPLES, 6, dtype=torch.bool),
        },
    ),
    "Ideogram4Transformer2DModel": Architecture(
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "adaln_dim": 8,
            "llm_features_dim": 8,
            "mrope_section": (2, 1, 1),
        },
        {"hidden_states": (1, 8, 8), "encoder_hidden_states": (1, 8, 8)},
        given={
            "position_ids": torch.arange(8)[None, :, None].expand(SAMPLES, 8, 3).contiguous(),
            "segment_ids": torch.ones(SAMPLES, 8, dtype=torch.int64),
            "indicator": torch.tensor([[3, 3, 3, 3, 2, 2, 2, 2]] * SAMPLES),
        },
    ),
    "JoyImageEditTransformer3DModel": Architecture(
        JOY, {"hidden_states": (1, 4, 1, 4, 4), "encoder_hidden_states": TEXT}
    ),
    "JoyImageEditPlusTransformer3DModel": Architecture(
        JOY,
        {"hidden_states": (1, 2, 4, 1, 2, 2), "encoder_hidden_states": TEXT},
        shared={"shape_list": [[(1, 1, 1), (1, 1, 1)]] * SAMPLES},
    ),
    "Kandinsky5Transformer3DModel": Architecture(
        {
            "in_visual_dim": 2,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "out_visual_dim": 2,
            "model_dim": 16,
            "ff_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
        },
        {"hidden_states": (1, 2, 4, 4, 2), "encoder_hidden_states": TEXT, "pooled_projections": (1, 8)},
        shared={
            "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
            "text_rope_pos": torch.arange(6),
        },
        double=False,
    ),
    "Kandinsky6Transformer3DModel": Architecture(
        {
            "in_visual_dim": 2,
            "out_visual_dim": 2,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 16,
            "ff_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
            "visual_cond": False,
            "in_audio_dim": 2,
            "out_audio_dim": 2,
        },
        {
            "hidden_states": (1, 2, 4, 4, 2),
            "encoder_hidden_states": TEXT,
            "pooled_projections": (1, 8),
            "audio_hidden_states": (1, 5, 2),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Architecture(
        {
            "in_visual_dim": 2,
            "out_visual_dim": 2,
            "time_dim": 8,
            "model_dim": 16,
            "ff_dim": 16,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
        },
        {"hidden_states": (1, 1, 8, 8, 5)},
        refused=FLEX,
    ),
    "Krea2Transformer2DModel": Architecture(
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        {"hidden_states": (1, 4, 8), "encoder_hidden_states": (1, 4, 3, 8)},
        given={"encoder_attention_mask": torch.tensor([[True, True, True, False]] * SAMPLES)},
        shared={"position_ids": torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).float()},
    ),
    "LongCatAudioDiTTransformer": Architecture(
        {"dit_dim": 16, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4, "text_conv": False},
        {"hidden_states": (1, 8, 4), "encoder_hidden_states": TEXT},
        given={
            "encoder_attention_mask": torch.ones(SAMPLES, 6, dtype=torch.bool),
            "attention_mask": torch.ones(SAMPLES, 8, dtype=torch.bool),
        },
        double=False,
    ),
    "LongCatImageTransformer2DModel": Architecture(
        FLUX | {"pooled_projection_dim": 8, "patch_size": 1},
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT},
        shared=IDS,
    ),
    "LTX2VideoTransformer3DModel": Architecture(
        VIDEO
        | {
            "patch_size": 1,
            "patch_size_t": 1,
            "cross_attention_dim": 16,
            "audio_in_channels": 2,
            "audio_out_channels": 2,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 1,
            "caption_channels": 8,
            "rope_double_precision": False,
        },
        {
            "hidden_states": (1, 32, 2),
            "audio_hidden_states": (1, 5, 2),
            "encoder_hidden_states": TEXT,
            "audio_encoder_hidden_states": TEXT,
        },
        given={"encoder_attention_mask": torch.ones(SAMPLES, 6, dtype=torch.bool)},
        shared={"num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 5, "fps": 25.0},
    ),
    "MiniMaxH3Transformer3DModel": Architecture(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        {"hidden_states": (1, 8, 16), "audio_hidden_states": (1, 6, 6), "encoder_hidden_states": (1, 4, 8)},
        timestep="",
        shared={
            "timestep": torch.tensor([0.7, 0.3]),
            "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * 8),
            "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 8),  # text, audio, video
            "position_ids": torch.stack([torch.arange(18), torch.arange(18) % 4, torch.arange(18) % 2], 1).float(),
            "text_indices": torch.arange(4),
            "audio_indices": torch.arange(4, 10),
            "video_indices": torch.arange(10, 18),
        },
        samples=1,
    ),
    "MiniMaxMusic3Transformer1DModel": Architecture(
        {
            "in_channels": 4,
            "condition_dim": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 16,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        {"hidden_states": (1, 4, 8), "encoder_hidden_states": (1, 8, 8)},
        double=False,
    ),
    "MiniMaxMusic3RVQDepthDecoder": Architecture(
        {
            "hidden_size": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "audio_vocab_size": 8,
            "num_codebooks": 3,
            "max_position_embeddings": 8,
        },
        {"inputs_embeds": (1, 5, 16)},
        timestep="",
    ),
    "MotifVideoTransformer3DModel": Architecture(
        {
            "in_channels": 5,
            "out_channels": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_decoder_layers": 0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 8,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": False,
            "enable_text_cross_attention_single": False,
        },
        {"hidden_states": (1, 5, 2, 4, 4), "encoder_hidden_states": TEXT},
        double=False,
    ),
    "NucleusMoEImageTransformer2DModel": Architecture(
        {
            "patch_size": 2,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 8,
            "axes_dims_rope": (8, 4, 4),
            "moe_enabled": False,
            "capacity_factors": [8.0],
        },
        {"hidden_states": (1, 16, 8), "encoder_hidden_states": TEXT},
        given={"encoder_hidden_states_mask": torch.ones(SAMPLES, 6, dtype=torch.int64)},
        shared={"img_shapes": [(1, 4, 4)] * SAMPLES},
    ),
    "OmniGenTransformer2DModel": Architecture(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "num_layers": 1,
            "pad_token_id": 0,
            "vocab_size": 20,
            "in_channels": 2,
            "time_step_dim": 4,
            "pos_embed_max_size": 8,
            "rope_scaling": {"long_factor": [1.0, 2.0, 1.0, 2.0], "short_factor": [1.0, 2.0, 1.0, 2.0]},
        },
        {"hidden_states": (1, 2, 8, 8)},
        given={
            "input_ids": torch.tensor([[3, 7, 5], [9, 4, 7]]),
            "position_ids": torch.arange(20).repeat(SAMPLES, 1),
            "attention_mask": torch.ones(SAMPLES, 20, 20),
        },
        shared={"input_img_latents": [], "input_image_sizes": {}},
    ),
    "OvisImageTransformer2DModel": Architecture(
        FLUX | {"patch_size": 1, "out_channels": 4},
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT},
        shared=IDS,
    ),
    "PRXTransformer2DModel": Architecture(
        {
            "in_channels": 2,
            "patch_size": 2,
            "context_in_dim": 8,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        {"hidden_states": (1, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "QwenImage21Transformer2DModel": Architecture(
        {
            "patch_size": 1,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "context_in_dim": 8,
            "axes_dims_rope": (2, 2, 4),
        },
        {"hidden_states": (1, 16, 8), "encoder_hidden_states": TEXT},
        given={"img_mask": torch.tensor([[False] * 6 + [True] * 4] * SAMPLES)},
        shared={"img_shapes": [[(1, 4, 4)]] * SAMPLES},
        double=False,
    ),
    "RFD4ProteinaTransformer": Architecture(
        {
            "nlayers": 2,
            "token_dim": 8,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 8,
            "latent_dim": 4,
            "t_emb_dim": 8,
            "seq_sep_dim": 4,
            "xt_pair_dist_dim": 4,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 8,
        },
        {"bb_ca": (1, 6, 3), "local_latents": (1, 6, 4)},
        timestep="",
        given={
            "bb_ca_time": torch.tensor([0.2, 0.7]),
            "local_latents_time": torch.tensor([0.3, 0.6]),
            "padding_mask": torch.ones(SAMPLES, 6, dtype=torch.bool),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(SAMPLES, 6, dtype=torch.bool),
                "supports_local_latent": torch.ones(SAMPLES, 6, dtype=torch.bool),
            },
        },
    ),
    "SanaVideoTransformer3DModel": Architecture(
        VIDEO
        | {
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 16,
        },
        {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT},
    ),
    "SanaWMTransformer3DModel": Architecture(
        {
            "in_channels": 2,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "image_size": 256,
            "caption_channels": 8,
            "mlp_ratio": 2.0,
            "use_chunk_plucker_post_attn": False,
            "chunk_plucker_post_attn_blocks": 0,
            "mixed_precision": None,
        },
        {"hidden_states": (1, 2, 2, 4, 4), "encoder_hidden_states": (1, 1, 6, 8)},
        timestep="",
        given={
            "timestep": torch.tensor([[[200.0, 300.0]], [[700.0, 800.0]]]),
            "encoder_attention_mask": torch.ones(SAMPLES, 6, dtype=torch.int64),
        },
        double=False,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Architecture(
        VIDEO
        | {
            "patch_size": 1,
            "cross_attention_dim": 16,
            "audio_in_channels": 2,
            "audio_out_channels": 2,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 1,
            "caption_channels": 8,
            "rope_double_precision": False,
        },
        {"hidden_states": (1, 8, 2), "encoder_hidden_states": TEXT},
        timestep="",
        given={"timestep": torch.tensor([[200.0] * 8, [700.0] * 8])},
        shared={"video_rotary_emb": (torch.ones(1, 8, 16), torch.zeros(1, 8, 16))},
    ),
    "SkyReelsV2Transformer3DModel": Architecture(
        WAN, {"hidden_states": (1, 2, 2, 8, 8), "encoder_hidden_states": TEXT}
    ),
    "StableAudioDiTModel": Architecture(
        {
            "sample_size": 4,
            "in_channels": 3,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "out_channels": 3,
            "cross_attention_dim": 4,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 4,
        },
        {"hidden_states": (1, 3, 4), "encoder_hidden_states": (1, 6, 4), "global_hidden_states": (1, 1, 8)},
        shared={"rotary_embedding": (torch.ones(5, 2), torch.zeros(5, 2))},
        double=False,
    ),
    "StableAudio3DiTModel": Architecture(
        {
            "io_channels": 4,
            "patch_size": 1,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 8,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 8,
            "ff_mult": 2,
            "num_memory_tokens": 3,
        },
        {"hidden_states": (1, 4, 8), "encoder_hidden_states": TEXT, "global_hidden_states": (1, 8)},
    ),
    "T5FilmDecoder": Architecture(
        {
            "input_dims": 4,
            "targets_length": 8,
            "d_model": 8,
            "num_layers": 1,
            "num_heads": 2,
            "d_kv": 4,
            "d_ff": 8,
        },
        {"decoder_input_tokens": (1, 8, 4)},
        timestep="",
        given={
            "decoder_noise_time": torch.tensor([0.2, 0.7]),
            "encodings_and_masks": [
                (torch.randn(SAMPLES, 6, 8, generator=GENERATOR), torch.ones(SAMPLES, 6)),
            ],
        },
    ),
    "TransformerTemporalModel": Architecture(
        {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 1, "norm_num_groups": 1},
        {"hidden_states": (3, 4, 4, 4)},
        shared={"num_frames": 3},
    ),
    "WanAnimateTransformer3DModel": Architecture(
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "image_dim": 16,
            "rope_max_seq_len": 32,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        {
            "hidden_states": (1, 12, 3, 4, 4),
            "encoder_hidden_states": TEXT,
            "encoder_hidden_states_image": (1, 6, 16),
            "pose_hidden_states": (1, 4, 2, 4, 4),
            "face_pixel_values": (1, 3, 5, 16, 16),
        },
        double=False,
    ),
    "WanAnimate2Transformer3DModel": Architecture(
        {
            "text_len": 8,
            "in_dim": 6,
            "dim": 32,
            "ffn_dim": 16,
            "freq_dim": 8,
            "text_dim": 8,
            "out_dim": 2,
            "num_heads": 2,
            "num_layers": 1,
            "use_img_emb": False,
        },
        {},
        timestep="",
        shared={
            "hidden_states": [torch.randn(2, 3, 4, 4, generator=GENERATOR)],
            "condition_latents": [torch.randn(4, 3, 4, 4, generator=GENERATOR)],
            "encoder_hidden_states": [torch.randn(6, 8, generator=GENERATOR)],
            "timestep": torch.tensor([500.0]),
            "kv_cache": reference_cache(torch.randn(1, 8, 2, 16, generator=GENERATOR)),
            "kv_cache_mode": "cached",
            "seq_len": 12,
            "reference_grid_sizes": torch.tensor([[2, 2, 2]]),
            "origin_len": 5,
            "origin_area": [32, 32],
        },
        samples=1,
        refused=FLEX,
    ),
    "ZImageTransformer2DModel": Architecture(
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 1,
            "cap_feat_dim": 8,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        {},
        timestep="",
        shared={
            "x": [torch.randn(4, 1, 8, 8, generator=GENERATOR)],
            "cap_feats": [torch.randn(6, 8, generator=GENERATOR)],
            "t": torch.tensor([0.4]),
        },
        samples=1,
    ),
    "MotionAdapter": Architecture(
        {
            "block_out_channels": (8, 16),
            "motion_layers_per_block": 1,
            "motion_num_attention_heads": 2,
            "motion_norm_num_groups": 4,
        },
        {"sample": (1, 2, 3, 8, 8)},
        timestep="",
        refused="MotionAdapter returns no tensor, so there is no loss",
    ),
}


def build(name: str, architecture: Architecture) -> nn.Module:
    """The model in eval mode, with no parameter left at zero or one: a gradient must not vanish by initialisation."""
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, architecture.name or name)(**architecture.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(architecture: Architecture) -> dict[str, Any]:
    """Arguments that hold one or more rows of every sample."""
    generator = torch.Generator().manual_seed(1)
    normal = {
        name: torch.randn(architecture.samples * shape[0], *shape[1:], generator=generator)
        for name, shape in architecture.inputs.items()
    }
    times = {architecture.timestep: torch.tensor([0.2, 0.7]) * 1000} if architecture.timestep else {}
    return normal | times | architecture.given


def losses(model: nn.Module, arguments: dict[str, Any], n: int) -> Tensor:
    """A loss of all outputs that no symmetry cancels, `[n]`."""
    outputs = tensors(model(**arguments))
    return torch.stack([output.reshape(n, -1).sin().square().mean(1) for output in outputs]).sum(0)


def largest_error(
    model: nn.Module, architecture: Architecture, parameters: Callable[[str], bool] | None = None
) -> float:
    """Relative error of sketches under Identity, and of norms, against autograd of one sample at a time in float64."""
    rows, shared, n = batch(architecture), architecture.shared, architecture.samples
    with rs.GradientSketcher(model, rs.Identity(), parameters=parameters) as sketcher:
        sketch, norm = sketcher(losses(model, rows | shared, n))
    reference = copy.deepcopy(model)
    if architecture.double:
        reference, rows, shared = reference.double(), mapped(rows, _double), mapped(shared, _double)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in sketcher.shapes)
    worst = 0.0
    for sample in range(n):
        one = mapped(rows, lambda value, row=sample: value.chunk(n)[row])  # type: ignore[misc]
        alone = {key: _single(value) for key, value in shared.items()}
        expected = gradient(reference, losses(reference, one | alone, 1).sum())
        error = (sketch[sample] - expected).norm() / expected.norm()
        worst = max(worst, float(error), float((norm[sample] - expected.norm()).abs() / expected.norm()))
    return worst


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _single(value: Any) -> Any:
    """What all samples share, for one of them: a list with one tuple or list per sample is cut."""
    per_sample = isinstance(value, list) and len(value) == SAMPLES and isinstance(value[0], (tuple, list))
    return value[:1] if per_sample else value
