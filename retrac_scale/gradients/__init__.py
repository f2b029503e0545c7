"""Per-sample gradients of a batch, layer by layer, from activations and output gradients with frozen weights."""

from retrac_scale.gradients.capture import GradientCapture
from retrac_scale.gradients.errors import UncapturableError
from retrac_scale.gradients.layers import ParameterFilter
from retrac_scale.gradients.registry import Rule, one_at_a_time, recompute_whole, register
from retrac_scale.gradients.rules import convolution, embedding, linear, normalization, whole  # noqa: F401  (they register)

__all__ = [
    "GradientCapture",
    "ParameterFilter",
    "Rule",
    "UncapturableError",
    "one_at_a_time",
    "recompute_whole",
    "register",
]
