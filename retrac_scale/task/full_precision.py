"""A model of 16-bit weights in float32 for a while, so that what is checked is not lost in their rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import torch
from torch import nn

SHARE = 0.25
"""Of the free memory that the wider weights may take."""


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Narrow weights and buffers widened, and the same tensors as before afterwards; not where memory is short."""
    every = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    narrow = [tensor for tensor in every if tensor.is_floating_point() and tensor.itemsize < 4]
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if 4 * sum(tensor.numel() for tensor in narrow) > SHARE * free:
        yield
        return
    before = [tensor.data for tensor in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(narrow, before, strict=True):
            tensor.data = data
