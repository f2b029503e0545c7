"""GroupNorm, LayerNorm and RMSNorm: elementwise weight and bias after a normalisation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrac_scale.compiled import AHEAD, LINE, STRETCH, compiled, prefetch
from retrac_scale.gradients.registry import by_sample, register
from retrac_scale.threads import over_rows


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
    product, bias = _sums(x.flatten(2), grad.flatten(2))
    centred = product.view(rows, groups, -1) - mean.view(rows, groups, 1) * bias.view(rows, groups, -1)
    weight = (centred * rstd.view(rows, groups, 1)).view(rows, channels)
    return {"weight": by_sample(weight, n).sum(1), "bias": by_sample(bias, n).sum(1)}


def _sums(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of grad x and of grad over the positions of `[n, o, p]`, both `[n, o]`."""
    sums, given = x.new_zeros(2, *x.shape[:2]), (x, grad)
    if x.device.type == "cpu" and x.dtype == torch.float32 and all(one.is_contiguous() for one in given):
        _over(_sum, [one.flatten(0, 1) for one in (x, grad, *sums)])
    elif x.device.type == "cpu" and x.dtype == torch.float32 and all(one.mT.is_contiguous() for one in given):
        _over(_sum_channels_last, [x.mT, grad.mT, *sums])
    else:
        torch.sum(grad * x, 2, out=sums[0])
        torch.sum(grad, 2, out=sums[1])
    return sums[0], sums[1]


def _over(work: Any, tensors: list[Tensor]) -> None:
    """A compiled pass over the rows of some tensors."""
    arrays = [tensor.numpy() for tensor in tensors]
    over_rows(lambda part: work(*(array[part] for array in arrays)), len(arrays[0]), 2 * arrays[0].nbytes)


@partial(compiled, reassociate=True)
def _sum(x: Any, grad: Any, product: Any, total: Any) -> None:
    """Of `[r, p]`, `[r]` both."""
    rows, positions = x.shape
    x_ahead, grad_ahead = x.ctypes.data + AHEAD, grad.ctypes.data + AHEAD
    for row in range(rows):
        both, alone = np.float32(0), np.float32(0)
        for start in range(0, positions, STRETCH):
            stop = min(start + STRETCH, positions)
            for place in range(4 * (row * positions + start), 4 * (row * positions + stop), LINE):
                prefetch(x_ahead + place)
                prefetch(grad_ahead + place)
            some, of_some = x[row, start:stop], grad[row, start:stop]
            for place in range(len(some)):
                both += of_some[place] * some[place]
                alone += of_some[place]
        product[row], total[row] = both, alone


@compiled
def _sum_channels_last(x: Any, grad: Any, product: Any, total: Any) -> None:
    """Of `[n, p, o]`, `[n, o]` both."""
    for row in range(len(x)):
        both, alone = product[row], total[row]
        for position in range(x.shape[1]):
            some, of_some = x[row, position], grad[row, position]
            for channel in range(len(some)):
                both[channel] += of_some[channel] * some[channel]
                alone[channel] += of_some[channel]


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
