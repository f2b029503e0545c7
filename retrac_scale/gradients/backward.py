"""One backward pass: the gradients of each layer are formed and handed on as soon as all that they need is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from retrac_scale.gradients.errors import UncapturableError
from retrac_scale.gradients.forming import bias_goes_along, form, form_sum
from retrac_scale.gradients.layers import Call, Layer, check_rows, check_unchanged
from retrac_scale.gradients.mixing import SETS
from retrac_scale.gradients.registry import Gradients

Sink = Callable[[str, Any, slice], None]
"""sink(name, gradient, samples): a parameter's gradient `[m, ...]` of some samples; see `GradientCapture.backward`."""

CHUNK_BYTES, CHUNK_BYTES_OF_ACCELERATORS = 2 << 20, 256 << 20
"""A layer's gradients are formed and consumed for as many samples at a time as keep to this: on a CPU to a core's
cache, elsewhere to what makes the launches of kernels few."""


@dataclass
class Traits:
    """What the parameters of a model are like, as far as its layers and the backward passes so far have shown."""

    shared: Set[str]
    """Parameters of several layers."""
    single_position: set[str] = field(default_factory=set)
    """Weights of the linear layers that saw every row of the last batch as one vector."""
    half: set[str] = field(default_factory=set)
    """Parameters that are of 16 bits themselves, or whose layers' output gradients were."""

    def mixed(self, mixers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mixers that the weights' gradients were mixed with in the last batch, of those that were given."""
        return {name: mixer for name, mixer in mixers.items() if name not in self.single_position}


@dataclass(frozen=True)
class Backward:
    """Forms gradients, adds up those of parameters with several users, delivers each once.

    Attributes:
        n: samples of the batch.
        sink: see `GradientCapture.backward`, as are those that follow.
        mixers: what weights' gradients are mixed with.
        traits: of the model's parameters; told more here.
        factored: whether the sink takes `FactoredGradients`.
        retain_graph: whether another pass will need what layers have seen.
    """

    n: int
    sink: Sink
    mixers: Mapping[str, Tensor]
    traits: Traits
    factored: bool = False
    retain_graph: bool = False
    trained: set[str] = field(default_factory=set, init=False)
    """Parameters of layers that ran with weights that require a gradient."""
    _waiting: dict[str, Tensor] = field(default_factory=dict, init=False)

    def finish(self, layer: Layer) -> None:
        """Form the gradients of a layer from all its calls and deliver them, some samples at a time."""
        calls = [call for call in layer.calls if call.grads] if layer.noted else []
        if not calls:
            return
        for call in calls:
            check_unchanged(layer, call)
            check_rows(layer, call, self.n)
        self._note_precision(layer, calls)
        mixer = self._mixer(layer, calls)
        given = [call.widened() for call in calls] if mixer is not None or layer.narrow else calls
        if self._leaves_factored(layer, given):
            samples = slice(0, self.n)
            self._deliver(layer, form(layer, given[0], self.n, samples, mixer), samples)
        else:
            size = _samples_at_a_time(layer, given[0], mixer)
            for start in range(0, self.n, size):
                samples = slice(start, min(start + size, self.n))
                self._deliver(layer, form_sum(layer, given, self.n, samples, mixer), samples)
        for call in calls:
            call.grads.clear()
            if not self.retain_graph:
                layer.noted.pop(id(call), None)
                call.let_go()

    def flush(self) -> None:
        """Deliver the parameters that several layers share."""
        for name, gradient in self._waiting.items():
            self.sink(name, gradient, slice(0, self.n))

    def _note_precision(self, layer: Layer, calls: list[Call]) -> None:
        """Which parameters' gradients are rounded to 16 bits somewhere."""
        coarse = any(grad.itemsize < 4 for call in calls for grad in call.grads.values())
        coarse |= any(call.precision is not None and call.precision[2] for call in calls)
        if coarse:
            self.traits.half.update(layer.parameters.values())

    def _mixer(self, layer: Layer, calls: list[Call]) -> Tensor | None:
        """What the gradients of the layer's weight are mixed with; also notes whether it is of a single position."""
        weight = layer.parameters.get("weight", "")
        if layer.mixable and isinstance(layer.module, nn.Linear) and all(call.grads[0].ndim == 2 for call in calls):
            self.traits.single_position.add(weight)
            return None
        self.traits.single_position.discard(weight)
        return self.mixers.get(weight)

    def _leaves_factored(self, layer: Layer, calls: list[Call]) -> bool:
        """Whether the sink gets the products that the rule gives, which take no memory, for all samples at once."""
        own = layer.parameters
        alone = len(calls) == 1 and self.traits.shared.isdisjoint(own.values())
        return self.factored and alone and "weight" in own and layer.gives_factored(calls[0].grads[0])

    def _deliver(self, layer: Layer, gradients: Gradients, samples: slice) -> None:
        for own, name in layer.parameters.items():
            if own in gradients:
                self._deliver_one(name, gradients[own], samples)
            elif not (own == "bias" and bias_goes_along(gradients)):
                raise UncapturableError(
                    f"the rule for {type(layer.module).__name__} gives no gradient for {name!r}; return one for "
                    "every parameter of the layer.",
                    [name],
                )

    def _deliver_one(self, name: str, gradient: Any, samples: slice) -> None:
        if name in self.traits.shared:
            if name not in self._waiting:
                self._waiting[name] = gradient.new_zeros(self.n, *gradient.shape[1:])
            self._waiting[name][samples] += gradient
        else:
            self.sink(name, gradient, samples)


def _samples_at_a_time(layer: Layer, call: Call, mixer: Tensor | None) -> int:
    numel = layer.numel
    if mixer is not None:
        r, o = mixer.shape
        numel = numel * min(SETS * r, o) // o
    on_cpu = next(iter(call.grads.values())).device.type == "cpu"
    return max(1, (CHUNK_BYTES if on_cpu else CHUNK_BYTES_OF_ACCELERATORS) // (4 * max(1, numel)))
