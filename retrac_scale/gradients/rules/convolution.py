"""Convolutions of one, two and three dimensions: weight [o, i / groups, *kernel], bias [o].

Letters beyond those of the registry: k kernel position, p output position, s input position.
"""

from __future__ import annotations

from itertools import product
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrac_scale.gradients.factored import FactoredGradients, pairs_of
from retrac_scale.gradients.products import batched_product, scratch
from retrac_scale.gradients.registry import Gradients, by_sample, register

WINDOWS_BYTES = 4 << 20
"""Windows are cut for as many samples at a time as keep to this."""


def convolution(layer: Any, activation: Tensor, grad_output: Tensor, n: int) -> Gradients:
    """weight[n,o,i,k]: sum_p grad[n,o,p] activation[n,i, stride p + dilation k - padding]."""
    inputs, padding = _padded(layer, activation.to(grad_output.dtype))
    if FactoredGradients.suit(layer, grad_output):
        return {"weight": _factored(layer, grad_output, inputs, n, padding, with_bias=layer.bias is not None)}
    if layer.groups > 1:
        weight = _grouped(layer, inputs, grad_output, n, padding)
    elif 4 * grad_output.shape[1] <= inputs.shape[1]:
        weight = _by_gradient_windows(layer, inputs, grad_output, n, padding)
    else:
        weight = _by_input_windows(layer, inputs, grad_output, n, padding)
    return {"weight": weight, **_bias(layer, grad_output, n)}


def transposed_convolution(layer: Any, activation: Tensor, grad_output: Tensor, n: int) -> Gradients:
    """weight[n,i,o,k]: sum_s activation[n,i,s] grad[n,o, stride s + dilation k - padding]."""
    weight: Tensor | FactoredGradients
    if FactoredGradients.suit(layer, grad_output):
        weight = _factored(layer, activation.to(grad_output.dtype), grad_output, n, layer.padding)
    else:
        weight = _grouped(layer, activation, grad_output, n, layer.padding)
    return {"weight": weight, **_bias(layer, grad_output, n)}


def _factored(
    layer: Any, outputs: Tensor, inputs: Tensor, n: int, padding: tuple[int, ...], *, with_bias: bool = False
) -> FactoredGradients:
    """Of a convolution from the inputs' positions to the outputs'."""
    sizes = tuple(outputs.shape[2:]), tuple(inputs.shape[2:])
    left, right = (by_sample(side.flatten(2), n) for side in (outputs, inputs))
    pairs = pairs_of(layer.kernel_size, layer.stride, layer.dilation, padding, *sizes)
    return FactoredGradients(left, right, layer.kernel_size, pairs, with_bias)


def _bias(layer: Any, grad_output: Tensor, n: int) -> dict[str, Tensor]:
    return {} if layer.bias is None else {"bias": by_sample(grad_output.flatten(2).sum(2), n).sum(1)}


