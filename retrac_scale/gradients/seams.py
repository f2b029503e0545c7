"""Hooks on a model's layers and on what they give, which see what they are meant to see and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retrac_scale.gradients.registry import Seen


class Hook:
    """A module's hook that does not act on the module's copies: they bring it along, deep-copied or pickled.

    Args:
        module: the one it acts on.
        act: called as the hook is.
    """

    def __init__(self, module: nn.Module | None, act: Callable[..., Any] | None) -> None:
        self._module, self._act = module, act

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Called by torch."""
        return self._act(module, *given) if self._act is not None and module is self._module else None

    def __reduce__(self) -> Any:
        return Hook, (None, None)


def seam(tensor: Tensor, seen: Seen, *, apart: bool) -> Tensor:
    """A layer's output, to go on with, whose gradient will be seen whatever is done to it in place.

    Args:
        tensor: the output; requires a gradient.
        seen: called with the gradient of the values that it has now.
        apart: whether the layer may have used it itself, whose uses are not to count.
    """
    if apart or tensor._is_view():  # changed in place, a view's graph leaves out what was hooked to it
        through: Tensor = _Seam.apply(tensor, seen)  # type: ignore[no-untyped-call]
        return through
    tensor.register_hook(seen)  # type: ignore[no-untyped-call]
    return tensor


class _Seam(torch.autograd.Function):
    """The same memory as a tensor that is nobody's view."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, seen: Seen) -> Tensor:
        ctx.seen = seen
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.seen(grad)
        return grad, None
