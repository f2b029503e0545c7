"""Which rule forms the per-sample gradients of which layer type.

Letters in all rules: n sample, f rows of a sample in the batch (noise draws, frames), s position, o output feature,
i input feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from retrac_scale.gradients.factored import FactoredGradients

Gradients = Mapping[str, Tensor | FactoredGradients]
"""Own parameter name -> gradient `[n, *shape]`."""

Rule = Callable[..., Gradients]
"""rule(layer, activation [n*f, ...], grad_output [n*f, ...], n) -> Gradients.

The gradient of a sample is the sum over its f rows, which are consecutive in the batch. What a rule returns is consumed
before the next rule is called, so it may stand in `scratch` memory.
"""

Seen = Callable[..., None]
"""seen(grad_output, *tensors): to be called once in the backward pass; the tensors `[n*f, ...]` are for the rule."""


@dataclass(frozen=True)
class LayerRule:
    """How the gradients of a layer type are formed; see `register`."""

    form: Rule
    mixable: bool
    factored: Callable[[Any, Tensor], bool] | None
    watch: Callable[[Any, Tensor, Tensor, Seen], Tensor] | None
    suits: Callable[[Any], bool] | None = None


_rules: dict[str, LayerRule] = {}
_whole: set[str] = set()
_alone: dict[str, str] = {}


def register(
    layer_type: type[nn.Module] | str,
    rule: Rule,
    *,
    mixable: bool = False,
    factored: Callable[[Any, Tensor], bool] | None = None,
    watch: Callable[[Any, Tensor, Tensor, Seen], Tensor] | None = None,
    suits: Callable[[Any], bool] | None = None,
) -> None:
    """Use `rule` for layers of exactly this type.

    Args:
        layer_type: the module class, or its qualified name where importing it here would cost too much; subclasses
            need their own registration, for they may compute something else.
        rule: see `Rule`.
        mixable: whether the layer multiplies with `weight` and adds `bias`, if anything, and the rule also takes output
            gradients that have been mixed linearly into t channels (`LowRank`): its gradient of the weight then has t
            in place of o.
        factored: whether, for a layer and its output gradient, the rule leaves the gradients of weight and bias as
            `FactoredGradients`; it is then called once for all samples, and never with mixed output gradients.
        watch: called in the forward pass with the layer, its activation, its output and a `Seen`; gives the output to
            go on with, and has `Seen` called when that one's gradient is known. The tensors that it hands on are
            further arguments of the rule. Without it, the rule gets none.
        suits: whether the rule holds for a layer, by its options; others are recomputed. Without it, for all.
    """
    _rules[layer_type if isinstance(layer_type, str) else _name(layer_type)] = LayerRule(
        rule, mixable, factored, watch, suits
    )


def recompute_whole(layer_type: type[nn.Module] | str) -> None:
    """Take modules of exactly this type as one layer, with all that is below it, run again for each sample alone.

    For modules whose parts cannot be told apart by sample: they multiply with a layer's weights without calling it, lay
    samples out along another axis, or put rows of all samples together. Exact, at the speed of batches of one.

    Args:
        layer_type: the module class, or its qualified name.
    """
    _whole.add(layer_type if isinstance(layer_type, str) else _name(layer_type))


def is_whole(module: nn.Module) -> bool:
    """Whether `recompute_whole` was called for the module's type, or weights of it are computed by parametrizations."""
    return _name(type(module)) in _whole or is_parametrized(module)


def one_at_a_time(layer_type: type[nn.Module] | str, why: str) -> None:
    """Refuse batches of several samples to models that have a module of exactly this type; one alone is exact.

    Args:
        layer_type: the module class, or its qualified name.
        why: what it does with the samples of a batch; follows the class's name in the error.
    """
    _alone[layer_type if isinstance(layer_type, str) else _name(layer_type)] = why


def why_alone(model: nn.Module) -> str:
    """Why the model takes one sample at a time; empty when it need not."""
    for module in model.modules():
        if _name(type(module)) in _alone:
            return f"{type(module).__name__} {_alone[_name(type(module))]}"
    return ""


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule of a layer, or None when its gradients come from the per-sample autograd fallback."""
    rule = _rules.get(_name(type(layer)))
    if rule is None or computed(layer) or (rule.suits is not None and not rule.suits(layer)):
        return None
    return rule


def computed(layer: nn.Module) -> dict[str, Tensor]:
    """Weight and bias, if a hook computes them from other parameters, as `nn.utils.weight_norm` and pruning do."""
    return {own: vars(layer)[own] for own in ("weight", "bias") if isinstance(vars(layer).get(own), Tensor)}


def _name(layer_type: type[nn.Module]) -> str:
    return f"{layer_type.__module__}.{layer_type.__qualname__}"


def by_sample(x: Tensor, n: int) -> Tensor:
    """`[n*f, ...]` -> `[n, f, ...]`."""
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])
