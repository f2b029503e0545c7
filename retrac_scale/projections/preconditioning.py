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


def adam_divisors(model: nn.Module, optimizer: torch.optim.Optimizer | Mapping[str, Any]) -> dict[str, Tensor]:
    """sqrt(v / (1 - beta2^step)) + eps of every parameter, as Adam and AdamW divide by.

    Sketch the training side with them and the queries without: <g_q, g_i / (sqrt(v) + eps)> is then how an Adam step on
    sample i changes the loss of q to first order, its momentum left out (as in Xia, Malladi, Gururangan, Arora, Chen
    2024, arXiv 2402.04333).

    Args:
        model: with all its parameters that require a gradient in the optimizer.
        optimizer: a torch Adam or AdamW, of which each parameter is known by itself; or its `state_dict()`, where it
            was given `model.named_parameters()`, or one group of all trainable parameters in the model's order.

    Raises:
        ValueError: it is no such optimizer or state, lacks a parameter, or does not tell which is which.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    states = (
        _states_of(optimizer, parameters)
        if isinstance(optimizer, torch.optim.Optimizer)
        else _saved_states(optimizer, parameters)
    )
    divisors = {}
    for name, value in parameters.items():
        if name not in states:
            raise ValueError(
                f"parameter {name!r} of the model is not in the optimizer; give both as they were trained."
            )
        state, group = states[name]
        if "amsgrad" not in group:  # RAdam, NAdam and SparseAdam have second moments too, and divide otherwise
            raise ValueError(f"parameter {name!r} was not trained by Adam or AdamW of torch; give the state of one.")
        moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if moment is None or moment.shape != value.shape:
            found = "none" if moment is None else f"one of shape {tuple(moment.shape)}"
            raise ValueError(
                f"parameter {name!r} of shape {tuple(value.shape)} needs Adam's second moment, the optimizer's state "
                f"has {found}."
            )
        corrected = moment.float() / (1 - group["betas"][1] ** float(state["step"]))
        divisors[name] = corrected.sqrt() + group["eps"]
    return divisors


States = dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Parameter name -> what an optimizer keeps of it, and the options of its group."""


def _states_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> States:
    """Those of an optimizer's parameters that are among some."""
    name_of = {id(value): name for name, value in parameters.items()}
    return {
        name_of[id(value)]: (optimizer.state.get(value, {}), group)
        for group in optimizer.param_groups
        for value in group["params"]
        if id(value) in name_of
    }


def _saved_states(saved: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> States:
    """Those of a `state_dict()`, by the names that it has, or in the order of the parameters."""
    groups = saved.get("param_groups", [])
    order = [(saved["state"].get(number, {}), group) for group in groups for number in group["params"]]
    named = [name for group in groups for name in group.get("param_names", [])]
    if len(groups) > 1 and not named:
        raise ValueError(
            f"the optimizer's state has {len(groups)} groups of parameters without names, whose order nobody knows; "
            "give the optimizer itself, with its state loaded into it."
        )
    if len(order) != len(named or parameters):
        raise ValueError(
            f"the optimizer's state holds {len(order)} parameters, the model {len(parameters)} trainable ones; "
            "give the state of an optimizer over model.parameters()."
        )
    return dict(zip(named or parameters, order, strict=True))


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
