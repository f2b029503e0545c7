"""Embedding: weight [rows, features], looked up by integer activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrac_scale.gradients.registry import register


def embedding(layer: nn.Embedding, activation: Tensor, grad_output: Tensor, n: int) -> dict[str, Tensor]:
    """weight[n, row]: the sum of grad[n,s] over the positions s that looked the row up."""
    grad = grad_output.reshape(n, -1, layer.embedding_dim)
    rows = activation.reshape(n, -1)
    if layer.padding_idx is not None:
        grad = grad * (rows != layer.padding_idx).unsqueeze(-1)
    weight = torch.zeros(n, layer.num_embeddings, layer.embedding_dim, dtype=grad.dtype, device=grad.device)
    weight.scatter_add_(1, rows.unsqueeze(-1).expand_as(grad), grad)
    return {"weight": weight}


register(nn.Embedding, embedding, suits=lambda layer: not layer.scale_grad_by_freq)
