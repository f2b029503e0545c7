"""The slow, obvious reference: autograd, one pair at a time, float64, no cleverness."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrac_scale import draw_noise
from retrac_scale.task.checkpoints import StateDict


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """The full gradient of one loss, every trainable parameter flattened in the model's order."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def pair_gradient(
    model: nn.Module,
    state: StateDict,
    scheduler: Any,
    image: Tensor,
    sample: Any,
    timestep: int,
    *,
    seed: int = 0,
    draws: int = 1,
    measure: str = "mse",
    conditioning: Mapping[str, Tensor] | None = None,
) -> Any:
    """Gradient of the diffusion loss of one sample at one timestep, the mean over its noise draws; float64 `[P]`.

    The sample None has common noise.
    """
    reference = copy.deepcopy(model).double().eval()
    reference.load_state_dict(state)
    total: Any = 0
    for draw in range(draws):
        noise = draw_noise(image.shape, None if sample is None else [sample], [timestep], seed, draw=draw).double()
        clean = image.double()[None]
        signal = scheduler.alphas_cumprod[timestep].double()
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        given = {key: value[None] for key, value in (conditioning or {}).items()}
        error = reference(noisy, torch.tensor([timestep]), **given).sample - noise
        loss = error.square().mean() if measure == "mse" else error.abs().mean()
        total = total + gradient(reference, loss)
    return (total / draws).numpy()


def tracin(train: Any, queries: Any, weights: Any) -> Any:
    """sum_c w_c <mean_t g(c,i,t), mean_s g(c,q,s)>, `[q, n]`, from full gradients `{c: [n, t, P]}`."""
    scores: Any = 0
    for c in train:
        scores = scores + weights[c] * queries[c].mean(1) @ train[c].mean(1).T
    return scores


def retrac(train: Any, queries: Any, weights: Any) -> Any:
    """As `tracin`, every gradient divided by its norm first."""
    return tracin({c: _unit(g) for c, g in train.items()}, {c: _unit(g) for c, g in queries.items()}, weights)


def retrac_matched(train: Any, queries: Any, weights: Any) -> Any:
    """sum_c w_c sum_t <u(c,i,t), u(c,q,t)>."""
    return sum(weights[c] * np.einsum("qtk,ntk->qn", _unit(queries[c]), _unit(train[c])) for c in train)


def tracin_matched(train: Any, queries: Any, weights: Any) -> Any:
    """sum_c w_c sum_t <g(c,i,t), g(c,q,t)>."""
    return sum(weights[c] * np.einsum("qtk,ntk->qn", queries[c], train[c]) for c in train)


def grad_cos(train: Any, queries: Any, weights: Any) -> Any:
    """sum_c w_c cos(mean_t g(c,i,t), mean_s g(c,q,s))."""
    means = [{c: _unit(g.mean(1, keepdims=True)) for c, g in side.items()} for side in (train, queries)]
    return tracin(means[0], means[1], weights)


def _unit(g: Any) -> Any:
    return g / np.linalg.norm(g, axis=2, keepdims=True)
