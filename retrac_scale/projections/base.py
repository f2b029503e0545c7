"""What a projection is: a description, and the projector it makes for one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrac_scale.runtime import kinds

Shapes = Mapping[str, tuple[int, ...]]

GIVEN = "given"
"""The kind that a store names whose sketches were made elsewhere."""


class Projector(ABC):
    """A projection bound to a model's parameters; linear, so contributions of parameters add up."""

    dim: int
    mixers: Mapping[str, Tensor] = MappingProxyType({})
    """Weights whose layers' output gradients are mixed, where they see a sample at several positions -> mixer `[r, o]`,
    see `gradients.mixing`."""
    exact_norm: bool = True
    """Whether squared norms of the full gradients are given: these have to be formed then, and are mixed afterwards."""
    factored: bool = False
    """Whether `FactoredGradients` are taken too, with the bias beside."""

    @abstractmethod
    def start(self, n: int) -> Tensor:
        """A zero accumulator for n samples."""

    @abstractmethod
    def add(self, accumulator: Tensor, name: str, gradient: Any) -> Tensor | None:
        """Add one parameter's gradients `[n, *shape]`; returns their squared norms `[n]`, float64, if `exact_norm`."""

    def add_mixed(self, accumulator: Tensor, name: str, gradient: Any) -> Tensor | None:
        """The same for a weight in `mixers`: its gradients `[n, r, i, *kernel]`, mixed; if `exact_norm`, full ones."""
        return self.add(accumulator, name, gradient)

    @abstractmethod
    def finish(self, accumulator: Tensor) -> Tensor:
        """The sketches `[n, k]`."""

    @property
    def mixers_in_forming(self) -> Mapping[str, Tensor]:
        """Those that gradients are mixed with when they are formed, and never in full."""
        return {} if self.exact_norm else self.mixers


def bias_beside(weight: str) -> str:
    """The bias of the layer that a weight belongs to."""
    return weight.removesuffix("weight") + "bias"


def inputs_last(gradient: Tensor) -> Tensor:
    """`[n, o, i, *kernel]` -> `[n, o, *kernel, i]`, the order in which gradients are folded; others as they are."""
    return gradient.movedim(2, -1) if gradient.ndim > 3 else gradient


class Projection(ABC):
    """Describes a projection; a frozen dataclass, known by its name in the fingerprints of stores."""

    kinds: ClassVar[dict[str, type[Projection]]] = {}
    revision: ClassVar[int] = 1
    """Raised when the same arguments come to stand for other numbers, which never meet those of before."""

    def __init_subclass__(cls) -> None:
        kinds.enter(Projection.kinds, cls, "a projection")

    @abstractmethod
    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """The projector for a model's parameters.

        Args:
            shapes: parameter name -> shape, in the model's order.
            mixable: weights of layers whose output gradients may be mixed -> number of output features.
            device: where the gradients are.
        """

    def spec(self) -> dict[str, Any]:
        """JSON description; `from_spec` reverses it."""
        revision = {"revision": self.revision} if self.revision > 1 else {}
        return {**kinds.described(self), **revision}


def from_spec(spec: Mapping[str, Any]) -> Projection:
    """The projection that a store's fingerprint describes.

    Raises:
        ValueError: its class is not known in this process, or makes other numbers by now.
    """
    arguments = {key: value for key, value in spec.items() if key not in ("kind", "revision")}
    if spec.get("kind") == GIVEN:
        raise ValueError(
            "the store's sketches were given to write_store, by a projection that cannot be rebuilt here; sketch the "
            "queries where the store was made and pass them as a store."
        )
    kind = kinds.find(Projection.kinds, spec.get("kind"), "a projection")
    if (revision := spec.get("revision", 1)) != kind.revision:
        raise ValueError(
            f"the store's sketches are of revision {revision} of {kind.__name__}, this release makes revision "
            f"{kind.revision}, whose numbers are others; sketch the store again, or the queries with the release that "
            "made it."
        )
    return kind(**arguments)


def check_dim(dim: int) -> None:
    """Raise ValueError unless dim is a positive integer."""
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"a projection needs an integer dim of 1 or more, got {dim!r}.")
