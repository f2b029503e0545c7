"""Modules whose samples mix on the way, and why."""

from __future__ import annotations

from torch import nn

from retrac_scale.gradients.registry import one_at_a_time, recompute_whole

# its products use the weights of out_proj, which it never calls
recompute_whole(nn.MultiheadAttention)
recompute_whole("diffusers.models.embeddings.HunyuanDiTAttentionPool")
# positions of the sequence come before samples
recompute_whole("diffusers.models.transformers.transformer_ernie_image.ErnieImageTransformer2DModel")
# one row for timestep 0 or for positions is shared by all samples
recompute_whole("diffusers.models.transformers.transformer_helios.HeliosTransformer3DModel")
recompute_whole("diffusers.models.transformers.transformer_qwenimage21.QwenImage21Transformer2DModel")
recompute_whole("diffusers.models.transformers.minimax_music3_rvq_depth_decoder.MiniMaxMusic3RVQDepthDecoder")
# it encodes faces in runs of some frames, whatever sample they are of
recompute_whole("diffusers.models.transformers.transformer_wan_animate.WanAnimateTransformer3DModel")

one_at_a_time(
    "diffusers.models.transformers.transformer_z_image.ZImageTransformer2DModel",
    "joins the tokens of all samples, each of its own length, to one sequence",
)
one_at_a_time(
    "diffusers.models.transformers.transformer_cosmos3.Cosmos3OmniTransformer",
    "takes one sequence of tokens, without a batch axis",
)
one_at_a_time(
    "diffusers.models.transformers.transformer_minimax_h3.MiniMaxH3Transformer3DModel",
    "has one table of timesteps for all samples",
)
one_at_a_time(
    "diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2Transformer3DModel",
    "cuts the samples of a list into patches one by one",
)
