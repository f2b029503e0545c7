"""LowRank: a layer's output gradients mixed into a few random channels, its input side whole, then a signed fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from retrac_scale.projections import random
from retrac_scale.projections.base import Projection, Projector, Shapes, check_dim
from retrac_scale.projections.countsketch import SignedFold


@dataclass(frozen=True)
class LowRank(Projection):
    """One-sided random projection of every layer, folded to `dim` buckets.

    Output gradients are multiplied with a random matrix R `[rank, o]` of entries +-1/sqrt(rank), for which E[R^T R] is
    the identity, so inner products stay unbiased. Per-sample gradients shrink by o / rank; layers with fewer than
    4 rank outputs, where little would be saved, stay whole. The norm that comes with the sketch is the sketch's own, an
    estimate whose square is unbiased.
    """

    rank: int = 8
    dim: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim(self.dim)
        if self.rank < 1:
            raise ValueError(f"LowRank needs a rank of 1 or more, got {self.rank}.")

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        mixers, sizes, scales = {}, {}, {}
        for name, shape in shapes.items():
            out_features = mixable.get(name, 0)
            sizes[name] = prod(shape)
            weight = name.removesuffix("bias") + "weight" if name.endswith("bias") else name
            if out_features >= 4 * self.rank and weight in mixable:
                sizes[name] = sizes[name] // out_features * self.rank
                scales[name] = self.rank**-0.5  # with the signs, so that mixing multiplies by +-1, exact in bfloat16
                if name == weight:
                    entries = random.signs(self.seed, f"{name} mixer", self.rank * out_features)
                    mixers[name] = torch.from_numpy(entries).reshape(self.rank, out_features).to(device)
        projector = SignedFold(self.dim, self.seed, sizes, device, scales)
        projector.mixers = mixers
        projector.exact_norm = False
        return projector
