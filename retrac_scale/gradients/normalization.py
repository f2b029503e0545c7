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
    """weight: sum_fs grad[n,f,s,o] normalised[n,f,s,o]; bias: sum_fs grad[n,f,s,o]."""
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    x, grad = activation.to(dtype), grad_output.to(dtype)
    rows, channels, groups = len(x), layer.num_channels, layer.num_groups
    if not statistics:
        variance, mean = torch.var_mean(x.reshape(rows, groups, -1), 2, correction=0)
        statistics = mean, torch.rsqrt(variance + layer.eps)
    mean, rstd = (value.to(dtype) for value in statistics)
    if x.is_contiguous() and grad.is_contiguous():
        # the rows of the batch become channels of one sample, for which torch's own kernel sums over positions alone
        shape, positions = (1, rows * channels, -1), x[0, 0].numel()
        _, weight, bias = torch.ops.aten.native_group_norm_backward(
            grad.view(shape),
            x.view(shape),
            mean.reshape(1, -1),
            rstd.reshape(1, -1),
            grad.new_empty(rows * channels),
            1,
            rows * channels,
            positions,
            rows * groups,
            [False, True, True],
        )
        weight, bias = weight.view(rows, channels), bias.view(rows, channels)
    else:  # channels last: a plain sum over positions runs along the memory
        each = channels // groups
        bias = grad.flatten(2).sum(2)
        weight = (grad.flatten(2) * x.flatten(2)).sum(2) - mean.repeat_interleave(each, 1) * bias
        weight = weight * rstd.repeat_interleave(each, 1)
    return {"weight": by_sample(weight, n).sum(1), "bias": by_sample(bias, n).sum(1)}


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
