"""Hooks that note every call of a model's layers, and hand the gradients of what they gave to a backward pass."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from retrac_scale.gradients.backward import Backward, Traits
from retrac_scale.gradients.errors import UncapturableError
from retrac_scale.gradients.layers import (
    Call,
    Layer,
    ParameterFilter,
    Precision,
    first_of,
    layers_of,
    selected_parameters,
)
from retrac_scale.gradients.nested import detached, mapped, tensors
from retrac_scale.gradients.registry import LayerRule, Seen, why_alone
from retrac_scale.gradients.seams import Hook, seam


class WatchedModel:
    """A model, its layers of selected parameters, and what they have seen of the current forward pass.

    Args:
        model: any torch module whose samples do not interact.
        parameters: glob patterns, or a predicate on parameter names; None takes all that require a gradient.
    """

    def __init__(self, model: nn.Module, parameters: ParameterFilter) -> None:
        self.model = model
        names = selected_parameters(model, parameters)
        self.shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
        self.layers = layers_of(model, names)
        self.why_alone = why_alone(model)
        users = Counter(name for layer in self.layers for name in layer.parameters.values())
        self.traits = Traits({name for name, count in users.items() if count > 1})
        self.coarse = any(parameter.itemsize < 4 for parameter in model.parameters())
        """Whether 16 bits are anywhere on the way: in the model's weights, or by autocast in the last forward pass."""
        self._recording = False
        self._resting = 0  # contexts of others that have it rest
        self._rested: list[WatchedModel] = []
        self.trainable = True
        """Whether layers run with weights that require a gradient."""
        self.by_autograd_alone = False
        """Whether the backward pass that is going on is not for the layers' gradients to be formed."""
        self.backward: Backward | None = None
        """That is going on."""
        self._handles: list[Any] = []

    @property
    def recording(self) -> bool:
        """Whether calls are noted."""
        return self._recording and not self._resting

    @recording.setter
    def recording(self, value: bool) -> None:
        self._recording = value

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are selected, by name."""
        return {name: self.model.get_parameter(name) for name in self.shapes}

    @property
    def users(self) -> dict[str, tuple[nn.Module, LayerRule | None]]:
        """The (first) layer that uses each selected parameter, and its rule; None is per-sample autograd."""
        found: dict[str, tuple[nn.Module, LayerRule | None]] = {}
        for layer in self.layers:
            for name in layer.parameters.values():
                found.setdefault(name, (layer.module, layer.rule))
        return found

    @property
    def mixable(self) -> dict[str, int]:
        """Weights of layers whose output gradients may be mixed: name -> number of output features."""
        weights = [layer.parameters.get("weight", "") for layer in self.layers if layer.mixable]
        return {name: self.shapes[name][0] for name in weights if name and name not in self.traits.shared}

    @property
    def differentiating(self) -> bool:
        """Whether a backward pass is going on: a layer called then is one that was noted before, recomputed for it."""
        return self.by_autograd_alone or self.backward is not None

    @contextmanager
    def autograd_alone(self) -> Iterator[None]:
        """Backward passes inside are autograd's alone."""
        self.by_autograd_alone = True
        try:
            yield
        finally:
            self.by_autograd_alone = False

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Layers called inside are run once more for their own gradients."""
        recording, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = recording

    @contextmanager
    def others_rest(self) -> Iterator[None]:
        """What the model computes inside is nobody's to note."""
        self.enter(rests=False)
        try:
            yield
        finally:
            self.leave()

    def enter(self, *, rests: bool) -> None:
        """Begin to watch a model that nobody else watches, or who else does rests until this one leaves.

        Args:
            rests: whether this one will, when another comes.

        Raises:
            RuntimeError: another is there that cannot rest.
        """
        modules = {*self.model.modules()} if _watching else set()
        others = [one for one in _watching if not modules.isdisjoint(one.model.modules())]
        if not all(_watching[one] for one in others):
            raise RuntimeError(
                f"{type(self.model).__name__} is within another GradientSketcher's context, or this one's, which has "
                "to be left first; for several functions of a forward pass, call one with retain_graph=True."
            )
        self._rested = [] if rests else others
        for one in self._rested:
            one._resting += 1
        _watching[self] = rests

    def watch(self, going_on: Callable[[], Backward]) -> None:
        """Have every layer's calls noted: what its rule is for, before hooks of the model's own change it.

        Args:
            going_on: gives the backward pass that an output's gradient has come up in.
        """
        for layer in self.layers:
            note, first = partial(self._note, layer, going_on), layer.rule is not None
            if not first:  # it will be called again, and its hooks with it
                keep = Hook(layer.module, partial(self._keep_given, layer))
                self._handles.append(layer.module.register_forward_pre_hook(keep, prepend=True, with_kwargs=True))
            hook = Hook(layer.module, note)
            self._handles.append(layer.module.register_forward_hook(hook, prepend=first, with_kwargs=True))

    def leave(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for one in self._rested:
            one._resting -= 1
        self._rested = []
        _watching.pop(self, None)

    def forget(self) -> None:
        """Drop the gradients of a backward pass that failed."""
        for layer in self.layers:
            for call in layer.calls:
                call.grads.clear()

    def check_samples(self, n: int) -> None:
        """Raise UncapturableError when the model cannot tell n samples of a forward pass apart."""
        if n > 1 and self.why_alone:
            raise UncapturableError(
                f"{self.why_alone}, so the gradients of {n} samples cannot be told apart; give it one sample in each "
                "forward pass.",
                self.shapes,
            )

    @property
    def _notes(self) -> bool:
        return self.recording and not self.differentiating and torch.is_grad_enabled()

    def _keep_given(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._notes:
            layer.given = args, kwargs

    def _note(
        self,
        layer: Layer,
        going_on: Callable[[], Backward],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if not self._notes:  # what was noted before and is run once more, by a checkpoint, has to save as many tensors
            again = self.recording and torch.is_grad_enabled()
            return mapped(output, _differentiable) if again else None
        precision = _precision(output)
        self.coarse |= precision[2]
        if layer.rule is None:
            (args, kwargs), layer.given = layer.given, ((), {})
        own_args, own_kwargs = detached(args), detached(kwargs)
        versions = [(tensor, tensor._version) for tensor in tensors((own_args, own_kwargs))]
        call = Call(own_args, own_kwargs, versions, self.trainable)
        layer.note(call)
        if layer.rule is None:
            call.outputs.extend((tensor, tensor._version) for tensor in detached(list(tensors(output))))
            call.precision = precision
        places = itertools.count()

        def seen_outside(tensor: Tensor) -> Tensor:
            """The tensor as users outside the module see it, so that uses inside do not reach the hook."""
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor
            place = next(places)
            tensor = _differentiable(tensor)
            seen = self._on_gradient(layer, call, place, going_on)
            if layer.rule is not None and layer.rule.watch is not None:
                return layer.rule.watch(module, first_of(args, kwargs), tensor, seen)
            return seam(tensor, seen, apart=layer.rule is None)

        changed = mapped(output, seen_outside)
        if next(places) == 0 and not isinstance(output, Tensor):  # whole numbers carry no gradient
            raise UncapturableError(
                f"layer {layer.name!r} ({type(module).__name__}) returns an object of type {type(output).__name__}, "
                "in which no tensor is found that could be watched; return tensors, or tuples, lists or mappings of "
                "them, or leave the layer out with parameters=.",
                layer.parameters.values(),
            )
        return changed

    def _on_gradient(self, layer: Layer, call: Call, place: int, going_on: Callable[[], Backward]) -> Seen:
        def on_gradient(grad: Tensor, *kept: Tensor) -> None:
            if self.by_autograd_alone or id(call) not in layer.noted:  # left alone by now
                return
            backward = going_on()
            call.grads[place], call.kept = grad, kept
            if call.trainable:
                backward.trained.update(layer.parameters.values())
            if layer.rule is not None and len(layer.noted) == 1:
                backward.finish(layer)

        return on_gradient


_watching: WeakKeyDictionary[WatchedModel, bool] = WeakKeyDictionary()
"""Those at work, and whether they rest when another comes."""


def _differentiable(tensor: Tensor) -> Tensor:
    """The same, requiring a gradient if it can; never a leaf, since the model may change it in place."""
    if tensor.requires_grad or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.detach().requires_grad_().clone()


def _precision(output: Any) -> Precision:
    """Of the autocast that a layer was called under."""
    kind = next(tensors(output), _NO_TENSOR).device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


_NO_TENSOR = torch.empty(0)
