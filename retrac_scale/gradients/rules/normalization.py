"""GroupNorm, LayerNorm and RMSNorm: elementwise weight and bias after a normalisation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrac_scale.gradients.registry import Seen, by_sample, register
from retrac_scale.native.compiled import AHEAD, LINE, STRETCH, compiled, prefetch
from retrac_scale.native.threads import Shared, SharedPass, over_rows


def group_norm(
    layer: nn.GroupNorm, activation: Tensor, grad_output: Tensor, n: int, *of_passes: Tensor
) -> dict[str, Tensor]:
    """weight: sum_fs grad[n,f,s,o] normalised[n,f,s,o]; bias: sum_fs grad[n,f,s,o].

    The model's own passes may have computed already: mean and rstd `[n*f, groups]`, and sums over positions `[n*f, o]`
    of grad x and of grad; see `_watched`.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    rows, channels, groups = len(activation), layer.num_channels, layer.num_groups
    statistics, sums = of_passes[:2], of_passes[2:]
    x, grad = activation.to(dtype), grad_output.to(dtype)
    if not statistics:
        variance, mean = torch.var_mean(x.reshape(rows, groups, -1), 2, correction=0)
        statistics = mean, torch.rsqrt(variance + layer.eps)
    mean, rstd = (value.to(dtype) for value in statistics)
    product, bias = sums or _sums(*(each.reshape(rows, channels, -1) for each in (x, grad)))
    centred = product.view(rows, groups, -1) - mean.view(rows, groups, 1) * bias.view(rows, groups, -1)
    weight = (centred * rstd.view(rows, groups, 1)).view(rows, channels)
    return {"weight": by_sample(weight, n).sum(1), "bias": by_sample(bias, n).sum(1)}


