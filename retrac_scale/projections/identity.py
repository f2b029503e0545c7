"""Identity: the full gradient itself, for small models and exact references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from retrac_scale.gradients.norms import rows_of, squared_norm
from retrac_scale.projections.base import Projection, Projector, Shapes


class _Concatenation(Projector):
    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.device = device
        self._places: dict[str, slice] = {}
        self.dim = 0
        for name, shape in shapes.items():
            self._places[name] = slice(self.dim, self.dim + prod(shape))
            self.dim += prod(shape)

    def start(self, n: int) -> Tensor:
        return torch.zeros(n, self.dim, device=self.device)

    def add(self, accumulator: Tensor, name: str, gradient: Tensor) -> Tensor:
        accumulator[:, self._places[name]] = rows_of(gradient)
        return squared_norm(accumulator[:, self._places[name]])

    def finish(self, accumulator: Tensor) -> Tensor:
        return accumulator


@dataclass(frozen=True)
class Identity(Projection):
    """No projection: k is the number of selected parameters, in the order of `model.named_parameters()`."""

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        return _Concatenation(shapes, device)
