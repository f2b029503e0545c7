"""Hooks that turn one ordinary backward pass into per-sample gradients, parameter by parameter."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.errors import UncapturableError, used_elsewhere
from retrac_scale.gradients.layers import Call, Layer, ParameterFilter, Precision, layers_of, selected_parameters
from retrac_scale.gradients.mixing import SETS, mix, mix_outputs, one_set_each
from retrac_scale.gradients.nested import detached, mapped, tensors
from retrac_scale.gradients.outer import OuterProducts
from retrac_scale.gradients.recompute import recomputed
from retrac_scale.gradients.reference import Reference
from retrac_scale.gradients.registry import Gradients, LayerRule, Seen, computed, why_alone
from retrac_scale.gradients.seams import Hook, seam

Sink = Callable[[str, Any, slice], None]
"""sink(name, gradient, samples): a parameter's gradient `[m, ...]` of some samples; see `GradientCapture.backward`."""

CHUNK_BYTES, CHUNK_BYTES_OF_ACCELERATORS = 2 << 20, 256 << 20
"""A layer's gradients are formed and consumed for as many samples at a time as keep to this: on a CPU to a core's
cache, elsewhere to what makes the launches of kernels few."""


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
        names = selected_parameters(model, parameters)
        self.shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
        self._layers = layers_of(model, names)
        self._why_alone = why_alone(model)
        users: dict[str, int] = defaultdict(int)
        for layer in self._layers:
            for name in layer.parameters.values():
                users[name] += 1
        self._shared = {name for name, count in users.items() if count > 1}
        self.single_position: set[str] = set()
        """Weights of the linear layers that saw every row of the last batch as one vector."""
        self.half: set[str] = set()
        """Parameters that are of 16 bits themselves, or whose layers' output gradients were."""
        self.coarse = any(parameter.itemsize < 4 for parameter in model.parameters())
        """Whether 16 bits are anywhere on the way: in the model's weights, or by autocast in the last forward pass."""
        self._to_compare = (1 if self._why_alone else 2) if check else 0
        self._compared = 0
        self._thawed = False  # whether forward passes leave the weights trainable
        self._plain = False  # whether a backward pass is autograd's alone
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        self._recording = False
        self._backward: _Backward | None = None

    @property
    def users(self) -> dict[str, tuple[nn.Module, LayerRule | None]]:
        """The (first) layer that uses each selected parameter, and its rule; None is per-sample autograd."""
        found: dict[str, tuple[nn.Module, LayerRule | None]] = {}
        for layer in self._layers:
            for name in layer.parameters.values():
                found.setdefault(name, (layer.module, layer.rule))
        return found

    @property
    def mixable(self) -> dict[str, int]:
        """Weights of layers whose output gradients may be mixed: name -> number of output features."""
        weights = [layer.parameters.get("weight", "") for layer in self._layers if layer.mixable]
        return {name: self.shapes[name][0] for name in weights if name and name not in self._shared}

    def __enter__(self) -> GradientCapture:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._frozen.append(parameter)
            if name in self.shapes:  # frozen when its layer is called: a gradient that reaches it went around the layer
                self._handles.append(parameter.register_hook(self._refuse(name)))  # type: ignore[no-untyped-call]
            else:
                parameter.requires_grad_(False)
        for layer in self._layers:
            self._handles.append(layer.module.register_forward_pre_hook(self._freeze(layer), prepend=True))
        self._watch()
        self._thawed = self._compared < self._to_compare
        self._recording = True
        return self

    def _watch(self) -> None:
        """Have every layer's calls noted: what its rule is for, before hooks of the model's own change it."""
        for layer in self._layers:
            hook, first = self._hook(layer), layer.rule is not None
            if not first:  # it will be called again, and its hooks with it
                keep = Hook(layer.module, partial(_keep_given, layer))
                self._handles.append(layer.module.register_forward_pre_hook(keep, prepend=True, with_kwargs=True))
            self._handles.append(layer.module.register_forward_hook(hook, prepend=first, with_kwargs=True))

    def __exit__(self, *exc: object) -> None:
        self._recording = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        for layer in self._layers:  # what hooks have computed holds the last forward pass
            vars(layer.module).update({own: value.detach() for own, value in computed(layer.module).items()})
        self._forget()
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
        unformed: bool = False,
        retain_graph: bool = False,
    ) -> Reference | None:
        """Differentiate one loss per sample and hand every parameter's gradients to `sink`, once each.

        Args:
            losses: `[n]`; the batch of the forward pass holds each sample's rows one after another.
            sink: called with a parameter's name, the gradients of some samples `[m, ...]` and which samples; every
                sample of every parameter comes once.
            mixers: for the weight of a mixable layer, the mixer `[r, o]` of its output gradients, see
                `gradients.mixing`; layers in `single_position` are left as they are.
            unformed: let the sink have `OuterProducts` in place of gradients that are sums of such.
            retain_graph: keep the forward pass, to differentiate another function of it next.

        Returns:
            What the gradients were compared with, if this was the batch that is checked.

        Raises:
            UncapturableError: gradients cannot be told apart by sample, or not be formed.
            GradientMismatchError: those of the batch that is checked are not plain autograd's.
        """
        if losses.ndim != 1:
            raise ValueError(f"losses must hold one value per sample, shape [n]; got shape {tuple(losses.shape)}.")
        if not losses.requires_grad:
            raise ValueError(
                "the losses do not depend on any captured layer; run the forward pass inside the context, with "
                "gradients enabled."
            )
        self.check_samples(len(losses))
        reference = self._reference(losses)
        if reference is not None:
            sink = reference.beside(sink)
        called = {name for layer in self._layers if layer.calls for name in layer.parameters.values()}
        self._differentiate(losses, sink, mixers or {}, unformed, retain_graph)
        if reference is not None:
            reference.compare(mixers or {}, self.single_position, self.half, type(self.model).__name__)
            self._compared = len(losses)
        if self._thawed and not retain_graph and self._compared >= self._to_compare:
            self._thawed = False  # and as frozen as the forward pass would have left them
            for name in called:
                self.model.get_parameter(name).requires_grad_(False)
        return reference

    def _reference(self, losses: Tensor) -> Reference | None:
        """Plain autograd's word on a batch, if it is to be checked and there is one."""
        if not self._thawed or self._compared >= min(len(losses), self._to_compare):
            return None
        parameters = {name: self.model.get_parameter(name) for name in self.shapes}
        reference = Reference(len(losses), parameters)
        self._plain = True
        try:
            weighted = (losses * reference.factors.to(losses.dtype)).sum()
            reference.expect(weighted, None, parameters)
        except RuntimeError:
            for layer in self._layers:
                for call in layer.calls:
                    _check_unchanged(layer, call)
            raise
        finally:
            self._plain = False
        return reference if reference.finite else None

    def _differentiate(
        self, losses: Tensor, sink: Sink, mixers: Mapping[str, Tensor], unformed: bool, retain_graph: bool
    ) -> None:
        self._backward = _Backward(
            len(losses), sink, mixers, self._shared, self.single_position, self.half, unformed, retain_graph
        )
        try:
            if self._thawed:  # their gradients would be added up in the parameters
                weights = [self.model.get_parameter(name) for name in self.shapes]
                torch.autograd.grad(losses.sum(), weights, retain_graph=retain_graph, allow_unused=True)
            else:
                torch.autograd.backward(losses.sum(), retain_graph=retain_graph)
            self._recording = False
            with torch.no_grad():
                for layer in self._layers:
                    self._backward.finish(layer)
                self._backward.flush()
        finally:
            self._recording = True
            self._backward = None
            if not retain_graph:
                self._forget()

    @property
    def _backwards(self) -> bool:
        """Whether a backward pass is going on: a layer called then is one that was noted before, recomputed for it."""
        return self._plain or self._backward is not None

    def check_samples(self, n: int) -> None:
        """Raise UncapturableError when the model cannot tell n samples of a forward pass apart."""
        if n > 1 and self._why_alone:
            raise UncapturableError(
                f"{self._why_alone}, so the gradients of {n} samples cannot be told apart; give it one sample in each "
                "forward pass.",
                self.shapes,
            )

    def _forget(self) -> None:
        for layer in self._layers:
            layer.calls.clear()
            layer.given = (), {}

    def _freeze(self, layer: Layer) -> Hook:
        def freeze(module: nn.Module, args: Any) -> None:
            if self._recording and not self._thawed:
                for own in layer.parameters:
                    module.get_parameter(own).requires_grad_(False)

        return Hook(layer.module, freeze)

    def _refuse(self, name: str) -> Callable[[Tensor], None]:
        def refuse(grad: Tensor) -> None:
            if not self._thawed:
                raise used_elsewhere(name)

        return refuse

    def _hook(self, layer: Layer) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._recording or self._backwards or not torch.is_grad_enabled():
                return None
            precision = _precision(output)
            self.coarse |= precision[2]
            if layer.rule is None:
                args, kwargs = layer.given
            own_args, own_kwargs = detached(args), detached(kwargs)
            versions = [(tensor, tensor._version) for tensor in tensors((own_args, own_kwargs))]
            call = Call(own_args, own_kwargs, versions)
            layer.calls.append(call)
            if layer.rule is None:
                call.outputs.extend((tensor, tensor._version) for tensor in detached(list(tensors(output))))
                call.precision = precision
            places = itertools.count()

            def seen_outside(tensor: Tensor) -> Tensor:
                """The tensor as users outside the module see it, so that uses inside do not reach the hook."""
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    return tensor
                place = next(places)
                if not tensor.requires_grad:
                    tensor = tensor.detach().requires_grad_().clone()  # never a leaf: the model may change it in place
                seen = self._on_gradient(layer, call, place)
                if layer.rule is not None and layer.rule.watch is not None:
                    return layer.rule.watch(module, _first(args, kwargs), tensor, seen)
                return seam(tensor, seen, apart=layer.rule is None)

            return mapped(output, seen_outside)

        return Hook(layer.module, hook)

    def _on_gradient(self, layer: Layer, call: Call, place: int) -> Seen:
        def on_gradient(grad: Tensor, *kept: Tensor) -> None:
            if self._plain:
                return
            if self._backward is None:
                raise RuntimeError("differentiate with the sketcher, not with losses.backward(), inside its context.")
            call.grads[place], call.kept = grad, kept
            if layer.rule is not None and len(layer.calls) == 1:
                self._backward.finish(layer)

        return on_gradient


