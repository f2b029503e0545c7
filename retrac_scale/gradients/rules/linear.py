"""Linear: weight [o, i], bias [o]."""

from __future__ import annotations

from torch import Tensor, nn

from retrac_scale.gradients.factored import FactoredGradients, pairs_of
from retrac_scale.gradients.products import batched_product, scratch
from retrac_scale.gradients.registry import Gradients, register


def linear(layer: nn.Linear, activation: Tensor, grad_output: Tensor, n: int) -> Gradients:
    """weight: sum_s grad[n,s,o] activation[n,s,i]; bias: sum_s grad[n,s,o]."""
    positions = activation.shape[:-1].numel() // n
    grad = grad_output.reshape(n, positions, grad_output.shape[-1])
    inputs = activation.reshape(n, positions, activation.shape[-1]).to(grad.dtype)
    if FactoredGradients.suit(layer, grad):
        pairs = pairs_of((1,), (1,), (1,), (0,), (positions,), (positions,))
        return {
            "weight": FactoredGradients(grad.mT.unsqueeze(1), inputs.mT.unsqueeze(1), (), pairs, layer.bias is not None)
        }
    weight = scratch("weight", (n, grad.shape[2], inputs.shape[2]), grad)
    gradients = {"weight": batched_product(grad.mT, inputs.mT, weight)}
    if layer.bias is not None:
        gradients["bias"] = grad.sum(1)
    return gradients


register(nn.Linear, linear, mixable=True, factored=FactoredGradients.suit)
