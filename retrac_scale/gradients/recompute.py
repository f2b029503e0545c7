"""Gradients of a layer without a rule: run it again for each sample alone and differentiate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.errors import UncapturableError
from retrac_scale.gradients.nested import mapped, tensors

TOLERANCE = 1e-2
"""Relative, of a sample's run alone against the batch: tells another sample from rounding, in bfloat16 too."""


def recomputed(
    name: str,
    module: nn.Module,
    own: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: list[Tensor],
    grads: Mapping[int, Tensor],
    n: int,
    samples: range,
) -> dict[str, Tensor]:
    """Gradients `[m, *shape]` of a module's own parameters for some of n samples.

    Args:
        name: of the module, for errors.
        module: called as `module(*args, **kwargs)`, with outputs `outputs`.
        own: names of the parameters within the module.
        args: detached, as are `kwargs` and `outputs`.
        kwargs: see `args`.
        outputs: the floating point tensors that the call returned.
        grads: place among the outputs -> its gradient.
        n: samples in the batch.
        samples: which of them.

    Raises:
        UncapturableError: the module gives another output for one sample alone; its samples cannot be told apart.
    """
    parameters = {key: module.get_parameter(key) for key in own}
    sizes = batched_sizes(name, module, parameters, args, kwargs, outputs, n)
    gradients: dict[str, list[Tensor]] = {key: [] for key in own}
    for sample in samples:
        with torch.enable_grad():
            weights = {key: value.detach().requires_grad_() for key, value in parameters.items()}
            found = alone_by(module, weights, args, kwargs, n, sample, sizes)
            places = [place for place in grads if found[place].requires_grad]  # none: the parameters were not used
            formed: Any = (
                torch.autograd.grad(
                    [found[place] for place in places],
                    list(weights.values()),
                    [_of_sample(grads[place], n, sample) for place in places],
                    allow_unused=True,
                    materialize_grads=True,
                )
                if places
                else [torch.zeros_like(value) for value in weights.values()]
            )
        for key, gradient in zip(own, formed, strict=True):
            gradients[key].append(gradient)
    return {key: torch.stack(values) for key, values in gradients.items()}


def batched_sizes(
    name: str,
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: Any,
    kwargs: Any,
    outputs: list[Tensor],
    n: int,
) -> set[int]:
    """Leading sizes of the arguments that hold samples: those for which the last sample alone gives its own output.

    A table as long as the batch must not be cut by sample, an argument with fewer rows per sample must.
    """
    folded = {x.shape[0] for x in tensors((args, kwargs)) if x.ndim and x.shape[0] % n == 0}
    expected = [_of_sample(output, n, n - 1) for output in outputs]
    for sizes in ({len(outputs[0])}, {len(outputs[0]), n}, folded):
        try:
            found = alone_by(module, parameters, args, kwargs, n, n - 1, sizes)
        except (RuntimeError, ValueError, IndexError):
            continue
        if all(_close(a, b) for a, b in zip(found, expected, strict=True)):
            return sizes
    raise UncapturableError(
        f"layer {name!r} ({type(module).__name__}) has no gradient rule and gives another output for one sample alone; "
        "register a rule for it, or leave it out with parameters=.",
        [f"{name}.{key}" if name else key for key in parameters],
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=0.1 * TOLERANCE * scale)


def alone_by(
    module: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any, n: int, sample: int, sizes: set[int]
) -> list[Tensor]:
    """The module's outputs for one sample: tensors of these leading sizes are cut."""

    def cut(value: Tensor) -> Tensor:
        return _of_sample(value, n, sample) if value.ndim and value.shape[0] in sizes else value

    return list(tensors(torch.func.functional_call(module, dict(parameters), mapped(args, cut), mapped(kwargs, cut))))


def _of_sample(value: Tensor, n: int, sample: int) -> Tensor:
    each = len(value) // n
    return value[sample * each : (sample + 1) * each]
