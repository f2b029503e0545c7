"""The layers that hold a model's selected parameters, and what each has seen of a forward pass."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from retrac_scale.gradients.errors import UncapturableError
from retrac_scale.gradients.registry import LayerRule, is_whole, rule_for

ParameterFilter = Iterable[str] | Callable[[str], bool] | None

Precision = tuple[str, torch.dtype, bool]
"""Of autocast: kind of device, type, and whether it was enabled."""

NARROW = 128
"""Outputs below which the products of 16-bit gradients take less time compiled in float32 on a CPU."""


@dataclass
class Layer:
    """A module, the parameters captured at it by the names they go by, and its calls whose graphs are there."""

    name: str
    module: nn.Module
    parameters: dict[str, str]  # own name -> full name
    rule: LayerRule | None
    numel: int
    noted: dict[int, ref[Call]] = field(default_factory=dict)
    """Its calls, by their ids; hooks on their outputs keep them, so that a graph which is freed takes them along."""
    given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    """To a layer without a rule, in its last call, before hooks of its own changed it."""

    def note(self, call: Call) -> None:
        """Take note of a call for as long as it lives."""
        key, noted = id(call), self.noted
        noted[key] = ref(call, lambda _: noted.pop(key, None))

    @property
    def calls(self) -> list[Call]:
        """Those that live."""
        return [call for one in list(self.noted.values()) if (call := one()) is not None]

    @property
    def mixable(self) -> bool:
        """Whether output gradients may be mixed across all output features."""
        return self.rule is not None and self.rule.mixable and getattr(self.module, "groups", 1) == 1

    @property
    def narrow(self) -> bool:
        """Whether its products are better made in float32."""
        module: Any = self.module
        return self.rule is not None and self.rule.factored is not None and len(module.weight) < NARROW

    def gives_factored(self, grad_output: Tensor) -> bool:
        """Whether, for such output gradients, its rule gives `FactoredGradients`."""
        return self.rule is not None and self.rule.factored is not None and self.rule.factored(self.module, grad_output)


@dataclass
class Call:
    """One call of a layer: its arguments, without gradient, and the gradients of its outputs once they are known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[tuple[Tensor, int]]  # of the tensors among them: how often each has been changed in place
    trainable: bool  # whether autograd would form the gradients too
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)  # for layers that are recomputed, with versions
    precision: Precision | None = None  # likewise
    grads: dict[int, Tensor] = field(default_factory=dict)
    kept: tuple[Tensor, ...] = ()

    @property
    def activation(self) -> Any:
        """The first argument."""
        return first_of(self.args, self.kwargs)

    def let_go(self) -> None:
        """Drop its tensors, which would stay until the whole graph is gone through."""
        self.args, self.kwargs, self.versions, self.outputs, self.kept = (), {}, [], [], ()

    def widened(self) -> Call:
        """The same with output gradients of 32 bits at least on a CPU, for which products are compiled."""
        grad = self.grads[0]
        narrow = grad.device.type == "cpu" and grad.itemsize < 4
        return replace(self, grads={0: grad.float()}) if narrow else self


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, by whichever way it came."""
    return args[0] if args else next(iter(kwargs.values()))


def check_unchanged(layer: Layer, call: Call) -> None:
    """Raise UncapturableError when the model has changed in place what the layer's gradient is formed from."""
    if any(tensor._version != version for tensor, version in call.versions):
        raise UncapturableError(
            f"an input of layer {layer.name!r} was changed in place after the layer had used it, so its "
            "gradient cannot be formed; use the out-of-place operation in the model's forward.",
            layer.parameters.values(),
        )


def check_rows(layer: Layer, call: Call, n: int) -> None:
    """Raise UncapturableError unless the layer ran on as many rows for each of n samples."""
    rows = call.grads[min(call.grads)].shape[0]
    if rows < n or rows % n:
        raise UncapturableError(
            f"layer {layer.name!r} ran on {rows} rows for {n} losses, so its gradient cannot be told apart by sample; "
            "give the model one row (or a fixed number of rows) per sample, or leave the layer out with parameters=.",
            layer.parameters.values(),
        )


def layers_of(model: nn.Module, names: list[str]) -> list[Layer]:
    """The layers that use these parameters, in the model's order; a module taken whole is one.

    That are those of `recompute_whole`, and those that compute with parameters in containers without a forward.

    Raises:
        UncapturableError: a parameter is complex, or a batch norm anywhere in the model normalises over the batch.
    """
    canonical = {id(model.get_parameter(name)): name for name in names}
    if complex_ones := [name for name in names if model.get_parameter(name).is_complex()]:
        raise UncapturableError(
            f"parameter {complex_ones[0]!r} is complex, and sketches are of real gradients; leave it out with "
            "parameters=, or hold its real and imaginary parts in a real parameter, see torch.view_as_complex.",
            complex_ones,
        )
    layers = []
    whole: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            why = "in training mode" if module.training else "without running statistics"
            raise UncapturableError(
                f"layer {name!r} is a batch norm {why}, which mixes samples, whether its own parameters are selected "
                "or not; call eval(), or take it from a checkpoint with running statistics.",
                names,
            )
        if any(name.startswith(container) for container in whole):
            continue
        taken_whole = is_whole(module) or _contains(module, canonical)
        if taken_whole:
            whole.append(f"{name}." if name else "")
        own = {
            key: canonical[id(value)]
            for key, value in module.named_parameters(recurse=taken_whole)
            if id(value) in canonical
        }
        if own:
            numel = sum(module.get_parameter(key).numel() for key in own)
            layers.append(Layer(name, module, own, None if taken_whole else rule_for(module), numel))
    return layers


def _contains(module: nn.Module, selected: Container[int]) -> bool:
    """Whether a module holds selected parameters in what has no forward, as LoKr's stand in a ParameterDict.

    It is the module itself then that computes with them.
    """
    for child in module.children():
        if type(child).forward is nn.Module.forward and (
            any(id(value) in selected for value in child.parameters(recurse=False)) or _contains(child, selected)
        ):
            return True
    return False


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
