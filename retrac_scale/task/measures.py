"""Functions of the model's output, differentiated in place of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def _norm(order: float) -> Callable[[Tensor], Tensor]:
    def norm(output: Tensor) -> Tensor:
        values: Tensor = torch.linalg.vector_norm(output, order, dim=1)
        return values

    return norm


OUTPUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean_output": lambda output: output.mean(1),
    "mean_squared_output": lambda output: output.square().mean(1),
    "output_l1": _norm(1),
    "output_l2": _norm(2),
    "output_linf": _norm(torch.inf),
}
"""Name -> function of the outputs `[n, entries]` that gives one value each, `[n]`.

Those of D-TRAK (Zheng et al. 2024, arXiv 2311.00500, which takes "mean_squared_output") and of DAS (Lin et al. 2024,
arXiv 2410.18639, "mean_output").
"""
