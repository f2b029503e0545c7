"""LiveSketcher: sketches of per-sample gradients out of a training loop's own backward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from retrac_scale.gradients import ParameterFilter
from retrac_scale.gradients.backward import Sink
from retrac_scale.gradients.errors import GradientMismatchError
from retrac_scale.gradients.live import LiveCapture
from retrac_scale.gradients.reference import HALF_TOLERANCE, TENSOR_FLOAT_TOLERANCE
from retrac_scale.projections.accumulation import Accumulation, sketch_of
from retrac_scale.projections.base import Projection


class LiveSketcher:
    """Sketches of every sample's part in the gradient that a training step computes anyway.

    The first backward pass is checked: every parameter's gradients, each sample's times a factor of its own, must be
    what plain autograd has through the model's output, and the sketches must add up to that of the step's own gradient.

    Args:
        model: any torch module whose samples do not interact.
        projection: LowRank, CountSketch, ...
        parameters: glob patterns or a predicate on names; None for all that require a gradient.
    """

    def __init__(self, model: nn.Module, projection: Projection, *, parameters: ParameterFilter = None) -> None:
        self._capture = LiveCapture(model, parameters=parameters)
        self._projector = projection.bind(self._capture.shapes, self._capture.mixable, next(model.parameters()).device)
        self.passes: list[tuple[Tensor, Tensor]] = []
        """Sketches `[n, k]` and norms `[n]` of the backward passes since this was last emptied."""
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._capture.attach(self._begin, self._projector.mixers_in_forming, factored=self._projector.factored)
        self._watch()

    @property
    def dim(self) -> int:
        """Entries k of a sketch."""
        return self._projector.dim

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sketched parameters and their shapes."""
        return self._capture.shapes

    @property
    def recording(self) -> bool:
        """Whether forward passes are sketched in their backward pass."""
        return self._capture.recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self._capture.recording = value

    def detach(self) -> None:
        """Leave the model as it was."""
        self._capture.detach()
        self._stop_watching()

    def _begin(self, n: int) -> tuple[Sink, Callable[[], None]]:
        sums = Accumulation(self._projector, n, self._capture.single_position)

        def end() -> None:
            self.passes.append(sums.finished())
            if self._handles:
                self._compare_sum(self.passes[-1][0].sum(0))

        return sums.add, end

    def _watch(self) -> None:
        """Keep the weights' own gradients of the first pass."""

        def keep(name: str, gradient: Tensor) -> None:
            if self.recording:
                self._gradients[name] = gradient

        for name in self.shapes:
            parameter = self._capture.model.get_parameter(name)
            self._handles.append(parameter.register_hook(partial(keep, name)))  # type: ignore[no-untyped-call]

    def _stop_watching(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _compare_sum(self, summed: Tensor) -> None:
        self._stop_watching()
        expected = sketch_of(self._projector, self._gradients, self._capture.single_position)
        self._gradients.clear()
        tolerance = HALF_TOLERANCE if self._capture.coarse else TENSOR_FLOAT_TOLERANCE
        off = float((summed - expected).norm() / expected.norm().clamp_min(1e-30))
        if off > tolerance:
            raise GradientMismatchError(
                f"the samples' sketches add up to another gradient than the step's own (off by {off:.1%}): a parameter "
                "is used outside its layer's forward, samples meet in a layer, or activations are checkpointed with "
                "use_reentrant=True; rs.check_model(model, example) names the parameters to leave out with parameters=."
            )
