"""What is differentiated: an error of the prediction, or a function of the prediction alone; and its name."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from retrac_scale.task.identity import known_by
from retrac_scale.task.weighting import Huber, MinSNR, PseudoHuber, SD3Weighting, Weighting

Measure = Literal["mse", "l1", "mean_output", "mean_squared_output", "output_l1", "output_l2", "output_linf"]
AnyMeasure = Measure | Huber | PseudoHuber
Weights = Tensor | float
"""Of entries, `[n, entries]`; 1 where all of a sample counts."""


def checked(measure: Any) -> tuple[AnyMeasure, ...]:
    """One measure or several as a tuple; ValueError for what is none, or comes twice."""
    given = tuple(measure) if isinstance(measure, (tuple, list)) else (measure,)
    names = get_args(Measure)
    if any(not isinstance(one, (Huber, PseudoHuber)) and one not in names for one in given or (None,)):
        raise ValueError(f"measure must be Huber(), PseudoHuber() or one of {names}, got {measure!r}.")
    if len(set(given)) < len(given):
        raise ValueError(f"measure has an entry twice: {measure!r}.")
    return given


def measured_values(
    measure: AnyMeasure,
    prediction: Tensor,
    target: Tensor,
    weights: Weights,
    factors: Tensor | None,
    other: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The value to be differentiated and the training loss of each sample, `[n]` both.

    Args:
        measure: what is measured.
        prediction: the model's, `[n, ...]`.
        target: what it should be.
        weights: of the entries, shaped like them.
        factors: of the training losses, `[n]`, which functions of the prediction have none of; None is 1.
        other: the prediction that a concept is compared with; the concept's function is then the value.
    """
    losses = (_errors(measure, prediction - target) * weights).flatten(1).mean(1)
    if factors is not None and measure not in OUTPUTS:
        losses = losses * factors.to(losses.dtype)
    if other is not None:
        return -((prediction - other).square() * weights).flatten(1).mean(1), losses
    if measure not in OUTPUTS:
        return losses, losses
    flat = weights if isinstance(weights, float) else weights.flatten(1)
    return OUTPUTS[str(measure)](prediction.flatten(1), flat), losses


def _errors(measure: AnyMeasure, error: Tensor) -> Tensor:
    """The loss of every entry; squares for a function of the prediction."""
    if isinstance(measure, (Huber, PseudoHuber)):
        return measure(error)
    return error.abs() if measure == "l1" else error.square()


def _norm(order: float) -> Callable[[Tensor, Weights], Tensor]:
    def norm(output: Tensor, weights: Weights) -> Tensor:
        factors = weights if order == math.inf else weights ** (1 / order)
        values: Tensor = torch.linalg.vector_norm(output * factors, order, dim=1)
        return values

    return norm


OUTPUTS: Mapping[str, Callable[[Tensor, Weights], Tensor]] = {
    "mean_output": lambda output, weights: (output * weights).mean(1),
    "mean_squared_output": lambda output, weights: (output.square() * weights).mean(1),
    "output_l1": _norm(1),
    "output_l2": _norm(2),
    "output_linf": _norm(math.inf),
}
"""Name -> function of the outputs `[n, entries]` and their weights that gives one value each, `[n]`.

Those of D-TRAK (Zheng et al. 2024, arXiv 2311.00500, which takes "mean_squared_output") and of DAS (Lin et al. 2024,
arXiv 2410.18639, "mean_output").
"""


def measure_name(measure: AnyMeasure, weighting: Weighting | None) -> str:
    """How the fingerprint of a store calls what was measured."""
    if weighting is None or measure in OUTPUTS:  # which no weighting of losses changes
        return str(measure)
    return f"{measure} x {known_by(weighting) if ' at 0x' in repr(weighting) else weighting}"


def measure_named(name: str) -> dict[str, Any]:
    """The arguments `measure` and `weighting` of a task, out of what `measure_name` makes of them."""
    measure, _, weighting = name.partition(" x ")
    return {"measure": _described(measure), "weighting": _described(weighting) if weighting else None}


def _described(text: str) -> Any:
    """`Huber(delta=0.5)` from its text; the plain name of a measure is left as it is."""
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return text
    if not isinstance(call, ast.Call):
        return text
    kinds = {kind.__name__: kind for kind in (Huber, PseudoHuber, MinSNR, SD3Weighting)}
    return kinds[ast.unparse(call.func)](**{str(given.arg): ast.literal_eval(given.value) for given in call.keywords})
