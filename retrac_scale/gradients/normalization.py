"""GroupNorm and LayerNorm: elementwise weight and bias after a normalisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from retrac_scale.gradients.registry import by_sample, register


def group_norm(layer: nn.GroupNorm, activation: Tensor, grad_output: Tensor, n: int) -> dict[str, Tensor]:
    """weight: sum_fs grad[n,f,o,s] normalised[n,f,o,s]; bias: sum_fs grad[n,f,o,s]."""
    grad = grad_output.float() if grad_output.dtype.itemsize < 4 else grad_output
    normalised = F.group_norm(activation.to(grad.dtype), layer.num_groups, eps=layer.eps)
    return {
        "weight": by_sample((grad * normalised).flatten(2).sum(2), n).sum(1),
        "bias": by_sample(grad.flatten(2).sum(2), n).sum(1),
    }


def layer_norm(layer: nn.LayerNorm, activation: Tensor, grad_output: Tensor, n: int) -> dict[str, Tensor]:
    """weight: sum_s grad[n,s,...] normalised[n,s,...]; bias: sum_s grad[n,s,...]."""
    grad = grad_output.float() if grad_output.dtype.itemsize < 4 else grad_output
    normalised = F.layer_norm(activation.to(grad.dtype), layer.normalized_shape, eps=layer.eps)
    shape = (n, -1, *layer.normalized_shape)
    gradients = {"weight": (grad * normalised).reshape(shape).sum(1)}
    if layer.bias is not None:
        gradients["bias"] = grad.reshape(shape).sum(1)
    return gradients


register(nn.GroupNorm, group_norm)
register(nn.LayerNorm, layer_norm)
