"""Our projections as projectors for TRAK."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from trak.projectors import AbstractProjector

from retrac_scale.projections.base import Projection, Projector, Shapes


class TrakProjector(AbstractProjector):  # type: ignore[misc]
    """A projection of full gradients for `trak.TRAKer(projector=...)`.

        shapes = {name: value.shape for name, value in model.named_parameters()}
        traker = TRAKer(model, task, n, projector=TrakProjector(rs.CountSketch(4096), shapes), device="cpu", ...)

    Inner products of its features are unbiased, without the factor k of TRAK's own projectors. As with those, each
    model id has a matrix of its own: the projection's with `seed + model_id`.

    Args:
        projection: CountSketch or Dense.
        shapes: parameter name -> shape, in the order of `model.named_parameters()`.
        device: where TRAK computes the gradients.
    """

    def __init__(self, projection: Projection, shapes: Shapes, device: str | torch.device = "cpu") -> None:
        self._projection = projection
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._bind(0, torch.device(device))
        super().__init__(
            grad_dim=sum(prod(shape) for shape in self._shapes.values()),
            proj_dim=self._projector.dim,
            seed=getattr(projection, "seed", 0),
            proj_type=type(projection).__name__,
            device=torch.device(device),
        )

    def _bind(self, model_id: int, device: torch.device) -> None:
        projection: Any = self._projection
        if model_id:
            projection = dataclasses.replace(projection, seed=projection.seed + model_id)
        self._projector: Projector = projection.bind(self._shapes, {}, device)
        self._model_id = model_id

    def project(self, grads: Mapping[str, Tensor] | Tensor, model_id: int) -> Tensor:
        """Features `[n, k]` of gradients `[n, P]`, or of one tensor `[n, *shape]` per parameter.

        Raises:
            ValueError: the gradients are not those of the parameters whose shapes were given.
        """
        if model_id != self._model_id:
            self._bind(model_id, self.device)
        parts = grads if isinstance(grads, Mapping) else self._split(grads)
        if parts.keys() != self._shapes.keys():
            differing = sorted(parts.keys() ^ self._shapes.keys())
            raise ValueError(f"TRAK's gradients and the projector's shapes differ in {differing[0]!r}; give the same.")
        accumulator = self._projector.start(len(next(iter(parts.values()))))
        for name, shape in self._shapes.items():
            self._projector.add(accumulator, name, parts[name].detach().reshape(-1, *shape))
        return self._projector.finish(accumulator)

    def _split(self, grads: Tensor) -> dict[str, Tensor]:
        if grads.shape[1] != self.grad_dim:
            raise ValueError(f"TRAK's gradients have {grads.shape[1]} entries, the projector's shapes {self.grad_dim}.")
        sizes = [prod(shape) for shape in self._shapes.values()]
        return dict(zip(self._shapes, torch.split(grads, sizes, dim=1), strict=True))
