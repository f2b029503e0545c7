"""GradientCapture: per-sample gradients of a batch, parameter by parameter, from one ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.backward import Backward, Sink
from retrac_scale.gradients.errors import UncapturableError, used_elsewhere
from retrac_scale.gradients.graphs import leaves_of
from retrac_scale.gradients.layers import Layer, ParameterFilter, check_unchanged
from retrac_scale.gradients.reference import Reference
from retrac_scale.gradients.registry import LayerRule, computed
from retrac_scale.gradients.seams import Hook
from retrac_scale.gradients.watched import WatchedModel


class GradientCapture:
    """Per-sample gradients of every selected parameter of a model.

    Inside the context the weights are frozen, so the backward pass forms activation gradients only; each layer's
    per-sample gradient is then formed by its rule from its input and output gradient. Layers without a rule are
    recomputed by autograd, one sample at a time.

    Args:
        model: any torch module whose samples do not interact.
        parameters: glob patterns, or a predicate on parameter names; None takes all that require a gradient.
        check: compare the first batch's gradients with plain autograd's, which costs one batch once, more only where
            the first ones hold a single sample each: as long as that is so, weights are not frozen either.
    """

    def __init__(self, model: nn.Module, *, parameters: ParameterFilter = None, check: bool = False) -> None:
        self.model = model
        self._watched = WatchedModel(model, parameters)
        self.shapes = self._watched.shapes
        self._to_compare = (1 if self._watched.why_alone else 2) if check else 0
        self._compared = 0
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        self._names: dict[int, str] = {}  # inside, of the selected parameters by their ids

    @property
    def users(self) -> dict[str, tuple[nn.Module, LayerRule | None]]:
        """The (first) layer that uses each selected parameter, and its rule; None is per-sample autograd."""
        return self._watched.users

    @property
    def mixable(self) -> dict[str, int]:
        """Weights of layers whose output gradients may be mixed: name -> number of output features."""
        return self._watched.mixable

    @property
    def single_position(self) -> set[str]:
        """Weights of the linear layers that saw every row of the last batch as one vector, which are never mixed."""
        return self._watched.traits.single_position

    @property
    def half(self) -> set[str]:
        """Parameters that are of 16 bits themselves, or whose layers' output gradients were."""
        return self._watched.traits.half

    @property
    def coarse(self) -> bool:
        """Whether 16 bits are anywhere on the way: in the model's weights, or by autocast in the last forward pass."""
        return self._watched.coarse

    def __enter__(self) -> GradientCapture:
        self._watched.enter(rests=False)
        every = dict(self.model.named_parameters())
        for name, parameter in every.items():
            if parameter.requires_grad:
                self._frozen.append(parameter)
            if name not in self.shapes:
                parameter.requires_grad_(False)
        for layer in self._watched.layers:
            weights = [every[name] for name in layer.parameters.values()]
            freeze, thaw = (self._switch(layer, weights, trainable=after) for after in (False, True))
            self._handles.append(layer.module.register_forward_pre_hook(freeze, prepend=True))
            # after hooks that count as part of the layer, before others
            self._handles.append(layer.module.register_forward_hook(thaw, prepend=layer.rule is not None))
        self._names = {id(every[name]): name for name in self.shapes}
        self._watched.traits.half |= {name for name in self.shapes if every[name].itemsize < 4}
        self._watched.watch(self._going_on)
        self._watched.trainable = self._compared < self._to_compare
        self._watched.recording = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._watched.recording = False
        self._watched.leave()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        for layer in self._watched.layers:  # what hooks have computed holds the last forward pass
            vars(layer.module).update({own: value.detach() for own, value in computed(layer.module).items()})
        if isinstance(error := exc[1], NotImplementedError):
            names = list(self.shapes)
            raise UncapturableError(
                f"{type(self.model).__name__} cannot be differentiated on this device, so that {names[0]!r} and its "
                f"{len(names) - 1} other parameters have no gradients: {error}",
                names,
            ) from error

    def backward(
        self,
        losses: Tensor,
        sink: Sink,
        mixers: Mapping[str, Tensor] | None = None,
        *,
        factored: bool = False,
        retain_graph: bool = False,
    ) -> Reference | None:
        """Differentiate one loss per sample and hand every parameter's gradients to `sink`, once each.

        Args:
            losses: `[n]`; the batch of the forward pass holds each sample's rows one after another.
            sink: called with a parameter's name, the gradients of some samples `[m, ...]` and which samples; every
                sample of every parameter comes once.
            mixers: for the weight of a mixable layer, the mixer `[r, o]` of its output gradients, see
                `gradients.mixing`; layers in `single_position` are left as they are.
            factored: let the sink have `FactoredGradients` in place of gradients that are sums of such.
            retain_graph: keep the forward pass, to differentiate another function of it next.

        Returns:
            What the gradients were compared with, if this was the batch that is checked.

        Raises:
            UncapturableError: gradients cannot be told apart by sample, or not be formed.
            GradientMismatchError: those of the batch that is checked are not plain autograd's.
        """
        if losses.ndim != 1 or not len(losses):
            raise ValueError(
                f"losses must hold one value per sample, shape [n] for one or more; got shape {tuple(losses.shape)}."
            )
        if not losses.requires_grad:
            raise ValueError(
                "the losses do not depend on any captured layer; run the forward pass inside the context, with "
                "gradients enabled."
            )
        self.check_samples(len(losses))
        watched, mixers = self._watched, mixers or {}
        reference = self._reference(losses)
        if reference is not None:
            sink = reference.beside(sink)
        self._differentiate(losses, Backward(len(losses), sink, mixers, watched.traits, factored, retain_graph))
        if reference is not None:
            reference.compare(watched.traits.mixed(mixers), self.half, type(self.model).__name__)
            self._compared = len(losses)
        if not retain_graph and self._compared >= self._to_compare:
            watched.trainable = False
        return reference

    def check_samples(self, n: int) -> None:
        """Raise UncapturableError when the model cannot tell n samples of a forward pass apart."""
        self._watched.check_samples(n)

    def plain(self, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Plain autograd's gradients of the sum of losses that are computed outside the context.

        Args:
            losses: runs the model forward; whoever else watches it does not see this.
        """
        parameters = self._watched.parameters
        with self._watched.others_rest():
            total, given = losses().sum(), list(parameters.values())
            found = torch.autograd.grad(total, given, allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, found, strict=True))

    def _reference(self, losses: Tensor) -> Reference | None:
        """Plain autograd's word on a batch, if it is to be checked and there is one."""
        if not self._watched.trainable or self._compared >= min(len(losses), self._to_compare):
            return None
        reference = Reference(len(losses), self._watched.parameters)
        with self._watched.autograd_alone():
            try:
                reference.expect((losses * reference.factors.to(losses.dtype)).sum())
            except RuntimeError:
                for layer in self._watched.layers:
                    for call in layer.calls:
                        check_unchanged(layer, call)
                raise
        return reference if reference.finite else None

    def _differentiate(self, losses: Tensor, backward: Backward) -> None:
        watched, retain_graph = self._watched, backward.retain_graph
        watched.backward = backward
        try:
            total = losses.sum()
            # by all that the graph begins with: it is gone through as a whole, and nothing is added up in `grad`
            given = list(watched.parameters.values()) if watched.trainable else leaves_of(total)
            found = torch.autograd.grad(total, given, retain_graph=retain_graph, allow_unused=True)
            for leaf, grad in zip(given, found, strict=True):
                name = self._names.get(id(leaf), "")
                if name and grad is not None and name not in backward.trained:
                    raise used_elsewhere(name)
            with torch.no_grad(), watched.unseen():
                for layer in watched.layers:
                    backward.finish(layer)
                backward.flush()
        except BaseException:
            watched.forget()
            raise
        finally:
            watched.backward = None

    def _going_on(self) -> Backward:
        if self._watched.backward is None:
            raise RuntimeError("differentiate with the sketcher, not with losses.backward(), inside its context.")
        return self._watched.backward

    def _switch(self, layer: Layer, weights: Sequence[nn.Parameter], *, trainable: bool) -> Hook:
        """Frozen while their layer runs, weights get a gradient only by what goes around it, before it or after."""

        def switch(module: nn.Module, *given: Any) -> None:
            if self._watched.recording and not self._watched.trainable:
                for weight in weights:
                    weight.requires_grad_(trainable)

        return Hook(layer.module, switch)
