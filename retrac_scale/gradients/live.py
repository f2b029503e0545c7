"""Per-sample gradients out of a training loop's own backward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable

from retrac_scale.gradients.capture import GradientCapture, Sink, _Backward
from retrac_scale.gradients.layers import Call, Layer, ParameterFilter
from retrac_scale.gradients.nested import mapped, tensors
from retrac_scale.gradients.reference import Reference
from retrac_scale.gradients.registry import Seen
from retrac_scale.gradients.seams import Hook, seam

Begin = Callable[[int], tuple[Sink, Callable[[], None]]]
"""Called with the number of samples when a backward pass begins; gives a sink, and what to call when it has ended."""


class LiveCapture(GradientCapture):
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
        super().__init__(model, parameters=parameters, check=True)
        self._samples = 0
        self._outputs: list[Tensor] = []  # of the model in the forward passes of the step that is checked
        self._checkable = True
        self._against: Reference | None = None

    @property
    def recording(self) -> bool:
        """Whether forward passes are taken note of."""
        return self._recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self._recording = value

    def attach(self, begin: Begin, mixers: Mapping[str, Tensor], *, unformed: bool) -> None:
        """Hand the gradients of every backward pass from now on to what `begin` gives.

        Args:
            begin: see `Begin`.
            mixers: see `GradientCapture.backward`.
            unformed: likewise.
        """
        self._begin, self._mixers, self._unformed = begin, mixers, unformed
        begins, ends = Hook(self.model, self._count), Hook(self.model, self._watch_outputs)
        self._handles.append(self.model.register_forward_pre_hook(begins, with_kwargs=True))
        self._watch()
        self._handles.append(self.model.register_forward_hook(ends, with_kwargs=True))

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recording and torch.is_grad_enabled():
            if self._backward is not None:  # a backward pass that failed half way
                self._backward = None
                self._forget()
            self._samples = 1 if self._why_alone else len(next(tensors((args, kwargs))))

    def _watch_outputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._recording or self._backwards or not torch.is_grad_enabled() or self._compared >= self._to_compare:
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
        if self._plain:
            return
        self._begun()
        if self._against is not None:
            self._plain = True
            try:
                parameters = {name: self.model.get_parameter(name) for name in self.shapes}
                self._against.expect(self._outputs[place], self._against.spread(grad), parameters)
            finally:
                self._plain = False

    def _begun(self) -> _Backward:
        """The backward pass that is going on."""
        if self._backward is None:
            sink, self._end = self._begin(self._samples)
            if self._outputs and self._checkable:
                parameters = {name: self.model.get_parameter(name) for name in self.shapes}
                self._against = Reference(self._samples, parameters)
                sink = self._against.beside(sink)
            self._backward = _Backward(
                self._samples, sink, self._mixers, self._shared, self.single_position, self.half, self._unformed
            )
            Variable._execution_engine.queue_callback(self._finish)
        return self._backward

    def _on_gradient(self, layer: Layer, call: Call, place: int) -> Seen:
        def on_gradient(grad: Tensor, *kept: Tensor) -> None:
            if self._plain:
                return
            backward = self._begun()
            call.grads[place], call.kept = grad, kept
            if layer.rule is not None and len(layer.calls) == 1:
                backward.finish(layer)

        return on_gradient

    def _finish(self) -> None:
        """Run by the autograd engine when a backward pass is through."""
        backward = self._backward
        assert backward is not None
        try:  # still going on for the hooks, which layers that are recomputed would call
            with torch.no_grad():
                for layer in self._layers:
                    backward.finish(layer)
                backward.flush()
        finally:
            self._backward = None
            self._forget()
        self._compare()
        self._end()

    def _forget(self) -> None:
        super()._forget()
        self._outputs.clear()

    def _compare(self) -> None:
        """Of the first backward pass of several samples, if its outputs could be told apart."""
        against, self._against = self._against, None
        if against is not None and against.finite:
            against.compare(self._mixers, self.single_position, self.half, type(self.model).__name__)
            self._compared = self._samples
        elif not self._checkable and self._compared < self._to_compare:
            self._compared = self._to_compare
            warnings.warn(
                f"the sketches of {type(self.model).__name__} are not checked sample by sample, since it is called on "
                "its own output, or its output has no row for each sample; rs.check_model(model, example) can do it.",
                stacklevel=2,
            )