def _sums(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of grad x and of grad over the positions of `[n, o, p]`, both `[n, o]`."""
    sums, given = x.new_zeros(2, *x.shape[:2]), (x, grad)
    if x.device.type == "cpu" and x.dtype == torch.float32 and all(one.is_contiguous() for one in given):
        _over(_sum, [x, grad, *sums])
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


def _watched(layer: nn.GroupNorm, activation: Tensor, output: Tensor, seen: Seen) -> Tensor:
    """What autograd has saved serves the rule; where it may be replaced, so do the sums of the backward pass."""
    node = output.grad_fn
    if node is None or node.name() != "NativeGroupNormBackward0":
        output.register_hook(seen)  # type: ignore[no-untyped-call]
        return output
    # undetached, they would keep the graph that the hook hangs on alive
    statistics = node._saved_result1.detach(), node._saved_result2.detach()  # type: ignore[attr-defined]
    float32 = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (activation, output, layer.weight))
    if not float32 or activation.ndim < 3 or layer.weight.requires_grad or layer.bias.requires_grad:
        output.register_hook(lambda grad: seen(grad, *statistics))  # type: ignore[no-untyped-call]
        return output
    through: Tensor = _GroupNorm.apply(activation, output.detach(), layer, *statistics, seen)  # type: ignore[no-untyped-call]
    return through


class _GroupNorm(torch.autograd.Function):
    """What a group norm with frozen weights has computed: its backward pass sums what the rule sums, once for both."""

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, output: Tensor, layer: nn.GroupNorm, mean: Tensor, rstd: Tensor, seen: Seen
    ) -> Tensor:
        ctx.given = activation.detach(), layer, mean, rstd, seen
        ctx.mark_dirty(output)  # else it would be a view, which the model could not change in place
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        activation, layer, mean, rstd, seen = ctx.given
        x, grad = activation.flatten(2), grad_output.flatten(2)
        if last := not x.is_contiguous() and x.mT.is_contiguous():
            x, grad = x.mT, grad.mT
        x, grad = x.contiguous(), grad.contiguous()
        sums, out = x.new_zeros(2, len(x), layer.num_channels), torch.empty_like(x)
        statistics = (each.view(len(x), layer.num_groups) for each in (mean, rstd))
        arrays = [each.numpy() for each in (x, grad, *sums, *statistics, out, layer.weight.detach())]
        _gone_back((*arrays, last), len(x), 3 * arrays[0].nbytes)
        seen(grad_output, mean, rstd, *sums)
        return (out.mT if last else out).reshape(activation.shape), None, None, None, None, None


@compiled
def _back(
    x: Any,
    grad: Any,
    product: Any,
    total: Any,
    mean: Any,
    rstd: Any,
    out: Any,
    weight: Any,
    last: Any,
    first: Any,
    stop: Any,
) -> None:
    """The sums, and the gradient of the input, of some rows `[n, o, p]`, or if channels are last `[n, p, o]`."""
    some = slice(first, stop)
    x, grad, product, total, out = x[some], grad[some], product[some], total[some], out[some]
    if last:
        _back_channels_last(x, grad, product, total, mean[some], rstd[some], out, weight)
    else:
        _back_channels_first(x, grad, product, total, mean[some], rstd[some], out, weight)


_none = [np.zeros((1,) * dimensions, np.float32) for dimensions in (3, 3, 2, 2, 2, 2, 3, 1)]
_shared = Shared((*_none, True))
_run, _taken, _after = _shared.run, _shared.taken, _shared.after


def _member(address: Any) -> None:
    count, parts, rows, arguments = _taken(address)
    part = _after(count)
    while part < parts:
        _back(*arguments, rows * part // parts, rows * (part + 1) // parts)
        _after(count + 8)
        part = _after(count)


@compiled
def _share(team: Any, member: Any, count: Any, parts: Any, rows: Any, arguments: Any) -> None:
    _run(team, member, (count, parts, rows, arguments))


_gone_back = SharedPass(_back, _share, _member)


@compiled
def _back_channels_first(
    x: Any, grad: Any, product: Any, total: Any, mean: Any, rstd: Any, out: Any, weight: Any
) -> None:
    scales = np.empty((3, len(weight)), np.float32)
    for row in range(len(x)):
        some = slice(row, row + 1)
        _sum(x[some], grad[some], product[some], total[some])
        _scale(weight, mean[row], rstd[row], product[row], total[row], x.shape[2], scales)
        for channel in range(len(weight)):
            of_grad, of_x, constant = scales[0, channel], scales[1, channel], scales[2, channel]
            given, of_given, result = x[row, channel], grad[row, channel], out[row, channel]
            for place in range(len(given)):
                result[place] = of_grad * of_given[place] + of_x * given[place] + constant


@compiled
def _back_channels_last(
    x: Any, grad: Any, product: Any, total: Any, mean: Any, rstd: Any, out: Any, weight: Any
) -> None:
    scales = np.empty((3, len(weight)), np.float32)
    of_grad, of_x, constant = scales[0], scales[1], scales[2]
    for row in range(len(x)):
        some = slice(row, row + 1)
        _sum_channels_last(x[some], grad[some], product[some], total[some])
        _scale(weight, mean[row], rstd[row], product[row], total[row], x.shape[1], scales)
        for place in range(x.shape[1]):
            given, of_given, result = x[row, place], grad[row, place], out[row, place]
            for channel in range(len(given)):
                other = of_x[channel] * given[channel] + constant[channel]
                result[channel] = of_grad[channel] * of_given[channel] + other


@compiled
def _scale(weight: Any, mean: Any, rstd: Any, product: Any, total: Any, positions: Any, scales: Any) -> None:
    """Of one row: the input's gradient is scales[0] grad + scales[1] x + scales[2], each `[o]`."""
    each = len(weight) // len(mean)
    for group in range(len(mean)):
        both, alone = np.float32(0), np.float32(0)
        for channel in range(group * each, (group + 1) * each):
            both += weight[channel] * product[channel]
            alone += weight[channel] * total[channel]
        unit = rstd[group] / np.float32(each * positions)
        of_x = (alone * mean[group] - both) * rstd[group] * rstd[group] * unit
        constant = -of_x * mean[group] - alone * unit
        for channel in range(group * each, (group + 1) * each):
            scales[0, channel], scales[1, channel], scales[2, channel] = weight[channel] * rstd[group], of_x, constant


@partial(compiled, reassociate=True)
def _sum(x: Any, grad: Any, product: Any, total: Any) -> None:
    """Of `[n, o, p]`, `[n, o]` both."""
    rows, channels, positions = x.shape
    x_ahead, grad_ahead = x.ctypes.data + AHEAD, grad.ctypes.data + AHEAD
    for row in range(rows):
        for channel in range(channels):
            both, alone = np.float32(0), np.float32(0)
            before = (row * channels + channel) * positions
            for start in range(0, positions, STRETCH):
                stop = min(start + STRETCH, positions)
                for place in range(4 * (before + start), 4 * (before + stop), LINE):
                    prefetch(x_ahead + place)
                    prefetch(grad_ahead + place)
                some, of_some = x[row, channel, start:stop], grad[row, channel, start:stop]
                for place in range(len(some)):
                    both += of_some[place] * some[place]
                    alone += of_some[place]
            product[row, channel], total[row, channel] = both, alone


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


register(nn.GroupNorm, group_norm, watch=_watched)
register(nn.LayerNorm, layer_norm)
register("diffusers.models.normalization.FP32LayerNorm", layer_norm)
register(nn.RMSNorm, rms_norm)
register("diffusers.models.normalization.RMSNorm", rms_norm)
