"""Matrix products of a batch, and memory for them."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

_scratch = threading.local()


def batched_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`[n, a, s]` times `[n, b, s]`, summed over s, into `out [n, a, b]`."""
    return torch.mul(left, right.mT, out=out) if left.shape[2] == 1 else torch.bmm(left, right.mT, out=out)


def scratch(purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory, valid until this thread asks for the same purpose again.

    Touching fresh pages costs more than the products that fill them.
    """
    name = f"{purpose} {like.device} {like.dtype}"
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.numel() < prod(shape):
        buffer = like.new_empty(prod(shape))
        setattr(_scratch, name, buffer)
    view: Tensor = buffer[: prod(shape)].view(shape)
    return view
