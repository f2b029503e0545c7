"""CountSketch by signed fold: the full gradient, cut into blocks of k, signed, rotated and added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from retrac_scale.gradients.factored import FactoredGradients
from retrac_scale.gradients.norms import rows_of, squared_norm
from retrac_scale.projections import random
from retrac_scale.projections.base import Projection, Projector, Shapes, bias_beside, check_dim, inputs_last
from retrac_scale.projections.folding import fold, fold_by_block


class SignedFold(Projector):
    """Entry j of a block of k goes to bucket (j + shift of the block) mod k with a random sign.

    Two entries meet with probability at most 1/k, so E<Sx,Sy> = <x,y> and Var<Sx,Sy> <= (|x|^2 |y|^2 + <x,y>^2) / k,
    as for the plain sketch of Charikar, Chen, Farach-Colton 2002. The input features of a convolution come last.
    """

    factored = True

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        self.dim = dim
        self.seed = seed
        self.device = device
        self._blocks: dict[tuple[str, int], Any] = {}  # drawn when they are first needed

    def _signs(self, name: str, size: int) -> Any:
        """Of a parameter's entries `[size]`, and shifts of their blocks; on a CPU as `Signs`, elsewhere in a tensor."""
        if (name, size) not in self._blocks:
            signs = random.signs(self.seed, name, size)
            shifts = np.array(random.shifts(self.seed, name, -(-size // self.dim), self.dim), np.int64)
            on_cpu = self.device.type == "cpu"
            self._blocks[name, size] = (
                signs.astype(np.int8) if on_cpu else torch.from_numpy(signs).to(self.device),
                shifts,
            )
        return self._blocks[name, size]

    def start(self, n: int) -> Tensor:
        """Two rounds wide, so that a rotated block is one contiguous addition."""
        return torch.zeros(n, 2 * self.dim, device=self.device)

    def add(self, accumulator: Tensor, name: str, gradient: Tensor | FactoredGradients) -> Tensor | None:
        """Sign, rotate and add the blocks of one parameter."""
        return self._fold(accumulator, name, gradient, 1)

    def _fold(
        self, accumulator: Tensor, name: str, gradient: Tensor | FactoredGradients, scale: float
    ) -> Tensor | None:
        size = prod(gradient.shape[1:])
        if isinstance(gradient, FactoredGradients):
            of_bias = self._signs(bias_beside(name), gradient.left.shape[2]) if gradient.with_bias else None
            squares = fold(accumulator, gradient, self._signs(name, size), scale, of_bias)
            return squares if self.exact_norm else None
        entries = rows_of(inputs_last(gradient))
        if accumulator.device.type == "cpu":
            squares = fold(accumulator, entries, self._signs(name, size), scale)
            return squares if self.exact_norm else None
        signs, shifts = self._signs(name, size)
        fold_by_block(accumulator, entries, signs, shifts, scale)
        return squared_norm(entries) if self.exact_norm else None

    def finish(self, accumulator: Tensor) -> Tensor:
        """Close the round."""
        return accumulator[:, : self.dim] + accumulator[:, self.dim :]


@dataclass(frozen=True)
class CountSketch(Projection):
    """Signed fold of the full gradient to `dim` buckets; comes with the exact gradient norm."""

    dim: int
    seed: int = 0
    revision: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_dim(self.dim)

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        return SignedFold(self.dim, self.seed, device)
