"""Divisors of gradients: Adam's second-moment root, the diagonal of the empirical Fisher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Divisors = Mapping[str, Tensor]
"""Parameter name -> positive tensor of its shape, which its gradients are divided by before they are projected."""


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


def check_divisors(divisors: Divisors, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError, naming the parameter, unless every one has positive divisors of its shape."""
    for name, shape in shapes.items():
        if name not in divisors or tuple(divisors[name].shape) != shape:
            found = f"of shape {tuple(divisors[name].shape)}" if name in divisors else "missing"
            raise ValueError(f"{where}: the divisors of {name!r} are {found}; they need shape {shape}.")
        if not bool((divisors[name] > 0).all() & divisors[name].isfinite().all()):
            raise ValueError(f"{where}: the divisors of {name!r} must be finite and positive; add a small number.")


def digest_of(divisors: Divisors) -> str:
    """Hex digest for the fingerprint of a store."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(divisors):
        digest.update(name.encode() + divisors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
