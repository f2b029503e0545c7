"""GroupNorm, LayerNorm and RMSNorm: elementwise weight and bias after a normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrac_scale.gradients.registry import by_sample, register


def group_norm(
    layer: nn.GroupNorm, activation: Tensor, grad_output: Tensor, n: int, *statistics: Tensor
) -> dict[str, Tensor]:
    """weight: sum_fs grad[n,f,s,o] normalised[n,f,s,o]; bias: sum_fs grad[n,f,s,o].

    The rows of the batch become channels of a single sample, for which torch's own kernel sums over positions alone.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    rows, groups = len(activation) * layer.num_channels, len(activation) * layer.num_groups
    x, grad = (value.to(dtype).reshape(1, rows, -1).contiguous() for value in (activation, grad_output))
    if not statistics:
        variance, mean = torch.var_mean(x.reshape(groups, -1), 1, correction=0)
        statistics = mean, torch.rsqrt(variance + layer.eps)
    mean, rstd = (value.to(dtype).reshape(1, groups) for value in statistics)
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        grad, x, mean, rstd, grad.new_empty(rows), 1, rows, x.shape[2], groups, [False, True, True]
    )
    shape = len(activation), layer.num_channels
    return {"weight": by_sample(weight.view(shape), n).sum(1), "bias": by_sample(bias.view(shape), n).sum(1)}


def _statistics(output: Tensor) -> tuple[Tensor, ...]:
    """Mean and reciprocal deviation `[rows, groups]` that the forward pass computed, if autograd saved them."""
    node = output.grad_fn
    if node is None or node.name() != "NativeGroupNormBackward0":
        return ()
    return node._saved_result1, node._saved_result2  # type: ignore[attr-defined]


def layer_norm(layer: nn.LayerNorm, activation: Tensor, grad_output: Tensor, n: int) -> dict[str, Tensor]:
    """weight: sum_s grad[n,s,...] normalised[n,s,...]; bias: sum_s grad[n,s,...]."""
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    normalised = F.layer_norm(activation.to(dtype), layer.normalized_shape, eps=layer.eps)
    return _affine(layer, normalised, grad_output.to(dtype), tuple(layer.normalized_shape), n)


def rms_norm(layer: Any, activation: Tensor, grad_output: Tensor, n: int) -> dict[str, Tensor]:
    """As `layer_norm`, after division by the root mean square."""
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    shape = tuple(layer.weight.shape)
    normalised = F.rms_norm(activation.to(dtype), shape, eps=layer.eps)
    return _affine(layer, normalised, grad_output.to(dtype), shape, n)


def _affine(layer: Any, normalised: Tensor, grad: Tensor, shape: tuple[int, ...], n: int) -> dict[str, Tensor]:
    gradients = {"weight": (grad * normalised).reshape(n, -1, *shape).sum(1)}
    if getattr(layer, "bias", None) is not None:
        gradients["bias"] = grad.reshape(n, -1, *shape).sum(1)
    return gradients


register(nn.GroupNorm, group_norm, keep=_statistics)
register(nn.LayerNorm, layer_norm)
register("diffusers.models.normalization.FP32LayerNorm", layer_norm)
register(nn.RMSNorm, rms_norm)
register("diffusers.models.normalization.RMSNorm", rms_norm)