@dataclass
class _Backward:
    """One backward pass: forms gradients, adds up those of parameters with several users, delivers each once."""

    n: int
    sink: Sink
    mixers: Mapping[str, Tensor]
    shared: set[str]
    single_position: set[str]
    half: set[str]
    unformed: bool = False
    retain_graph: bool = False
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def finish(self, layer: Layer) -> None:
        """Form the gradients of a layer from all its calls and deliver them, some samples at a time."""
        calls = [call for call in layer.calls if call.grads]
        if not self.retain_graph:
            layer.calls.clear()
        if not calls:
            return
        for call in calls:
            _check_unchanged(layer, call)
            _check_rows(layer, call, self.n)
        self._note_precision(layer, calls)
        mixer = self._mixer(layer, calls)
        if mixer is not None or layer.narrow:
            for call in calls:
                call.grads[0] = _widened(call.grads[0])
        products = layer.rule is not None and layer.rule.suits_products(layer.module, calls[0].grads[0])
        left = products and self._left_unformed(layer, calls)
        size = self.n if left else self._samples_at_a_time(layer, calls[0], mixer)
        for start in range(0, self.n, size):
            samples = slice(start, min(start + size, self.n))
            gradients = (
                self._form(layer, calls[0], samples, mixer) if left else self._formed(layer, calls, samples, mixer)
            )
            for own, name in layer.parameters.items():
                if own in gradients:
                    self._deliver(name, gradients[own], samples)
                elif not (left and _goes_along(gradients, own)):
                    raise UncapturableError(
                        f"the rule for {type(layer.module).__name__} gives no gradient for {name!r}; return one for "
                        "every parameter of the layer.",
                        [name],
                    )
        for call in calls:
            call.grads.clear()

    def _note_precision(self, layer: Layer, calls: list[Call]) -> None:
        """Which parameters' gradients are rounded to 16 bits somewhere."""
        coarse = any(grad.itemsize < 4 for call in calls for grad in call.grads.values())
        coarse |= any(call.precision is not None and call.precision[2] for call in calls)
        for own, name in layer.parameters.items():
            if coarse or layer.module.get_parameter(own).itemsize < 4:
                self.half.add(name)

    def _mixer(self, layer: Layer, calls: list[Call]) -> Tensor | None:
        """What the layer's output gradients are to be multiplied with; also notes whether it is `single_position`."""
        weight = layer.parameters.get("weight", "")
        if layer.mixable and isinstance(layer.module, nn.Linear) and all(call.grads[0].ndim == 2 for call in calls):
            self.single_position.add(weight)
            return None
        self.single_position.discard(weight)
        return self.mixers.get(weight)

    def _left_unformed(self, layer: Layer, calls: list[Call]) -> bool:
        """Whether the sink gets the products that the rule gives, which take no memory, for all samples at once."""
        own = layer.parameters
        return self.unformed and len(calls) == 1 and "weight" in own and self.shared.isdisjoint(own.values())

    def _samples_at_a_time(self, layer: Layer, call: Call, mixer: Tensor | None) -> int:
        numel = layer.numel
        if mixer is not None:
            r, o = mixer.shape
            numel = numel * min(SETS * r, o) // o
        on_cpu = next(iter(call.grads.values())).device.type == "cpu"
        return max(1, (CHUNK_BYTES if on_cpu else CHUNK_BYTES_OF_ACCELERATORS) // (4 * max(1, numel)))

    def _formed(self, layer: Layer, calls: list[Call], samples: slice, mixer: Tensor | None) -> dict[str, Tensor]:
        """Own name -> gradients `[m, ...]` of some samples, summed over the layer's calls."""
        total: dict[str, Tensor] = {}
        for call in calls:
            gradients = self._form(layer, call, samples, mixer)
            for own in layer.parameters:
                if (formed := _one(gradients, own)) is None:
                    continue
                if own in total:
                    total[own] += formed
                else:
                    total[own] = formed if len(calls) == 1 else formed.clone()
        return total

    def _form(self, layer: Layer, call: Call, samples: slice, mixer: Tensor | None) -> Gradients:
        if layer.rule is None:
            return recomputed(layer, call, self.n, range(samples.start, samples.stop))
        values = [_first(call.args, call.kwargs), call.grads[0], *call.kept]
        n = samples.stop - samples.start
        if n < self.n:
            each = len(call.grads[0]) // self.n
            values = [value[samples.start * each : samples.stop * each] for value in values]
        activation, grad, *kept = values
        products = layer.rule.suits_products(layer.module, grad)
        if mixer is not None and not products and SETS * len(mixer) < mixer.shape[1]:
            return _from_mixed(layer.rule, layer.module, activation, grad, n, mixer)
        gradients = layer.rule.form(layer.module, activation, grad, n, *kept)
        if isinstance(weight := gradients.get("weight"), OuterProducts):
            weight.with_bias &= "bias" in layer.parameters
            weight.mixer = mixer
        elif mixer is not None and weight is not None:
            return {**gradients, "weight": mix(mixer, weight)}
        return gradients

    def _deliver(self, name: str, gradient: Any, samples: slice) -> None:
        if name in self.shared:
            if name not in self.waiting:
                self.waiting[name] = gradient.new_zeros(self.n, *gradient.shape[1:])
            self.waiting[name][samples] += gradient
        else:
            self.sink(name, gradient, samples)

    def flush(self) -> None:
        """Deliver the parameters that several layers share."""
        for name, gradient in self.waiting.items():
            self.sink(name, gradient, slice(0, self.n))


def _from_mixed(
    rule: LayerRule, layer: nn.Module, activation: Tensor, grad: Tensor, n: int, mixer: Tensor
) -> Gradients:
    """Gradients of a weight from mixed output gradients, and of the bias."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    weight = rule.form(layer, activation, mix_outputs(mixer, grad, axis), n)["weight"]
    assert isinstance(weight, Tensor)  # for a layer without products
    return {"weight": one_set_each(weight), "bias": grad.movedim(axis, -1).reshape(n, -1, grad.shape[axis]).sum(1)}


def _widened(grad: Tensor) -> Tensor:
    """On a CPU 32 bits at least, in which products are compiled."""
    return grad.float() if grad.device.type == "cpu" and grad.itemsize < 4 else grad


def _one(gradients: Gradients, own: str) -> Tensor | None:
    """A parameter's gradients, formed; None if the rule gives none."""
    along = _goes_along(gradients, own)
    gradient = gradients.get("weight" if along else own)
    if isinstance(gradient, OuterProducts):
        return gradient.bias() if along else gradient.formed()
    return gradient


def _goes_along(gradients: Gradients, own: str) -> bool:
    products = gradients.get("weight")
    return own == "bias" and isinstance(products, OuterProducts) and products.with_bias


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _precision(output: Any) -> Precision:
    """Of the autocast that a layer was called under."""
    kind = next(tensors(output), _NO_TENSOR).device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


_NO_TENSOR = torch.empty(0)


def _keep_given(layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer.given = args, kwargs


def _check_unchanged(layer: Layer, call: Call) -> None:
    if any(tensor._version != version for tensor, version in call.versions):
        raise UncapturableError(
            f"an input of layer {layer.name!r} was changed in place after the layer had used it, so its "
            "gradient cannot be formed; use the out-of-place operation in the model's forward.",
            layer.parameters.values(),
        )


def _check_rows(layer: Layer, call: Call, n: int) -> None:
    rows = call.grads[min(call.grads)].shape[0]
    if rows < n or rows % n:
        raise UncapturableError(
            f"layer {layer.name!r} ran on {rows} rows for {n} losses, so its gradient cannot be told apart by sample; "
            "give the model one row (or a fixed number of rows) per sample, or leave the layer out with parameters=.",
            layer.parameters.values(),
        )
