"""Per-sample gradients out of a training loop's own backward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable

from retrac_scale.gradients.backward import Backward, Sink
from retrac_scale.gradients.graphs import within_backward
from retrac_scale.gradients.layers import ParameterFilter
from retrac_scale.gradients.nested import mapped, tensors
from retrac_scale.gradients.reference import Reference
from retrac_scale.gradients.seams import Hook, seam
from retrac_scale.gradients.watched import WatchedModel

Begin = Callable[[int], tuple[Sink, Callable[[], None]]]
"""Called with the number of samples when a backward pass begins; gives a sink, and what to call when it has ended."""


class LiveCapture:
    """Per-sample gradients of the selected parameters while they are trained.

    The weights stay trainable: whatever calls backward gets their gradients as without the capture. The samples of a
    batch are the rows of the model's first tensor argument. Forward passes without gradients are left alone, and so are
    those made while `recording` is false.

    In the first backward pass, plain autograd's gradient of the model's output, with each sample's rows times a factor
    of its own, is what the captured gradients are compared with. It costs a backward pass once.

    Args:
        model: any torch module whose samples do not interact.
        parameters: glob patterns, or a predicate on parameter names; None takes all that require a gradient.
    """

    def __init__(self, model: nn.Module, *, parameters: ParameterFilter = None) -> None:
        self.model = model
        self._watched = WatchedModel(model, parameters)
        self.shapes = self._watched.shapes
        self._to_compare = 1 if self._watched.why_alone else 2
        self._compared = 0
        self._samples = 0
        self._outputs: list[Tensor] = []  # of the model in the forward passes of the step that is checked
        self._checkable = True
        self._against: Reference | None = None
        self._handles: list[Any] = []

    @property
    def mixable(self) -> dict[str, int]:
        """See `GradientCapture`, as of those that follow."""
        return self._watched.mixable

    @property
    def single_position(self) -> set[str]:
        """See `GradientCapture`."""
        return self._watched.traits.single_position

    @property
    def coarse(self) -> bool:
        """See `GradientCapture`."""
        return self._watched.coarse

    @property
    def recording(self) -> bool:
        """Whether forward passes are taken note of."""
        return self._watched.recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self._watched.recording = value

    def attach(self, begin: Begin, mixers: Mapping[str, Tensor], *, factored: bool) -> None:
        """Hand the gradients of every backward pass from now on to what `begin` gives.

        Args:
            begin: see `Begin`.
            mixers: see `GradientCapture.backward`.
            factored: likewise.
        """
        self._watched.enter(rests=True)
        self._begin, self._mixers, self._factored = begin, mixers, factored
        begins, ends = Hook(self.model, self._count), Hook(self.model, self._watch_outputs)
        self._handles.append(self.model.register_forward_pre_hook(begins, with_kwargs=True))
        self._watched.watch(self._begun)
        self._handles.append(self.model.register_forward_hook(ends, with_kwargs=True))

    def detach(self) -> None:
        """Leave the model as it was."""
        self._watched.leave()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
        for layer in self._watched.layers:  # their graphs may still be differentiated
            layer.noted.clear()

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.recording or not torch.is_grad_enabled() or within_backward():  # there, it is run once more
            return
        if self._watched.backward is not None:  # a backward pass that failed half way
            self._watched.backward = None
            self._forget()
        self._samples = 1 if self._watched.why_alone else len(next(tensors((args, kwargs))))

    def _watch_outputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        noted = self.recording and not self._watched.differentiating and torch.is_grad_enabled()
        if not noted or self._compared >= self._to_compare:
            return None
        again = bool(self._outputs) and any(tensor.requires_grad for tensor in tensors((args, kwargs)))
        self._checkable &= not again  # what reaches the first pass through the second cannot be kept apart

        def watched(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            self._checkable &= tensor.ndim > 0 and len(tensor) % self._samples == 0
            place = len(self._outputs)
            self._outputs.append(tensor)
            return seam(tensor, lambda grad: self._expect(place, grad), apart=False)

        return mapped(output, watched)

    def _expect(self, place: int, grad: Tensor) -> None:
        """Ask plain autograd for the weights' gradient through one output of the model."""
        if self._watched.by_autograd_alone or not self._handles:
            return
        self._begun()
        if self._against is not None:
            with self._watched.autograd_alone():
                self._against.expect(self._outputs[place], self._against.spread(grad))

    def _begun(self) -> Backward:
        """The backward pass that is going on."""
        watched = self._watched
        if watched.backward is None:
            sink, self._end = self._begin(self._samples)
            if self._outputs and self._checkable:
                self._against = Reference(self._samples, watched.parameters)
                sink = self._against.beside(sink)
            given = self._samples, sink, self._mixers, watched.traits, self._factored
            watched.backward = Backward(*given, retain_graph=True)  # for all that is known of it here
            Variable._execution_engine.queue_callback(self._finish)
        return watched.backward

    def _finish(self) -> None:
        """Run by the autograd engine when a backward pass is through."""
        backward = self._watched.backward
        assert backward is not None
        try:
            with torch.no_grad(), self._watched.unseen():
                for layer in self._watched.layers:
                    backward.finish(layer)
                backward.flush()
        except BaseException:
            self._watched.forget()
            raise
        finally:
            self._watched.backward = None
            self._outputs.clear()
        self._compare()
        self._end()

    def _forget(self) -> None:
        self._watched.forget()
        self._outputs.clear()

    def _compare(self) -> None:
        """Of the first backward pass of several samples, if its outputs could be told apart."""
        against, self._against = self._against, None
        if against is not None and against.finite:
            traits = self._watched.traits
            against.compare(traits.mixed(self._mixers), traits.half, type(self.model).__name__)
            self._compared = self._samples
        elif not self._checkable and self._compared < self._to_compare:
            self._compared = self._to_compare
            warnings.warn(
                f"the sketches of {type(self.model).__name__} are not checked sample by sample, since it is called on "
                "its own output, or its output has no row for each sample; rs.check_model(model, example) can do it.",
                stacklevel=2,
            )
