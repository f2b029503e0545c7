"""The gradients of one layer, from what one of its calls has seen and from the gradient of what it gave."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from torch import Tensor, nn

from retrac_scale.gradients.factored import FactoredGradients
from retrac_scale.gradients.layers import Call, Layer
from retrac_scale.gradients.mixing import SETS, mix, mix_outputs, one_set_each
from retrac_scale.gradients.recompute import recomputed
from retrac_scale.gradients.registry import Gradients


def form(layer: Layer, call: Call, n: int, samples: slice, mixer: Tensor | None) -> Gradients:
    """Own name -> gradients `[m, ...]` of some of n samples, or, factored, what they are sums of.

    Args:
        layer: whose parameters' gradients are formed.
        call: of the layer, with the gradients of its outputs.
        n: samples of the batch.
        samples: which of them.
        mixer: `[r, o]`, what the weight's gradients are mixed with, see `gradients.mixing`; None for none.
    """
    if layer.rule is None:
        return recomputed(layer, call, n, range(samples.start, samples.stop))
    m, each = samples.stop - samples.start, len(call.grads[0]) // n
    values = [call.activation, call.grads[0], *call.kept]
    if m < n:
        values = [value[samples.start * each : samples.stop * each] for value in values]
    activation, grad, *kept = values
    if mixer is not None and SETS * len(mixer) < mixer.shape[1] and not layer.gives_factored(grad):
        return _of_mixed_outputs(layer, activation, grad, m, mixer)
    gradients = layer.rule.form(layer.module, activation, grad, m, *kept)
    weight = gradients.get("weight")
    if isinstance(weight, FactoredGradients):
        along = weight.with_bias and "bias" in layer.parameters
        if mixer is None and along == weight.with_bias:
            return gradients
        return {**gradients, "weight": replace(weight, with_bias=along, mixer=mixer)}
    if mixer is None or weight is None:
        return gradients
    return {**gradients, "weight": mix(mixer, weight)}


def form_sum(layer: Layer, calls: list[Call], n: int, samples: slice, mixer: Tensor | None) -> dict[str, Tensor]:
    """Own name -> gradients `[m, ...]`, summed over calls of the layer; arguments as of `form`."""
    total: dict[str, Tensor] = {}
    for call in calls:
        for own, formed in _formed(form(layer, call, n, samples, mixer), layer.parameters).items():
            if own in total:
                total[own] += formed
            else:
                total[own] = formed if len(calls) == 1 else formed.clone()
    return total


def bias_goes_along(gradients: Gradients) -> bool:
    """Whether the bias has no gradient of its own, because it goes along with the weight's factors."""
    weight = gradients.get("weight")
    return isinstance(weight, FactoredGradients) and weight.with_bias


def _formed(gradients: Gradients, own: Container[str]) -> dict[str, Tensor]:
    """Those of a layer's own parameters."""
    found = {}
    for key, gradient in gradients.items():
        if isinstance(gradient, FactoredGradients):
            if gradient.with_bias:
                found["bias"] = gradient.bias()
            if key in own:
                found[key] = gradient.formed()
        elif key in own:
            found[key] = gradient
    return found


def _of_mixed_outputs(layer: Layer, activation: Tensor, grad: Tensor, n: int, mixer: Tensor) -> Gradients:
    """Gradients of a weight from mixed output gradients, and of the bias."""
    assert layer.rule is not None
    axis = -1 if isinstance(layer.module, nn.Linear) else 1
    weight = layer.rule.form(layer.module, activation, mix_outputs(mixer, grad, axis), n)["weight"]
    assert isinstance(weight, Tensor)  # for a layer without products
    return {"weight": one_set_each(weight), "bias": grad.movedim(axis, -1).reshape(n, -1, grad.shape[axis]).sum(1)}
