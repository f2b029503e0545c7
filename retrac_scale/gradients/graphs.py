"""What autograd's graphs tell of themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def within_backward() -> bool:
    """Whether autograd is on its way back, and a module called now is one that it computes once more."""
    return torch._C._current_graph_task_id() >= 0


def leaves_of(value: Tensor) -> list[Tensor]:
    """All that a value could be differentiated by: the tensors that its graph begins with."""
    found: list[Tensor] = []
    seen = {value.grad_fn}
    ahead = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        before = node.next_functions if node is not None else ()
        if node is not None and not before and (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        for one, _ in before:
            if one is not None and one not in seen:
                seen.add(one)
                ahead.append(one)
    return found
