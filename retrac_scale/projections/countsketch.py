"""CountSketch by signed fold: the full gradient, cut into blocks of k, signed, rotated and added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from retrac_scale.projections import random
from retrac_scale.projections.base import Projection, Projector, Shapes, check_dim, squared_norm, weight_beside


class SignedFold(Projector):
    """Entry j of a block of k goes to bucket (j + shift of the block) mod k with a random sign.

    Two entries meet with probability at most 1/k, so E<Sx,Sy> = <x,y> and Var<Sx,Sy> <= (|x|^2 |y|^2 + <x,y>^2) / k,
    as for the plain sketch of Charikar, Chen, Farach-Colton 2002.
    """

    def __init__(
        self, dim: int, seed: int, device: torch.device, scales: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        self.dim = dim
        self.seed = seed
        self.device = device
        self.scales = scales
        self._rounds: dict[tuple[str, int], list[tuple[int, int, Tensor]]] = {}

    def _blocks(self, name: str, size: int) -> list[tuple[int, int, Tensor]]:
        """Shift, length and signs of every block of a parameter's entries."""
        if (name, size) not in self._rounds:
            scale = 1 if weight_beside(name) in self.whole else self.scales.get(name, 1)
            signs = torch.split(
                (torch.from_numpy(random.signs(self.seed, name, size)) * scale).to(self.device), self.dim
            )
            shifts = random.shifts(self.seed, name, len(signs), self.dim)
            self._rounds[name, size] = [(shift, len(part), part) for shift, part in zip(shifts, signs, strict=True)]
        return self._rounds[name, size]

    def start(self, n: int) -> Tensor:
        """Two rounds wide, so that a rotated block is one contiguous addition."""
        return torch.zeros(n, 2 * self.dim, device=self.device)

    def add(self, accumulator: Tensor, name: str, gradient: Tensor) -> Tensor | None:
        """Sign, rotate and add the blocks of one parameter."""
        entries = gradient.flatten(1)
        blocks = zip(self._blocks(name, entries.shape[1]), torch.split(entries, self.dim, 1), strict=True)
        if entries.dtype == accumulator.dtype:
            for (shift, length, signs), piece in blocks:
                accumulator.narrow(1, shift, length).addcmul_(piece, signs)
            return squared_norm(entries) if self.exact_norm else None
        squares = accumulator.new_zeros(len(entries)) if self.exact_norm else None
        for (shift, length, signs), piece in blocks:
            wide = piece.to(accumulator.dtype)  # piece by piece: a wide copy of the whole would leave the cache
            accumulator.narrow(1, shift, length).addcmul_(wide, signs)
            if squares is not None:
                squares += squared_norm(wide)
        return squares

    def finish(self, accumulator: Tensor) -> Tensor:
        """Close the round."""
        return accumulator[:, : self.dim] + accumulator[:, self.dim :]


@dataclass(frozen=True)
class CountSketch(Projection):
    """Signed fold of the full gradient to `dim` buckets; comes with the exact gradient norm."""

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim(self.dim)

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        return SignedFold(self.dim, self.seed, device)
