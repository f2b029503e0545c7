"""Dense: a Gaussian matrix, multiplied by TRAK's projectors.

TRAK's projectors (Park, Georgiev, Ilyas, Leclerc, Madry 2023, arXiv 2303.14186; package `traker`) leave out the factor
1/sqrt(k), and their matrix depends on more than their seed: on the block size (BasicProjector), or on the number of
multiprocessors of the GPU (CudaProjector, whose kernels are in `fast_jl`). Here the factor is applied, the block size
is fixed, and the number of multiprocessors is part of the description.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor
from trak.projectors import BasicProjector, CudaProjector, ProjectionType

from retrac_scale.projections.base import Projection, Projector, Shapes, check_dim
from retrac_scale.projections.identity import Identity

COLUMNS = 128
"""Columns of the matrix that BasicProjector draws at a time; another number would draw another matrix."""

CUDA_ROWS = 32
CUDA_ENTRIES = 2**31 - 1
CUDA_DIM = 512


class _Dense(Projector):
    """Collects the full gradients of a batch, then multiplies: BasicProjector draws its matrix anew at every call."""

    def __init__(self, gradients: Projector, projector: BasicProjector | CudaProjector) -> None:
        self.dim: int = projector.proj_dim
        self._gradients = gradients
        self._projector = projector

    def start(self, n: int) -> Tensor:
        return self._gradients.start(n)

    def add(self, accumulator: Tensor, name: str, gradient: Tensor) -> Tensor | None:
        return self._gradients.add(accumulator, name, gradient)

    def finish(self, accumulator: Tensor) -> Tensor:
        gradients = self._gradients.finish(accumulator)
        multiply = _on_gpu if isinstance(self._projector, CudaProjector) else _on_cpu
        sketch: Tensor = multiply(self._projector, gradients) / math.sqrt(self.dim)
        return sketch


def _on_cpu(projector: BasicProjector, gradients: Tensor) -> Tensor:
    sketch: Tensor = projector.project(gradients.cpu(), model_id=0)
    return sketch.to(gradients.device)


def _on_gpu(projector: CudaProjector, gradients: Tensor) -> Tensor:
    """As many rows at a time as the kernel can index; scaled to entries around 1, for it computes in float16."""
    size = gradients.shape[1]
    scale = torch.linalg.vector_norm(gradients, dim=1, keepdim=True) / math.sqrt(size)
    scaled = gradients / torch.where(scale > 0, scale, 1)
    parts = torch.split(scaled, min(CUDA_ROWS, CUDA_ENTRIES // size))
    sketch: Tensor = torch.cat([projector.project(part.contiguous(), model_id=0).float() for part in parts])
    restored: Tensor = sketch * scale
    return restored


def _multiprocessors() -> int:
    if find_spec("fast_jl") is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


@dataclass(frozen=True)
class Dense(Projection):
    """Independent Gaussian entries of variance 1/dim; comes with the exact gradient norm.

    The classical projection, for comparison: it costs dim multiplications per parameter and sample where `CountSketch`
    costs one, and holds the full gradients of a batch. With fast_jl on a GPU, the gradients are cast to float16 and the
    sketches can only be compared with those of a GPU with as many multiprocessors.

    Args:
        dim: k; with fast_jl a multiple of 512.
        seed: of the matrix.
        multiprocessors: of the GPU that fast_jl runs on, 0 to draw and multiply the matrix on the CPU wherever the
            model is; default: what this machine has.
    """

    dim: int
    seed: int = 0
    multiprocessors: int = field(default_factory=_multiprocessors)

    def __post_init__(self) -> None:
        check_dim(self.dim)
        if self.multiprocessors and self.dim % CUDA_DIM:
            raise ValueError(f"Dense needs a dim that is a multiple of {CUDA_DIM} with fast_jl, got {self.dim}.")

    def bind(self, shapes: Shapes, mixable: Mapping[str, int], device: torch.device) -> Projector:
        """See `Projection.bind`.

        Raises:
            ValueError: the sketches were begun on another kind of device.
        """
        gradients = Identity().bind(shapes, {}, device)
        arguments = (gradients.dim, self.dim, _seed(self.seed), ProjectionType.normal)
        if not self.multiprocessors:
            return _Dense(gradients, BasicProjector(*arguments, torch.device("cpu"), block_size=COLUMNS))
        here = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
        if here != self.multiprocessors:
            raise ValueError(
                f"this Dense projection is fast_jl's on a GPU with {self.multiprocessors} multiprocessors, and the "
                f"model is on {device} with {here}, for which fast_jl draws another matrix. Use the same kind of GPU, "
                "or sketch both sides with Dense(..., multiprocessors=0)."
            )
        if gradients.dim > CUDA_ENTRIES // 8:
            raise ValueError(
                f"fast_jl takes up to {CUDA_ENTRIES // 8} parameters, the model has {gradients.dim}; use CountSketch."
            )
        return _Dense(gradients, CudaProjector(*arguments, device, max_batch_size=CUDA_ROWS))


def _seed(seed: int) -> int:
    """31 bits, far apart for neighbouring seeds: BasicProjector adds 1000 for each block of columns."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0dense".encode(), digest_size=4).digest(), "little") >> 1
