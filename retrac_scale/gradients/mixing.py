"""Output gradients mixed into a few channels, in as many ways as keep the errors of neighbouring inputs apart.

A mixer `[r, SETS, o]` holds SETS sets of r rows. The gradient of a weight is mixed by one set for each of its inputs:
input feature i at kernel position k meets set (i + k) mod SETS. That of a bias is mixed by all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SETS = 8


def mix_outputs(mixer: Tensor, grad: Tensor, axis: int) -> Tensor:
    """Output gradients, of o channels along an axis, by all rows: of r SETS channels.

    Args:
        mixer: `[r, SETS, o]`.
        grad: output gradients.
        axis: of their channels.
    """
    rows, last = mixer.flatten(0, 1).to(grad.dtype), grad.movedim(axis, -1)
    if last.is_contiguous():  # one product, not one for each sample
        mixed = functional.linear(last, rows)
    else:
        mixed = (rows @ last.flatten(1, -2).mT).mT.reshape(*last.shape[:-1], -1)
    return mixed.movedim(-1, axis)


def mix(mixer: Tensor, gradient: Tensor) -> Tensor:
    """Whole gradients, mixed.

    Args:
        mixer: `[r, SETS, o]`.
        gradient: of a weight `[n, o, i, *kernel]`, or of a bias `[n, o]`.

    Returns:
        `[n, r, i, *kernel]`, or `[n, r SETS]`.
    """
    mixed = torch.einsum("to,no...->nt...", mixer.flatten(0, 1).to(gradient.dtype), gradient)
    return mixed if gradient.ndim == 2 else one_set_each(mixed)


def one_set_each(weight: Tensor) -> Tensor:
    """From gradients of a weight mixed by all rows, `[n, r SETS, i, *kernel]`, what each input's own set gives."""
    n, rows, inputs = weight.shape[:3]
    last = weight.reshape(n, rows // SETS, SETS, inputs, -1).movedim(3, 4)
    features, places = (torch.arange(size, device=weight.device) for size in (inputs, last.shape[3]))
    chosen = ((features + places[:, None]) % SETS).expand(*last.shape[:2], 1, -1, -1)
    own: Tensor = last.gather(2, chosen).squeeze(2).movedim(3, 2)
    return own.reshape(n, -1, *weight.shape[2:])
