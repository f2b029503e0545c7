"""Every denoiser class of diffusers against autograd, one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import retrac_scale as rs
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
        VIDEO
        | {
            "attention_head_dim": 12,
            "text_dim": 8,
            "freq_dim": 8,
            "ffn_dim": 16,
            "cross_attn_norm": True,
            "rope_max_seq_len": 16,
        },
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
}

# its text pooling multiplies with the weights of Linear layers that it never calls
POOLING = {
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
}


def build(name: str, architecture: Architecture) -> nn.Module:
    """The model in eval mode, with no parameter left at zero or one: a gradient must not vanish by initialisation."""
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, architecture.name or name)(**architecture.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(architecture: Architecture) -> dict[str, Tensor]:
    """Arguments that hold one or more rows of every sample."""
    generator = torch.Generator().manual_seed(1)
    normal = {
        name: torch.randn(SAMPLES * shape[0], *shape[1:], generator=generator)
        for name, shape in architecture.inputs.items()
    }
    times = {architecture.timestep: torch.tensor([0.2, 0.7]) * 1000} if architecture.timestep else {}
    return normal | times | architecture.given


def losses(model: nn.Module, arguments: dict[str, Any], n: int) -> Tensor:
    """A loss that no symmetry cancels, `[n]`."""
    output = model(**arguments)
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    values: Tensor = prediction.reshape(n, -1).sin().square().mean(1)
    return values


def check(
    model: nn.Module, rows: dict[str, Tensor], shared: dict[str, Any], parameters: Callable[[str], bool] | None = None
) -> None:
    """Sketches under Identity, and norms, equal autograd's gradients of one sample at a time in float64."""
    with rs.GradientSketcher(model, rs.Identity(), parameters=parameters) as sketcher:
        sketch, norm = sketcher(losses(model, rows | shared, SAMPLES))
    reference = copy.deepcopy(model).double()
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in sketcher.shapes)
    for sample in range(SAMPLES):
        one = {name: _double(value.chunk(SAMPLES)[sample]) for name, value in rows.items()}
        alone = {key: _single(value) for key, value in shared.items()}
        expected = gradient(reference, losses(reference, one | alone, 1).sum())
        assert expected.norm() > 0
        error = (sketch[sample].double() - expected).norm() / expected.norm()
        assert error < 1e-4, f"sample {sample}: relative error {error:.1e}"
        torch.testing.assert_close(norm[sample].double(), expected.norm(), rtol=1e-4, atol=0)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _single(value: Any) -> Any:
    """What all samples share, for one of them: a list with one tuple per sample is cut."""
    if isinstance(value, list) and isinstance(value[0], tuple):
        return value[:1]
    return _double(value)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sketches_of_a_denoiser_equal_autograd(name: str) -> None:
    architecture = ARCHITECTURES[name]
    check(build(name, architecture), batch(architecture), architecture.shared)


@pytest.mark.parametrize("name", POOLING)
def test_weights_multiplied_around_their_layer_are_refused_by_name_and_the_others_equal_autograd(name: str) -> None:
    architecture = POOLING[name]
    model, rows = build(name, architecture), batch(architecture)
    with (
        rs.GradientSketcher(model, rs.Identity()) as sketcher,
        pytest.raises(ValueError, match=r"'time_extra_emb\.pooler\.\w+\.(weight|bias)' is used outside its own layer"),
    ):
        sketcher(losses(model, rows | architecture.shared, SAMPLES))
    check(model, rows, architecture.shared, lambda parameter: "pooler" not in parameter)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_sketches_of_lora_adapters_equal_autograd(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = build(name, architecture)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    assert all("lora_" in parameter for parameter in rs.GradientSketcher(model, rs.Identity()).shapes)
    check(model, batch(architecture), architecture.shared)


def test_sketches_under_gradient_checkpointing_equal_autograd() -> None:
    architecture = ARCHITECTURES["PixArtTransformer2DModel"]
    model: Any = build("PixArtTransformer2DModel", architecture)
    model.enable_gradient_checkpointing()
    check(model, batch(architecture), architecture.shared)
