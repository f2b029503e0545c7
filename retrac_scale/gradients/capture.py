"""Hooks that turn one ordinary backward pass into per-sample gradients, parameter by parameter."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.registry import Rule, mixes_output, rule_for

ParameterFilter = Iterable[str] | Callable[[str], bool] | None
Sink = Callable[[str, Tensor], None]


@dataclass
class _Layer:
    """A module with parameters of its own, the names they go by, and its calls in the current forward pass."""

    name: str
    module: nn.Module
    parameters: dict[str, str]  # own name -> full name
    rule: Rule | None
    calls: list[_Call] = field(default_factory=list)


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    grads: dict[int, Tensor] = field(default_factory=dict)


class GradientCapture:
    """Per-sample gradients of every selected parameter of a model.

    Inside the context the weights are frozen, so the backward pass forms activation gradients only; each layer's
    per-sample gradient is then formed by its rule from its input and output gradient. Layers without a rule are
    recomputed by autograd, one sample at a time.

    Args:
        model: any torch module whose samples do not interact.
        parameters: glob patterns, or a predicate on parameter names; None takes all that require a gradient.
    """

    def __init__(self, model: nn.Module, *, parameters: ParameterFilter = None) -> None:
        self.model = model
        names = selected_parameters(model, parameters)
        self.shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
        self._layers = _layers(model, names)
        users: dict[str, int] = defaultdict(int)
        for layer in self._layers:
            for name in layer.parameters.values():
                users[name] += 1
        self._shared = {name for name, count in users.items() if count > 1}
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        self._recording = False
        self._backward: _Backward | None = None

    @property
    def mixable(self) -> dict[str, int]:
        """Parameters whose layers' output gradients may be mixed: name -> number of output features."""
        return {
            full: self.shapes[full][0]
            for layer in self._layers
            if mixes_output(layer.module)
            for full in layer.parameters.values()
            if full not in self._shared
        }

    def __enter__(self) -> GradientCapture:
        self._frozen = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for name, parameter in self.model.named_parameters():
            if name in self.shapes:  # frozen when its layer is called: a gradient that reaches it went around the layer
                self._handles.append(parameter.register_hook(_refuse(name)))  # type: ignore[no-untyped-call]
            else:
                parameter.requires_grad_(False)
        for layer in self._layers:
            self._handles.append(layer.module.register_forward_pre_hook(self._freeze))
            self._handles.append(layer.module.register_forward_hook(self._hook(layer), with_kwargs=True))
        self._recording = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._recording = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._forget()

    def backward(self, losses: Tensor, sink: Sink, mixers: Mapping[str, Tensor] | None = None) -> None:
        """Differentiate one loss per sample and hand every parameter's gradients to `sink`, once each.

        Args:
            losses: `[n]`; the batch of the forward pass holds each sample's rows one after another.
            sink: called with a parameter's name and its gradients `[n, p]`.
            mixers: for the weight of a mixable layer, a matrix `[rank, o]` that its output gradients are multiplied
                with, so that the gradients of the layer's parameters have `rank` in place of `o`.
        """
        if losses.ndim != 1:
            raise ValueError(f"losses must hold one value per sample, shape [n]; got shape {tuple(losses.shape)}.")
        if not losses.requires_grad:
            raise ValueError(
                "the losses do not depend on any captured layer; run the forward pass inside the context, with "
                "gradients enabled."
            )
        self._backward = _Backward(len(losses), sink, mixers or {}, self._shared)
        try:
            torch.autograd.backward(losses.sum())
            self._recording = False
            with torch.no_grad():
                for layer in self._layers:
                    self._backward.finish(layer)
                self._backward.flush()
        finally:
            self._recording = True
            self._backward = None
            self._forget()

    def _forget(self) -> None:
        for layer in self._layers:
            layer.calls.clear()

    def _freeze(self, module: nn.Module, args: Any) -> None:
        if self._recording:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def _hook(self, layer: _Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._recording or not torch.is_grad_enabled():
                return
            args, kwargs = _detached(args), _detached(kwargs)
            call = _Call(args, kwargs, _versions(args, kwargs))
            layer.calls.append(call)
            for place, tensor in enumerate(_tensors(output)):
                if not tensor.requires_grad:
                    tensor.requires_grad_()
                tensor.register_hook(self._on_gradient(layer, call, place))  # type: ignore[no-untyped-call]

        return hook

    def _on_gradient(self, layer: _Layer, call: _Call, place: int) -> Callable[[Tensor], None]:
        def on_gradient(grad: Tensor) -> None:
            if self._backward is None:
                raise RuntimeError("differentiate with the sketcher, not with losses.backward(), inside its context.")
            call.grads[place] = grad
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
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def finish(self, layer: _Layer) -> None:
        """Form the gradients of a layer from all its calls and deliver them."""
        total: dict[str, Tensor] = {}
        for call in layer.calls:
            if call.grads:
                for own, gradient in self._form(layer, call).items():
                    total[own] = total[own] + gradient if own in total else gradient
        layer.calls.clear()
        for own, name in layer.parameters.items() if total else ():
            if own not in total:
                raise ValueError(
                    f"the rule for {type(layer.module).__name__} gives no gradient for {name!r}; return one for every "
                    "parameter of the layer."
                )
            self._deliver(name, total[own].flatten(1))

    def _form(self, layer: _Layer, call: _Call) -> dict[str, Tensor]:
        if _versions(call.args, call.kwargs) != call.versions:
            raise ValueError(
                f"an input of layer {layer.name!r} was changed in place after the layer had used it, so its gradient "
                "cannot be formed; use the out-of-place operation in the model's forward."
            )
        if layer.rule is None:
            return _autograd(layer, call, self.n)
        activation, grad = call.args[0] if call.args else next(iter(call.kwargs.values())), call.grads[0]
        _check_rows(layer, activation.shape[0], self.n)
        mixer = self.mixers.get(layer.parameters.get("weight", ""))
        if mixer is not None:
            grad = _mix(grad, mixer, channels_last=isinstance(layer.module, nn.Linear))
        return layer.rule(layer.module, activation, grad, self.n)

    def _deliver(self, name: str, gradient: Tensor) -> None:
        if name in self.shared:
            self.waiting[name] = self.waiting[name] + gradient if name in self.waiting else gradient
        else:
            self.sink(name, gradient)

    def flush(self) -> None:
        """Deliver the parameters that several layers share."""
        for name, gradient in self.waiting.items():
            self.sink(name, gradient)


def _refuse(name: str) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        raise ValueError(
            f"parameter {name!r} is used outside its own layer's forward, where its per-sample gradient cannot be "
            "captured; leave it out with parameters=, or call its layer."
        )

    return hook


def _versions(*values: Any) -> list[int]:
    """How often each tensor among the values has been changed in place."""
    return [tensor._version for tensor in _tensors(values)]


def _mix(grad: Tensor, mixer: Tensor, *, channels_last: bool) -> Tensor:
    mixer = mixer.to(grad.dtype)
    if channels_last:
        return grad @ mixer.T
    return torch.matmul(mixer, grad.flatten(2)).reshape(len(grad), len(mixer), *grad.shape[2:])


def _autograd(layer: _Layer, call: _Call, n: int) -> dict[str, Tensor]:
    """The gradients of a layer without a rule: run it again for each sample alone and differentiate."""
    rows = call.grads[min(call.grads)].shape[0]
    _check_rows(layer, rows, n)
    each = rows // n
    own = {name: layer.module.get_parameter(name) for name in layer.parameters}
    gradients: dict[str, list[Tensor]] = {name: [] for name in own}
    for sample in range(n):
        part = slice(sample * each, (sample + 1) * each)
        with torch.enable_grad():
            weights = {name: value.detach().requires_grad_() for name, value in own.items()}
            args, kwargs = _rows(call.args, rows, part), _rows(call.kwargs, rows, part)
            output = torch.func.functional_call(layer.module, weights, args, kwargs)
            tensors = list(_tensors(output))
            formed = torch.autograd.grad(
                [tensors[place] for place in call.grads],
                list(weights.values()),
                [grad[part] for grad in call.grads.values()],
                allow_unused=True,
                materialize_grads=True,
            )
        for name, gradient in zip(own, formed, strict=True):
            gradients[name].append(gradient)
    return {name: torch.stack(values) for name, values in gradients.items()}


def _check_rows(layer: _Layer, rows: int, n: int) -> None:
    if rows < n or rows % n:
        raise ValueError(
            f"layer {layer.name!r} ran on {rows} rows for {n} losses, so its gradient cannot be told apart by sample; "
            "give the model one row (or a fixed number of rows) per sample, or leave the layer out with parameters=."
        )


def _rows(value: Any, rows: int, part: slice) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(item, rows, part) for item in value)
    if isinstance(value, dict):
        return {key: _rows(item, rows, part) for key, item in value.items()}
    return value


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(item) for item in value)
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _tensors(item)
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def _layers(model: nn.Module, names: list[str]) -> list[_Layer]:
    canonical = {id(model.get_parameter(name)): name for name in names}
    layers = []
    for name, module in model.named_modules():
        own = {
            key: canonical[id(value)] for key, value in module.named_parameters(recurse=False) if id(value) in canonical
        }
        if own:
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(f"layer {name!r} is a batch norm in training mode, which mixes samples; call eval().")
            layers.append(_Layer(name, module, own, rule_for(module)))
    return layers


def selected_parameters(model: nn.Module, parameters: ParameterFilter) -> list[str]:
    """Names of the parameters that `parameters` selects, in the model's order.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left.
    """
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    if parameters is None:
        chosen = trainable
    elif callable(parameters):
        chosen = [name for name in trainable if parameters(name)]
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        for pattern in patterns:
            if not fnmatch.filter(trainable, pattern):
                raise ValueError(f"parameters={pattern!r} matches none of the model's {len(trainable)} trainable ones.")
        chosen = [name for name in trainable if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not chosen:
        raise ValueError("no trainable parameter is selected; call requires_grad_() on some, or widen parameters=.")
    return chosen