def _by_input_windows(layer: Any, inputs: Tensor, grad_output: Tensor, n: int, padding: tuple[int, ...]) -> Tensor:
    """`[n, o, i, *kernel]`: for each kernel position, the inputs that the outputs see."""
    reaches = [span * (size - 1) for span, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    spans = [step * (size - 1) + 1 for step, size in zip(layer.stride, grad_output.shape[2:], strict=True)]
    before = list(padding)
    after = [r + s - p - x for r, s, p, x in zip(reaches, spans, before, inputs.shape[2:], strict=True)]
    starts = [[k * span for k in range(size)] for size, span in zip(layer.kernel_size, layer.dilation, strict=True)]
    grad = _positions_last(grad_output, n)
    padded = by_sample(_zeros_around(_channels_first(inputs), before, after), n)
    weight = scratch("weight", (n, grad.shape[1], prod(layer.kernel_size) * padded.shape[2]), grad)
    for samples, windows in _windows(padded, starts, grad_output.shape[2:], layer.stride, kernel_first=True):
        batched_product(grad[samples], windows.flatten(1, 2), weight[samples])
    return weight.view(n, grad.shape[1], *layer.kernel_size, -1).movedim(-1, 2)


def _by_gradient_windows(layer: Any, inputs: Tensor, grad_output: Tensor, n: int, padding: tuple[int, ...]) -> Tensor:
    """`[n, o, i, *kernel]`: for each kernel position, the outputs that see the inputs; cheap when outputs are few."""
    grad_output = _spread(grad_output, layer.stride)
    reaches = [span * (size - 1) for span, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    before = [reach - size for reach, size in zip(reaches, padding, strict=True)]
    after = [x + p - g for x, p, g in zip(inputs.shape[2:], padding, grad_output.shape[2:], strict=True)]
    starts = [
        [reach - k * span for k in range(size)]
        for reach, size, span in zip(reaches, layer.kernel_size, layer.dilation, strict=True)
    ]
    seen = _positions_last(inputs, n)
    padded = by_sample(_zeros_around(_channels_first(grad_output), before, after), n)
    weight = scratch("weight", (n, padded.shape[2] * prod(layer.kernel_size), seen.shape[1]), seen)
    for samples, windows in _windows(padded, starts, inputs.shape[2:], (1,) * len(starts)):
        batched_product(windows.flatten(1, 2), seen[samples], weight[samples])
    return weight.view(n, padded.shape[2], *layer.kernel_size, -1).movedim(-1, 2)


def _windows(
    padded: Tensor,
    starts: list[list[int]],
    lengths: tuple[int, ...],
    steps: tuple[int, ...],
    *,
    kernel_first: bool = False,
) -> Any:
    """Which samples, and their windows `[m, channels, k, f*p]`, or `[m, k, channels, f*p]`.

    Args:
        padded: `[n, f, channels, *spatial]`.
        starts: per spatial axis, where the windows of the kernel positions begin.
        lengths: of all windows, per axis.
        steps: between the positions in a window, per axis.
        kernel_first: which of the two orders.
    """
    n, frames, channels = padded.shape[:3]
    of_sample, of_frame, of_channel, *of_axes = padded.stride()
    places = [sum(map(mul, place, of_axes)) for place in product(*starts)]
    strides = (of_sample, of_channel, of_frame, *map(mul, steps, of_axes))

    def window(samples: slice, place: int) -> Tensor:
        shape = (samples.stop - samples.start, channels, frames, *lengths)
        return padded.as_strided(shape, strides, padded.storage_offset() + samples.start * of_sample + place)

    positions = frames * prod(lengths)
    if len(places) == 1:
        part = window(slice(0, n), places[0]).reshape(n, channels, 1, positions)
        yield slice(0, n), part.movedim(1, 2) if kernel_first else part
        return
    size = max(1, WINDOWS_BYTES // (channels * len(places) * positions * padded.itemsize))
    for start in range(0, n, size):
        samples = slice(start, min(start + size, n))
        m = samples.stop - start
        shape = (m, len(places), channels, positions) if kernel_first else (m, channels, len(places), positions)
        windows = scratch("windows", shape, padded)
        targets = windows.view(*shape[:3], frames, *lengths).unbind(1 if kernel_first else 2)
        for target, place in zip(targets, places, strict=True):
            target.copy_(window(samples, place))
        yield samples, windows


def _positions_last(x: Tensor, n: int) -> Tensor:
    """`[n*f, channels, *spatial]` -> `[n, channels, f*positions]`, in the memory order that it comes in if f is 1."""
    return by_sample(x.flatten(2), n).movedim(1, 2).flatten(2)


def _channels_first(x: Tensor) -> Tensor:
    """Contiguous; from channels last by one matrix transposition per row, at twice the rate of a copy."""
    if x.is_contiguous() or x.device.type != "cpu" or not x.movedim(1, -1).is_contiguous() or x[0].numel() < 1 << 15:
        return x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for target, source in zip(out.flatten(2), x.flatten(2), strict=True):
        target.copy_(source)
    return out


def _zeros_around(x: Tensor, before: list[int], after: list[int]) -> Tensor:
    """Spatial padding; negative padding crops."""
    if not any(before + after):
        return x
    return F.pad(x, [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair])


def _spread(grad_output: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Zeros between the outputs of a strided convolution, as if it had stride 1 and the others were not used."""
    if prod(stride) == 1:
        return grad_output
    spatial = [step * (size - 1) + 1 for step, size in zip(stride, grad_output.shape[2:], strict=True)]
    out = grad_output.new_zeros(*grad_output.shape[:2], *spatial)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    out[places] = grad_output
    return out


def _grouped(layer: Any, inputs: Tensor, grad_output: Tensor, n: int, padding: tuple[int, ...]) -> Tensor:
    """The batch becomes groups of one convolution, whose weight gradient then stands per sample."""
    x, g = (
        of_sample.transpose(0, 1).flatten(1, 2)
        for of_sample in (by_sample(inputs.to(grad_output.dtype), n), by_sample(grad_output, n))
    )
    return _weight_gradient(layer, x, g, n, padding).reshape(n, *layer.weight.shape)


def _weight_gradient(layer: Any, inputs: Tensor, grad_output: Tensor, n: int, padding: tuple[int, ...]) -> Tensor:
    """Of n such layers side by side, as channels `[frames, n*i, ...]` and `[frames, n*o, ...]`."""
    _, weight, _ = torch.ops.aten.convolution_backward(
        grad_output,
        inputs,
        grad_output.new_empty(()).expand(n * layer.weight.shape[0], *layer.weight.shape[1:]),
        None,
        layer.stride,
        padding,
        layer.dilation,
        layer.transposed,
        layer.output_padding,
        n * layer.groups,
        [False, True, False],
    )
    return weight  # type: ignore[no-any-return]


def _padded(layer: Any, activation: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Padding that a plain convolution cannot express is applied to the activation beforehand."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return activation, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(activation, layer._reversed_padding_repeated_twice, mode=mode)
    return padded, (0,) * len(layer.kernel_size)


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_type, convolution, mixable=True, factored=FactoredGradients.suit)
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(_transposed, transposed_convolution, factored=FactoredGradients.suit)
