"""Which rule forms the per-sample gradients of which layer type.

Letters in all rules: n sample, f rows of a sample in the batch (noise draws, frames), s position, o output feature,
i input feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Rule = Callable[[Any, Tensor, Tensor, int], dict[str, Tensor]]
"""rule(layer, activation [n*f, ...], grad_output [n*f, ...], n) -> {own parameter name: gradient [n, ...]}.

The gradient of a sample is the sum over its f rows, which are consecutive in the batch.
"""

_rules: dict[type[nn.Module], Rule] = {}
_mixable: set[type[nn.Module]] = set()


def register(layer_type: type[nn.Module], rule: Rule, *, mixable: bool = False) -> None:
    """Use `rule` for layers of exactly this type.

    Args:
        layer_type: the module class; subclasses need their own registration, for they may compute something else.
        rule: see `Rule`.
        mixable: the rule is linear in the output features along the first axis of every parameter, so that output
            gradients may be mixed into fewer channels before it (`LowRank`).
    """
    _rules[layer_type] = rule
    (_mixable.add if mixable else _mixable.discard)(layer_type)


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of a layer, or None when its gradients come from the per-sample autograd fallback."""
    return _rules.get(type(layer))


def mixes_output(layer: nn.Module) -> bool:
    """Whether the layer's output gradients may be mixed across all output features."""
    return type(layer) in _mixable and getattr(layer, "groups", 1) == 1


def by_sample(x: Tensor, n: int) -> Tensor:
    """`[n*f, ...]` -> `[n, f, ...]`."""
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])
