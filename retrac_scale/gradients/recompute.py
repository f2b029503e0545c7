"""Gradients of a layer without a rule: run it again for each sample alone and differentiate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.errors import UncapturableError
from retrac_scale.gradients.layers import Call, Layer
from retrac_scale.gradients.nested import mapped, tensors

TOLERANCE, HALF_TOLERANCE = 1e-2, 5e-2
"""Relative, in L2 norm, of a sample's run alone against the batch: tells another sample from rounding."""


def recomputed(layer: Layer, call: Call, n: int, samples: range) -> dict[str, Tensor]:
    """Gradients `[m, *shape]` of a module's own parameters for some of n samples, from one call of it.

    Raises:
        UncapturableError: the module gives another output for one sample alone; its samples cannot be told apart.
    """
    module, places = layer.module, sorted(call.grads)
    parameters = {key: module.get_parameter(key) for key in layer.parameters}
    kind, dtype, enabled = call.precision or ("cpu", torch.bfloat16, False)
    with torch.autocast(kind, dtype, enabled=enabled):
        outputs = _as_they_were(call, module)
        expected = [outputs[place] for place in places]
        sizes = batched_sizes(layer.name, module, parameters, call.args, call.kwargs, expected, n, places)
        gradients: dict[str, list[Tensor]] = {key: [] for key in parameters}
        for sample in samples:
            formed = _of_one(module, parameters, call, n, sample, sizes)
            for key, gradient in zip(parameters, formed, strict=True):
                gradients[key].append(gradient.to_dense())
    return {key: torch.stack(values) for key, values in gradients.items()}


def _as_they_were(call: Call, module: nn.Module) -> list[Tensor]:
    """The outputs of a call: as they were kept, or, where the model has changed them in place since, once more."""
    if all(tensor._version == version for tensor, version in call.outputs):
        return [tensor for tensor, _ in call.outputs]
    with torch.no_grad():
        return _run(module, {}, call.args, call.kwargs)


def _of_one(
    module: nn.Module, parameters: Mapping[str, Tensor], call: Call, n: int, sample: int, sizes: set[int]
) -> Sequence[Tensor]:
    with torch.enable_grad():
        weights = {key: value.detach().requires_grad_() for key, value in parameters.items()}
        found = alone_by(module, weights, call.args, call.kwargs, n, sample, sizes)
        places = [place for place in call.grads if found[place].requires_grad]
        if not places:  # the parameters were not used
            return [torch.zeros_like(value) for value in weights.values()]
        return torch.autograd.grad(
            [found[place] for place in places],
            list(weights.values()),
            [_of_sample(call.grads[place], n, sample) for place in places],
            allow_unused=True,
            materialize_grads=True,
        )


def batched_sizes(
    name: str,
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: Any,
    kwargs: Any,
    outputs: list[Tensor],
    n: int,
    places: list[int] | None = None,
) -> set[int]:
    """Leading sizes of the arguments that hold samples: those for which the last sample alone gives its own output.

    A table as long as the batch must not be cut by sample, an argument with fewer rows per sample must.

    Args:
        name: of the module, for errors, as is all of `parameters` but its keys.
        module: called as `module(*args, **kwargs)`, with floating point outputs among which `outputs` are.
        parameters: own name -> parameter.
        args: detached, as are `kwargs` and `outputs`.
        kwargs: see `args`.
        outputs: those to compare.
        n: samples in the batch.
        places: of the outputs to compare among all; None for all.

    Raises:
        UncapturableError: there are none.
    """
    folded = {x.shape[0] for x in tensors((args, kwargs)) if x.ndim and x.shape[0] % n == 0}
    expected = [_of_sample(output, n, n - 1) for output in outputs]
    for sizes in ({len(outputs[0])}, {len(outputs[0]), n}, folded):
        try:
            found = alone_by(module, parameters, args, kwargs, n, n - 1, sizes)
        except (RuntimeError, ValueError, IndexError):
            continue
        some = found if places is None else [found[place] for place in places]
        if all(_close(a, b) for a, b in zip(some, expected, strict=True)):
            return sizes
    random = "if it drops out, call eval() or set its dropout to 0; otherwise " if module.training else ""
    raise UncapturableError(
        f"layer {name!r} ({type(module).__name__}) has no gradient rule and gives another output for one sample alone; "
        f"{random}register a rule for it, or leave it out with parameters=.",
        [f"{name}.{key}" if name else key for key in parameters],
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    tolerance = (
        HALF_TOLERANCE if expected.itemsize < 4 or torch.is_autocast_enabled(expected.device.type) else TOLERANCE
    )
    return float(torch.dist(found, expected)) <= tolerance * float(torch.linalg.vector_norm(expected))


def alone_by(
    module: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any, n: int, sample: int, sizes: set[int]
) -> list[Tensor]:
    """The module's outputs for one sample: tensors of these leading sizes are cut."""

    def cut(value: Tensor) -> Tensor:
        return _of_sample(value, n, sample) if value.ndim and value.shape[0] in sizes else value

    return _run(module, parameters, mapped(args, cut), mapped(kwargs, cut))


def _run(module: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> list[Tensor]:
    """The module's outputs; whatever it writes into its buffers, such as running statistics, it writes into copies."""
    buffers = {name: value.clone() for name, value in module.named_buffers() if module.training}
    return list(tensors(torch.func.functional_call(module, {**buffers, **parameters}, args, kwargs)))


def _of_sample(value: Tensor, n: int, sample: int) -> Tensor:
    each = len(value) // n
    return value[sample * each : (sample + 1) * each]
