"""What gradients are divided by before they are projected."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Kronecker:
    """Divides a weight's gradients in a Kronecker product of two bases.

    Attributes:
        left: orthonormal columns over the output features, `[o, o]`.
        right: orthonormal columns over everything else, `[p, p]`.
        values: positive, what the entries in these bases are divided by, `[o, p]`.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def solve(self, gradient: Tensor) -> Tensor:
        """Gradients `[n, *shape]`, rotated, divided and rotated back."""
        rotated = self.left.T @ gradient.flatten(2).float() @ self.right
        return (self.left @ (rotated / self.values) @ self.right.T).reshape(gradient.shape)

    def to(self, device: torch.device) -> Kronecker:
        """On another device."""
        return Kronecker(self.left.to(device), self.right.to(device), self.values.to(device))


Divisors = Mapping[str, Tensor | Kronecker]
"""Parameter name -> what its gradients are divided by before they are projected: a positive tensor of its shape, entry
by entry, or a `Kronecker`, in other bases."""


def adam_divisors(model: nn.Module, optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    """sqrt(v / (1 - beta2^step)) + eps of every parameter, as Adam and AdamW divide by.

    Sketch the training side with them and the queries without: <g_q, g_i / (sqrt(v) + eps)> is then how an Adam step on
    sample i changes the loss of q to first order, its momentum left out (as in Xia, Malladi, Gururangan, Arora, Chen
    2024, arXiv 2402.04333).

    Args:
        model: whose parameters the optimizer was given, all that require a gradient, in order.
        optimizer: `optimizer.state_dict()` of a torch Adam or AdamW.

    Raises:
        ValueError: it is no such state, or of other parameters; names the first that differs.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    groups = optimizer.get("param_groups", [])
    order = [(number, group) for group in groups for number in group["params"]]
    names = [name for group in groups for name in group.get("param_names", [])] or list(parameters)
    if len(order) != len(names) or set(names) != set(parameters):
        raise ValueError(
            f"the optimizer's state holds {len(order)} parameters, the model {len(parameters)} trainable ones; "
            "give the state of an optimizer over model.parameters()."
        )
    divisors = {}
    for name, (number, group) in zip(names, order, strict=True):
        state = optimizer["state"].get(number, {})
        moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if moment is None or moment.shape != parameters[name].shape:
            found = "none" if moment is None else f"one of shape {tuple(moment.shape)}"
            raise ValueError(
                f"parameter {name!r} of shape {tuple(parameters[name].shape)} needs Adam's second moment, the "
                f"optimizer's state has {found}."
            )
        corrected = moment.float() / (1 - group["betas"][1] ** float(state["step"]))
        divisors[name] = corrected.sqrt() + group["eps"]
    return divisors


def divided(gradient: Tensor, by: Tensor | Kronecker) -> Tensor:
    """A parameter's gradients `[n, *shape]`, preconditioned."""
    return gradient / by if isinstance(by, Tensor) else by.solve(gradient)


def check_divisors(divisors: Divisors, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError, naming the parameter, unless every one has positive divisors of its shape."""
    for name, shape in shapes.items():
        by = divisors.get(name, torch.empty(0))
        values, size = (by, shape) if isinstance(by, Tensor) else (by.values, (shape[0], math.prod(shape[1:])))
        if tuple(values.shape) != size:
            raise ValueError(f"{where}: the divisors of {name!r} have shape {tuple(values.shape)}, they need {size}.")
        if not bool((values > 0).all() & values.isfinite().all()):
            raise ValueError(f"{where}: the divisors of {name!r} must be finite and positive; add a small number.")


def digest_of(divisors: Divisors) -> str:
    """Hex digest for the fingerprint of a store."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(divisors):
        by = divisors[name]
        digest.update(name.encode())
        for tensor in (by,) if isinstance(by, Tensor) else (by.values, by.left, by.right):
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
