"""LowRank: a layer's output gradients mixed into a few random channels, its input side as it is, then a signed fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retrac_scale.gradients.factored import FactoredGradients
from retrac_scale.gradients.mixing import SETS, mix
from retrac_scale.gradients.norms import squared_norm
from retrac_scale.gradients.tiles import ROWS_BY_SETS
from retrac_scale.projections import random
from retrac_scale.projections.base import Projection, Projector, Shapes, check_dim, inputs_last
from retrac_scale.projections.countsketch import SignedFold

LEAST_RANK = ROWS_BY_SETS
"""Processors form so many rows at once: fewer would save no time."""


@dataclass(frozen=True)
class LowRank(Projection):
    """One-sided random projection of every layer, folded to `dim` buckets.

    Output gradients are multiplied with a random matrix of entries +-1/sqrt(r), sixteen sets of r rows: each input
    feature at each kernel position is met by one set R `[r, o]`, for which E[R^T R] is the identity. So inner products
    stay unbiased, per-sample gradients shrink by o / r, and errors average out over the inputs, whose gradients are
    alike where they matter, as if there were up to 16 r rows. All rows are of one Hadamard matrix with random column
    signs, and so orthogonal for o a power of two.

    r is the rank, and twice that for linear layers and convolutions with a kernel of one position: they cost less,
    and have fewer inputs to average over. Layers where mixing would save less than a third of the multiplications stay
    unmixed, and layers with fewer outputs than an eighth of their inputs: the last one of a transformer, narrow and
    cheap, has most of the gradient. So do biases, and linear layers that see a sample at one position (timestep
    embeddings, adaptive norms): their gradient has rank 1 and costs little.

    Args:
        rank: channels that each input's gradients are mixed into, a power of two and LEAST_RANK (4) at least. None
            for dim / 512 or the next one below, with which mixing adds a few per cent to the variance of the fold.
        dim: k.
        seed: of all signs and shifts.
        norm: "estimate", the sketch's own, whose square is unbiased and whose error is a few per cent at dim 2048; or
            "exact", the full gradient's, at the cost of forming it (about that of `CountSketch`).
    """

    rank: int | None = None
    dim: int = 2048
    seed: int = 0
    norm: Literal["estimate", "exact"] = "estimate"
    revision: ClassVar[int] = 5

    def __post_init__(self) -> None:
        check_dim(self.dim)
        rank = self.rank
        if rank is not None and (not isinstance(rank, int) or rank < LEAST_RANK or rank.bit_count() != 1):
            raise ValueError(
                f"LowRank needs an integer rank, a power of two and {LEAST_RANK} at least, or None to choose it; "
                f"got {rank!r}."
            )
        if self.norm not in ("estimate", "exact"):
            raise ValueError(f"norm must be 'estimate' or 'exact', got {self.norm!r}.")

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`."""
        mixers = {}
        for name, outputs in mixable.items():
            rank = self._rank_of(shapes[name])
            if _worth_mixing(shapes[name], rank):
                entries = random.orthogonal_signs(self.seed, f"{name} mixer", rank, outputs, SETS)
                mixers[name] = torch.from_numpy(entries).to(device)
        kind = _MixedAfterwards if self.norm == "exact" else _Mixed
        return kind(self.dim, self.seed, device, mixers)

    def _rank_of(self, shape: tuple[int, ...]) -> int:
        """For a weight `[o, i, *kernel]`."""
        rank = self.rank or 1 << max(LEAST_RANK, self.dim // 512).bit_length() - 1
        return rank if prod(shape[2:]) > 1 else 2 * rank


def _worth_mixing(shape: tuple[int, ...], rank: int) -> bool:
    outputs, entries = shape[0], prod(shape[1:])
    mixed = rank * (outputs + 10 * SETS + entries)  # by rows, then by sets, then products with the inputs
    return 8 * outputs >= shape[1] and 3 * mixed < 2 * outputs * entries


class _Mixed(SignedFold):
    """Takes mixed gradients of some weights; its mixers are of signs, by which bfloat16 multiplies exactly."""

    exact_norm = False

    def __init__(self, dim: int, seed: int, device: torch.device, mixers: Mapping[str, Tensor]) -> None:
        super().__init__(dim, seed, device)
        self.mixers = mixers

    def add_mixed(self, accumulator: Tensor, name: str, gradient: Tensor | FactoredGradients) -> Tensor | None:
        """Fold, with what makes signs entries of +-1/sqrt(r)."""
        return self._fold(accumulator, name, gradient, len(self.mixers[name]) ** -0.5)


class _MixedAfterwards(_Mixed):
    """Takes full gradients, for their norms, and mixes them itself."""

    exact_norm = True
    factored = False

    def add_mixed(self, accumulator: Tensor, name: str, gradient: Any) -> Tensor | None:
        """Mix, then fold."""
        super().add_mixed(accumulator, name, mix(self.mixers[name], gradient))
        return squared_norm(inputs_last(gradient).flatten(1))
