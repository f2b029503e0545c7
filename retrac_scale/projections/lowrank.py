"""LowRank: a layer's output gradients mixed into a few random channels, its input side whole, then a signed fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retrac_scale.gradients.mixing import SETS, mix
from retrac_scale.projections import random
from retrac_scale.projections.base import (
    Projection,
    Projector,
    Shapes,
    bias_beside,
    check_dim,
    squared_norm,
    weight_beside,
)
from retrac_scale.projections.countsketch import SignedFold


@dataclass(frozen=True)
class LowRank(Projection):
    """One-sided random projection of every layer, folded to `dim` buckets.

    Output gradients are multiplied with a random matrix of entries +-1/sqrt(r), eight sets of r rows: each input
    feature at each kernel position is met by one set R `[r, o]`, for which E[R^T R] is the identity. So inner products
    stay unbiased, per-sample gradients shrink by o / r, and errors average out over the inputs, whose gradients are
    alike where they matter, as if there were up to 8 r rows. All rows are of one Hadamard matrix with random column
    signs, and so orthogonal for o a power of two.

    Layers where that would save less than half of the multiplications stay whole, and layers with fewer outputs than
    an eighth of their inputs: the last one of a transformer, narrow and cheap, has most of the gradient. So do linear
    layers that see a sample at one position (timestep embeddings, adaptive norms): their gradient has rank 1 and costs
    little.

    Args:
        rank: channels r that each input's gradients are mixed into; None for dim / 512, 4 at least, with which mixing
            adds little to the variance of the fold.
        dim: k.
        seed: of all signs and shifts.
        norm: "estimate", the sketch's own, whose square is unbiased and whose error is a few per cent at dim 2048; or
            "exact", the full gradient's, at the cost of forming it (about that of `CountSketch`).
    """

    rank: int | None = None
    dim: int = 2048
    seed: int = 0
    norm: Literal["estimate", "exact"] = "estimate"
    revision: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_dim(self.dim)
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"LowRank needs an integer rank of 1 or more, or None to choose it, got {self.rank!r}.")
        if self.norm not in ("estimate", "exact"):
            raise ValueError(f"norm must be 'estimate' or 'exact', got {self.norm!r}.")

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        rank = self.rank or 4 * max(1, self.dim // 2048)
        mixers, scales = {}, {}
        for name in mixable:
            if _worth_mixing(shapes[name], rank):
                outputs = shapes[name][0]
                entries = random.orthogonal_signs(self.seed, f"{name} mixer", SETS * rank, outputs)
                mixers[name] = torch.from_numpy(entries.reshape(rank, SETS, outputs)).to(device)
                # with the signs, so that mixing multiplies by +-1, exact in bfloat16
                scales[name], scales[bias_beside(name)] = rank**-0.5, (SETS * rank) ** -0.5
        if self.norm == "exact":
            whole = _ExactNorm(self.dim, self.seed, device, scales)
            whole.own_mixers = mixers
            return whole
        projector = SignedFold(self.dim, self.seed, device, scales)
        projector.mixers = mixers
        projector.exact_norm = False
        return projector


def _worth_mixing(shape: tuple[int, ...], rank: int) -> bool:
    if len(shape) < 2 or 8 * shape[0] < shape[1]:
        return False
    outputs, entries = shape[0], prod(shape[1:])
    return outputs * entries > 2 * (SETS * rank * outputs + rank * entries)


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
