"""The sketches of one batch, while its gradients come in."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from retrac_scale.gradients.mixing import mix
from retrac_scale.projections.base import Projector


class Accumulation:
    """Sketches and squared norms of n samples, parameter by parameter.

    Args:
        projector: of the model's parameters.
        n: samples.
        unmixed: weights among the projector's `mixers` whose gradients are never mixed, because their layers see a
            sample at one position; looked up when a gradient comes.
    """

    def __init__(self, projector: Projector, n: int, unmixed: Set[str]) -> None:
        self._projector = projector
        self._unmixed = unmixed
        self._sums = projector.start(n)
        self._squares = torch.zeros(n, dtype=torch.float64, device=self._sums.device)

    def add(self, name: str, gradient: Any, samples: slice) -> None:
        """A sink of gradients formed with the projector's `mixers_in_forming`."""
        add = self._projector.add_mixed if self._mixes(name) else self._projector.add
        squares = add(self._sums[samples], name, gradient)
        if squares is not None:
            self._squares[samples] += squares

    def finished(self) -> tuple[Tensor, Tensor]:
        """Sketches `[n, k]` and norms `[n]`: the full gradient's, or the sketch's own."""
        sketch = self._projector.finish(self._sums)
        exact = self._squares.sqrt().to(sketch.dtype)
        return sketch, exact if self._projector.exact_norm else torch.linalg.vector_norm(sketch, dim=1)

    def _mixes(self, name: str) -> bool:
        return name in self._projector.mixers and name not in self._unmixed


def sketch_of(projector: Projector, gradients: Mapping[str, Tensor], unmixed: Set[str]) -> Tensor:
    """The sketch `[k]` of one full gradient, parameter name -> `[*shape]`; `unmixed` as in `Accumulation`."""
    mixers = projector.mixers_in_forming.keys() - unmixed
    sums = Accumulation(projector, 1, unmixed)
    for name, gradient in gradients.items():
        full = gradient[None]
        sums.add(name, mix(projector.mixers[name], full) if name in mixers else full, slice(0, 1))
    return sums.finished()[0][0]
