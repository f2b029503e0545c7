"""Convolutions whose activations lie in memory channels last, which a processor computes a few per cent faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

INDIFFERENT = {"torch", "diffusers", "peft"}
"""Packages whose modules ask for no memory order; the user's own may view a convolution's output flat."""


def takes_any_order(model: nn.Module) -> bool:
    """Whether all modules of a model are of packages that are known to."""
    return all(type(module).__module__.partition(".")[0] in INDIFFERENT for module in model.modules())


@contextlib.contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Give convolutions in two dimensions their inputs channels last, and so outputs; weights stay as they are."""
    handles = [
        module.register_forward_pre_hook(_reorder)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reorder(module: nn.Module, args: tuple[Any, ...]) -> Any:
    if args and args[0].ndim == 4:
        return (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    return None
