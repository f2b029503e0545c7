"""Per-sample gradients out of a training loop's own backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable

from retrac_scale.gradients.capture import GradientCapture, Sink, _Backward
from retrac_scale.gradients.layers import Call, Layer, ParameterFilter
from retrac_scale.gradients.nested import tensors
from retrac_scale.gradients.registry import Seen

Begin = Callable[[int], tuple[Sink, Callable[[], None]]]
"""Called with the number of samples when a backward pass begins; gives a sink, and what to call when it has ended."""


class LiveCapture(GradientCapture):
    """Per-sample gradients of the selected parameters while they are trained.

    The weights stay trainable: whatever calls backward gets their gradients as without the capture. The samples of a
    batch are the rows of the model's first tensor argument. Forward passes without gradients are left alone, and so are
    those made while `recording` is false.

    Args:
        model: any torch module whose samples do not interact.
        parameters: glob patterns, or a predicate on parameter names; None takes all that require a gradient.
    """

    def __init__(self, model: nn.Module, *, parameters: ParameterFilter = None) -> None:
        super().__init__(model, parameters=parameters)
        self._samples = 0

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
        self._handles.append(self.model.register_forward_pre_hook(self._count, with_kwargs=True))
        self._watch()

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _hook(self, layer: Layer) -> Callable[..., Any]:
        hook = super()._hook(layer)

        def outside_backward(*called: Any) -> Any:
            """A forward pass during a backward pass recomputes activations for it, and was taken note of before."""
            return hook(*called) if self._backward is None else None

        return outside_backward

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recording and torch.is_grad_enabled():
            if self._backward is not None:  # a backward pass that failed half way
                self._backward = None
                self._forget()
            self._samples = 1 if self._why_alone else len(next(tensors((args, kwargs))))

    def _on_gradient(self, layer: Layer, call: Call, place: int) -> Seen:
        def on_gradient(grad: Tensor, *kept: Tensor) -> None:
            if self._backward is None:
                sink, self._end = self._begin(self._samples)
                self._backward = _Backward(
                    self._samples, sink, self._mixers, self._shared, self.single_position, self._unformed
                )
                Variable._execution_engine.queue_callback(self._finish)
            call.grads[place], call.kept = grad, kept
            if layer.rule is not None and len(layer.calls) == 1:
                self._backward.finish(layer)

        return on_gradient

    def _finish(self) -> None:
        """Run by the autograd engine when a backward pass is through."""
        backward, self._backward = self._backward, None
        assert backward is not None
        with torch.no_grad():
            for layer in self._layers:
                backward.finish(layer)
            backward.flush()
        self._forget()
        self._end()
