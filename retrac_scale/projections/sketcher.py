"""GradientSketcher: sketches of per-sample gradients for any torch model and any loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients import GradientCapture, ParameterFilter
from retrac_scale.gradients.errors import GradientMismatchError
from retrac_scale.gradients.norms import squared_norm
from retrac_scale.gradients.reference import (
    ALONE_HALF_TOLERANCE,
    ALONE_TOLERANCE,
    HALF_TOLERANCE,
    TENSOR_FLOAT_TOLERANCE,
    Reference,
)
from retrac_scale.projections.accumulation import Accumulation, sketch_of
from retrac_scale.projections.base import Projection
from retrac_scale.projections.preconditioning import Divisors, Kronecker, check_divisors, divided

NORM_TOLERANCE = 1e-5
"""Relative, of an exact norm against the float64 norm of the same gradient."""


class GradientSketcher:
    """Inside the context, turns one loss per sample into one gradient sketch per sample.

        with rs.GradientSketcher(model, rs.CountSketch(4096)) as sketcher:
            losses = ((model(x) - y) ** 2).mean(1)     # [n]
            sketch, norm = sketcher(losses)            # [n, 4096], [n]

    Weights are frozen inside and restored after; forward passes are ordinary ones. A batch may hold several
    consecutive rows per loss: the gradient is that of the loss, whatever rows it is made of.

    The first batch is checked: every parameter's gradient, sketch and norm must be those of plain autograd. That tells
    whether samples meet, lie along another axis than the first, or a parameter is used where no layer is seen to use
    it. It costs one batch once. A batch of one sample shows only part of it, so that the first one of several is
    checked too, and until then weights stay trainable inside.

    Args:
        model: any torch module whose samples do not interact.
        projection: CountSketch, LowRank, ...
        parameters: glob patterns or a predicate on names; None for all that require a gradient.
        precondition: parameter name -> divisors of its gradients, see `precondition`.
        check: whether to check the first batch; leave it out for a model that has been checked as it is.

    Raises:
        ValueError: no parameter is selected; or, an UncapturableError, one is complex, or a batch norm in the model
            normalises over the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projection,
        *,
        parameters: ParameterFilter = None,
        precondition: Divisors | None = None,
        check: bool = True,
    ) -> None:
        self._capture = GradientCapture(model, parameters=parameters, check=check)
        self._device = next(model.parameters()).device
        self._projector = projection.bind(self._capture.shapes, self._capture.mixable, self._device)
        self._divisors: dict[str, Tensor | Kronecker] = {}
        self.precondition(precondition)

    def precondition(self, divisors: Divisors | None, where: str = "precondition") -> None:
        """Divide gradients before they are projected, from now on; None for not at all.

        Args:
            divisors: parameter name -> positive tensor of its shape, such as `adam_divisors` gives.
            where: named in errors.

        Raises:
            ValueError: some are missing, of another shape or not positive, or the projection mixes output gradients
                before full gradients are formed.
        """
        if divisors is not None:
            if self._projector.mixers_in_forming:
                raise ValueError(
                    f"{where}: LowRank never forms the full gradients that are to be divided; "
                    "use CountSketch(dim), or LowRank(dim=dim, norm='exact')."
                )
            check_divisors(divisors, self.shapes, where)
        self._divisors = {name: divisors[name].to(self._device) for name in self.shapes} if divisors else {}

    @property
    def dim(self) -> int:
        """Entries k of a sketch."""
        return self._projector.dim

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sketched parameters and their shapes."""
        return self._capture.shapes

    @property
    def rules(self) -> dict[str, Any]:
        """What forms each parameter's gradients; None is per-sample autograd."""
        return {name: rule for name, (_, rule) in self._capture.users.items()}

    def __enter__(self) -> GradientSketcher:
        self._capture.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._capture.__exit__(*exc)

    def __call__(self, losses: Tensor, *, retain_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Sketches `[n, k]` and L2 norms `[n]` (units of the loss per unit of weight) of the gradients of `[n]` losses.

        Norms are those of the full gradient (CountSketch) or the sketch's own estimate (LowRank).

        Args:
            losses: functions of the last forward pass, `[n]`.
            retain_graph: keep that forward pass, to sketch another function of it next.

        Raises:
            UncapturableError: gradients of some parameters cannot be told apart by sample, or not be formed.
            GradientMismatchError: in the batch that is checked, some are not those of plain autograd; names them.
        """
        projector, unmixed = self._projector, self._capture.single_position
        sums = Accumulation(projector, len(losses) if losses.ndim else 0, unmixed)

        def add(name: str, gradient: Any, samples: slice) -> None:
            sums.add(name, self._divided(name, gradient), samples)

        factored = projector.factored and not self._divisors
        given = losses, add if self._divisors else sums.add, projector.mixers_in_forming
        reference = self._capture.backward(*given, factored=factored, retain_graph=retain_graph)
        sketch, norm = sums.finished()
        if reference is not None:
            self._compare(reference, sketch, norm)
        return sketch, norm

    def _compare(self, reference: Reference, sketch: Tensor, norm: Tensor) -> None:
        """The sketches, each times its sample's factor, must add up to that of plain autograd's gradient."""
        expected, _ = self._sketch_of(reference.expected)
        found = (reference.factors.to(sketch.dtype)[:, None] * sketch).sum(0)
        size = torch.linalg.vector_norm(reference.factors * torch.linalg.vector_norm(sketch, dim=1))
        tolerance = HALF_TOLERANCE if self._capture.coarse else TENSOR_FLOAT_TOLERANCE
        off = float((found - expected).norm()) / max(float(size), 1e-30)
        if not off <= tolerance:
            raise GradientMismatchError(
                f"the gradients of a batch are right, their sketches by {type(self._projector).__name__} are not (off "
                f"by {off:.1e}): its add() must be linear, and the same for every sample."
            )
        if self._projector.exact_norm and not self._divisors:
            full = reference.squares.sqrt()
            far = float(((norm.double() - full).abs() / full.clamp_min(1e-30)).max())
            if not far <= NORM_TOLERANCE:
                raise GradientMismatchError(
                    f"norms by {type(self._projector).__name__} are not those of the gradients (off by {far:.1e})."
                )

    def _sketch_of(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sketch `[k]` of one full gradient, and its norm; exact, or the sketch's own."""
        full = {name: self._divided(name, gradient[None])[0] for name, gradient in gradients.items()}
        sketch = sketch_of(self._projector, full, self._capture.single_position)
        if not self._projector.exact_norm:
            return sketch, torch.linalg.vector_norm(sketch)
        squares = torch.stack([squared_norm(gradient.reshape(1, -1)) for gradient in full.values()])
        return sketch, squares.sum().sqrt().to(sketch.dtype)

    def _divided(self, name: str, gradient: Any) -> Any:
        return divided(gradient, self._divisors[name]) if self._divisors else gradient

    def check(
        self,
        sketched: tuple[Tensor, Tensor],
        batch: Callable[[], Tensor],
        alone: Callable[[], Tensor],
        where: str,
    ) -> None:
        """Compare a batch with plain autograd, and its first sample with that sample alone; outside the context.

        Whatever is random shows, and batches that a sample is not the same in; where one of the two is in 16 bits, up
        to their rounding.

        Args:
            sketched: sketches `[n, k]` and norms `[n]` of the batch.
            batch: runs the model forward and gives the losses `[n]` again, or those of some samples with the first one
                first, in full precision if it can be.
            alone: gives the loss `[1]` of the first sample in a batch of its own.
            where: names that sample, for the error.

        Raises:
            GradientMismatchError: gradients, sketch or norm are others; names the parameters whose gradients are.
        """
        capture = GradientCapture(self._capture.model, parameters=self.shapes.__contains__, check=True)
        try:
            with capture:
                capture.backward(batch(), lambda name, gradient, samples: None)
        except GradientMismatchError as error:
            raise GradientMismatchError(f"{where}: {error}") from error
        tolerance = ALONE_HALF_TOLERANCE if self._capture.coarse else ALONE_TOLERANCE
        expected = self._capture.plain(alone)
        sketch, norm = self._sketch_of(expected)
        found = torch.cat([sketched[0][0], sketched[1][:1]])
        if _differ(found, torch.cat([sketch, norm[None]]), tolerance):
            culprits = self._differing(expected, batch, tolerance)
            named = ", ".join(culprits) or "the sum over all parameters"
            raise GradientMismatchError(
                f"{where}: its gradient in the batch is not that of plain autograd alone; it differs in {named}. The "
                "model is random (dropout in training mode), or samples meet in it or lie along another axis than the "
                "first: call eval(), leave these out with parameters=, or register a rule."
            )

    def _differing(self, expected: dict[str, Tensor], batch: Callable[[], Tensor], tolerance: float) -> list[str]:
        """The parameters whose gradient for the batch's first sample is another than expected."""
        found = {}

        def keep(name: str, gradient: Tensor, samples: slice) -> None:
            if samples.start == 0:
                found[name] = gradient[0].clone()

        with self._capture:
            self._capture.backward(batch(), keep)
        floor = tolerance * max(float(gradient.norm()) for gradient in expected.values())
        return [
            name
            for name, gradient in expected.items()
            if name not in found
            or float((found[name] - gradient).norm()) > max(tolerance * float(gradient.norm()), 0.01 * floor)
        ]


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not expected.isfinite().all():  # as plain autograd has it; named where it would be written
        return False
    return not float((found - expected).norm()) <= tolerance * float(expected.norm())
