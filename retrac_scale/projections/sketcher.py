"""GradientSketcher: sketches of per-sample gradients for any torch model and any loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrac_scale.gradients import GradientCapture, ParameterFilter
from retrac_scale.projections.base import Projection


class GradientSketcher:
    """Inside the context, turns one loss per sample into one gradient sketch per sample.

        with rs.GradientSketcher(model, rs.CountSketch(4096)) as sketcher:
            losses = ((model(x) - y) ** 2).mean(1)     # [n]
            sketch, norm = sketcher(losses)            # [n, 4096], [n]

    Weights are frozen inside and restored after; forward passes are ordinary ones. A batch may hold several
    consecutive rows per loss: the gradient is that of the loss, whatever rows it is made of.

    Args:
        model: any torch module whose samples do not interact.
        projection: CountSketch, LowRank, ...
        parameters: glob patterns or a predicate on names; None for all that require a gradient.
    """

    def __init__(self, model: nn.Module, projection: Projection, *, parameters: ParameterFilter = None) -> None:
        self._capture = GradientCapture(model, parameters=parameters)
        device = next(model.parameters()).device
        self._projector = projection.bind(self._capture.shapes, self._capture.mixable, device)

    @property
    def dim(self) -> int:
        """Entries k of a sketch."""
        return self._projector.dim

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sketched parameters and their shapes."""
        return self._capture.shapes

    def __enter__(self) -> GradientSketcher:
        self._capture.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._capture.__exit__(*exc)

    def __call__(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Sketches `[n, k]` and L2 norms `[n]` (units of the loss per unit of weight) of the gradients of `[n]` losses.

        Norms are those of the full gradient (CountSketch) or the sketch's own estimate (LowRank).
        """
        projector = self._projector
        accumulator = projector.start(len(losses) if losses.ndim else 0)
        squares = torch.zeros(len(accumulator), device=accumulator.device)

        def add(name: str, gradient: Tensor, samples: slice) -> None:
            added = projector.add(accumulator[samples], name, gradient)
            if added is not None:
                squares[samples] += added

        self._capture.backward(losses, add, projector.mixers)
        sketch = projector.finish(accumulator)
        return sketch, squares.sqrt() if projector.exact_norm else torch.linalg.vector_norm(sketch, dim=1)
