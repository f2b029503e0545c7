"""Curvature of the training loss, which queries are divided by for influence functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrac_scale.gradients import GradientCapture, ParameterFilter
from retrac_scale.projections.preconditioning import Kronecker
from retrac_scale.sketching.pairs import measured_pairs
from retrac_scale.sketching.samples import Samples
from retrac_scale.task.checkpoints import borrowed_weights

BATCH_PAIRS = 64

Moment = Callable[[str, Tensor], Tensor]
"""What is averaged: name of a parameter and gradients of some pairs `[n, *shape]` -> a sum over the pairs."""


def fisher_divisors(
    samples: Samples, *, damping: float = 0.1, parameters: ParameterFilter = None
) -> dict[str, dict[str, Tensor]]:
    """The diagonal of F + lambda I at each checkpoint, F = mean over pairs of g g^T, the empirical Fisher matrix.

    Sketch the queries with it and the training side without: a score of `GradDot` is then <S H^-1 g_q, S g_i>, the
    influence function with that curvature, of which only the query side is preconditioned (Mlodozeniec et al. 2024,
    arXiv 2410.13850).

    Args:
        samples: training samples, of which some are enough, and the pairs to measure them at.
        damping: lambda relative to the mean eigenvalue of F, that is to its trace over the number of parameters.
        parameters: glob patterns or a predicate on names; None for all trainable ones.
    """

    def diagonal(mean: Callable[[Moment], dict[str, Tensor]]) -> dict[str, Tensor]:
        return _damped(mean(lambda _, g: g.square().sum(0)), damping)

    return _at_checkpoints(samples, parameters, diagonal)


def kronecker_divisors(
    samples: Samples, *, damping: float = 0.1, parameters: ParameterFilter = None
) -> dict[str, dict[str, Tensor | Kronecker]]:
    """As `fisher_divisors`, in a basis of each weight's own in which its Fisher matrix is nearly diagonal.

    A weight's gradients g `[o, p]` are rotated into the eigenvectors of the means of g g^T and g^T g (as in Shampoo,
    Gupta, Koren, Singer 2018, arXiv 1802.09568), and the diagonal is taken there (as in EK-FAC, George et al. 2018,
    arXiv 1806.03884). Biases and other vectors stay as they are. Takes a second pass over the samples, and
    eigenvectors of an o x o and a p x p matrix for every weight.
    """

    def kronecker(mean: Callable[[Moment], dict[str, Tensor]]) -> dict[str, Tensor | Kronecker]:
        lefts, rights = (_bases(mean(moment)) for moment in (_over_outputs, _over_inputs))

        def squares(name: str, g: Tensor) -> Tensor:
            if name not in lefts:
                return g.square().sum(0)
            return (lefts[name].T @ g.flatten(2) @ rights[name]).square().sum(0)

        values = _damped(mean(squares), damping)
        return {
            name: Kronecker(lefts[name], rights[name], value) if name in lefts else value
            for name, value in values.items()
        }

    return _at_checkpoints(samples, parameters, kronecker)


def _over_outputs(_: str, g: Tensor) -> Tensor:
    rows = g.flatten(2) if g.ndim > 2 else g.new_zeros(0, 0, 0)
    return torch.einsum("nop,nqp->oq", rows, rows)


def _over_inputs(_: str, g: Tensor) -> Tensor:
    rows = g.flatten(2) if g.ndim > 2 else g.new_zeros(0, 0, 0)
    return torch.einsum("nop,noq->pq", rows, rows)


def _bases(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eigenvectors of the matrices that are not empty."""
    return {name: torch.linalg.eigh(moment.double())[1].float() for name, moment in moments.items() if moment.numel()}


def _damped(squares: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """Squared gradients plus a share of their mean over all parameters."""
    mean = sum(float(value.double().sum()) for value in squares.values()) / sum(v.numel() for v in squares.values())
    return {name: value + damping * mean for name, value in squares.items()}


def _at_checkpoints(
    samples: Samples, parameters: ParameterFilter, make: Callable[[Callable[[Moment], dict[str, Tensor]]], Any]
) -> dict[str, Any]:
    """What `make` makes of the means of moments over all pairs, for each checkpoint."""
    task = samples.task
    capture = GradientCapture(task.model, parameters=parameters, check=True)
    made = {}
    with borrowed_weights(task.model):
        for checkpoint, weights in samples.checkpoints.items():
            task.load(checkpoint, weights)
            made[checkpoint] = make(partial(_mean, samples, checkpoint, capture))
    return made


def _mean(samples: Samples, checkpoint: str, capture: GradientCapture, moment: Moment) -> dict[str, Tensor]:
    """The mean over all pairs of a moment of every parameter's gradients."""
    task, ids = samples.task, samples.ids
    nothing = {name: torch.zeros(1, *shape, device=task.device) for name, shape in capture.shapes.items()}
    totals = {name: moment(name, gradient) for name, gradient in nothing.items()}
    pairs = 0

    def add(name: str, gradient: Tensor, _: slice) -> None:
        totals[name] += moment(name, gradient.float())

    for plan in (one.pairs(checkpoint, ids, task.num_train_timesteps) for one in samples.plans):
        t = plan.timesteps.shape[1]
        size = max(1, BATCH_PAIRS // (plan.draws * t))
        for start in range(0, len(ids), size):
            some = slice(start, min(start + size, len(ids)))
            part = plan.some(some)
            items = [task.check_item(ids[row], samples.dataset[row]) for row in range(some.start, some.stop)]
            with capture:
                values, _ = measured_pairs(task, items, ids[some], part, np.arange(len(items) * t))[0]
                capture.backward(values, add)
            pairs += len(values)
    return {name: total / pairs for name, total in totals.items()}
