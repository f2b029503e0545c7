"""LowRank: a layer's output gradients mixed into a few random channels, its input side whole, then a signed fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retrac_scale.projections import random
from retrac_scale.projections.base import (
    Projection,
    Projector,
    Shapes,
    check_dim,
    mix,
    squared_norm,
    weight_beside,
)
from retrac_scale.projections.countsketch import SignedFold


@dataclass(frozen=True)
class LowRank(Projection):
    """One-sided random projection of every layer, folded to `dim` buckets.

    Output gradients are multiplied with a random matrix R `[r, o]` of entries +-1/sqrt(r), for which E[R^T R] is the
    identity, so inner products stay unbiased. Its rows are some of a Hadamard matrix with random column signs: as they
    are orthogonal, the variance that mixing adds is (o - r) / (o - 1) times that of independent signs, for o a power of
    two. Per-sample gradients shrink by o / r. Layers with fewer than 2 r outputs, where little would be saved, stay
    whole; so do linear layers that see a sample at one position (timestep embeddings, adaptive norms): their gradient
    has rank 1 and costs little, and mixing hurts it most.

    The variance that mixing adds to a layer's inner products falls with r, and with the number of directions among its
    outputs, which grows with o; that of the fold falls with `dim`. So the rank of a layer is chosen in proportion to
    dim / o: 16 for 32 outputs, 8 for 64 and 4 from 128 on at dim 2048, where layers below 32 stay whole.

    Args:
        rank: channels r that each layer's outputs are mixed into; None chooses them by layer.
        dim: k.
        seed: of all signs and shifts.
        norm: "estimate", the sketch's own, whose square is unbiased and whose error is a few per cent at dim 2048; or
            "exact", the full gradient's, at the cost of forming it (about that of `CountSketch`).
    """

    rank: int | None = None
    dim: int = 2048
    seed: int = 0
    norm: Literal["estimate", "exact"] = "estimate"
    revision: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_dim(self.dim)
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"LowRank needs an integer rank of 1 or more, or None to choose it, got {self.rank!r}.")
        if self.norm not in ("estimate", "exact"):
            raise ValueError(f"norm must be 'estimate' or 'exact', got {self.norm!r}.")

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        mixers, scales = {}, {}
        for name in shapes:
            out_features = mixable.get(name, 0)
            weight = weight_beside(name)
            rank = self.rank or _rank_for(self.dim, out_features)
            if out_features >= 2 * rank and weight in mixable:
                scales[name] = rank**-0.5  # with the signs, so that mixing multiplies by +-1, exact in bfloat16
                if name == weight:
                    entries = random.orthogonal_signs(self.seed, f"{name} mixer", rank, out_features)
                    mixers[name] = torch.from_numpy(entries).to(device)
        if self.norm == "exact":
            whole = _ExactNorm(self.dim, self.seed, device, scales)
            whole.own_mixers = mixers
            return whole
        projector = SignedFold(self.dim, self.seed, device, scales)
        projector.mixers = mixers
        projector.exact_norm = False
        return projector


def _rank_for(dim: int, out_features: int) -> int:
    """dim / (4 o), as a multiple of 4."""
    return 4 * max(1, -(-dim // (16 * max(1, out_features))))


class _ExactNorm(SignedFold):
    """Takes whole gradients, for their norms, and mixes them itself."""

    own_mixers: Mapping[str, Tensor]
    unformed = False

    def add(self, accumulator: Tensor, name: str, gradient: Any) -> Tensor | None:
        """Mix, then fold."""
        weight = weight_beside(name)
        mixer = None if weight in self.whole else self.own_mixers.get(weight)
        super().add(accumulator, name, gradient if mixer is None else mix(mixer, gradient))
        return squared_norm(gradient.flatten(1))
