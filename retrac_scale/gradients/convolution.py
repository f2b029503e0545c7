"""Convolutions of one, two and three dimensions: weight [o, i / groups, *kernel], bias [o]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrac_scale.gradients.registry import by_sample, register


def convolution(layer: Any, activation: Tensor, grad_output: Tensor, n: int) -> dict[str, Tensor]:
    """The batch becomes groups of one convolution, whose weight gradient then stands per sample."""
    inputs, padding = _padded(layer, activation.to(grad_output.dtype))
    x, g = by_sample(inputs, n), by_sample(grad_output, n)
    out_features, frames = g.shape[2], x.shape[1]
    weight_shape = (n * out_features, x.shape[2] // layer.groups, *layer.kernel_size)
    _, weight, _ = torch.ops.aten.convolution_backward(
        g.transpose(0, 1).reshape(frames, n * out_features, *g.shape[3:]),
        x.transpose(0, 1).reshape(frames, n * x.shape[2], *x.shape[3:]),
        g.new_empty(()).expand(weight_shape),
        None,
        layer.stride,
        padding,
        layer.dilation,
        False,
        [0] * len(layer.stride),
        n * layer.groups,
        [False, True, False],
    )
    gradients = {"weight": weight.reshape(n, out_features, *weight_shape[1:])}
    if layer.bias is not None:
        gradients["bias"] = g.flatten(3).sum((1, 3))
    return gradients


def _padded(layer: Any, activation: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Padding that a plain convolution cannot express is applied to the activation beforehand."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return activation, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(activation, layer._reversed_padding_repeated_twice, mode=mode)
    return padded, (0,) * len(layer.kernel_size)


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_type, convolution, mixable=True)
