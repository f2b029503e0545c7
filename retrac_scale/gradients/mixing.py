"""Output gradients mixed into a few channels, in as many ways as keep the errors of neighbouring inputs apart.

A mixer `[r, o]` stands for SETS sets of r rows: in set s, what it has for output c is times entry (s, c mod SETS) of a
Hadamard matrix. The gradient of a weight is mixed by one set for each of its inputs: input feature i at kernel position
k meets set (i + k) mod SETS. That of a bias is not mixed.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

SETS = 16


def hadamard(rows: npt.NDArray[np.int64], columns: int) -> npt.NDArray[np.float32]:
    """Rows of Sylvester's Hadamard matrix, by number: their first entries `[rows, columns]`, +1 or -1."""
    shared = rows[:, None] & np.arange(columns)
    for shift in (16, 8, 4, 2, 1):  # the parity of the bits that a row's number and a column's have in common
        shared ^= shared >> shift
    return (1 - 2 * (shared & 1)).astype(np.float32)


@lru_cache(maxsize=128)
def _ways(outputs: int, device: torch.device) -> Tensor:
    """By what the sets multiply each output: `[SETS, o]`."""
    return torch.from_numpy(hadamard(np.arange(SETS), SETS)[:, np.arange(outputs) % SETS]).to(device)


@lru_cache(maxsize=128)
def _sets(inputs: int, kernel: tuple[int, ...], device: torch.device) -> Tensor:
    """The set that each input meets: `[inputs, *kernel]`."""
    places = torch.arange(prod(kernel), device=device)
    return (torch.arange(inputs, device=device)[:, None] + places).view(inputs, *kernel) % SETS


def mix_outputs(mixer: Tensor, grad: Tensor, axis: int) -> Tensor:
    """Output gradients, of o channels along an axis, by all rows: of r SETS channels.

    Args:
        mixer: `[r, o]`.
        grad: output gradients.
        axis: of their channels.
    """
    rows = (mixer[:, None] * _ways(mixer.shape[1], mixer.device)).flatten(0, 1).to(grad.dtype)
    last = grad.movedim(axis, -1)
    if last.is_contiguous():  # one product, not one for each sample
        mixed = functional.linear(last, rows)
    else:
        mixed = (rows @ last.flatten(1, -2).mT).mT.reshape(*last.shape[:-1], -1)
    return mixed.movedim(-1, axis)


def one_set_each(weight: Tensor) -> Tensor:
    """From gradients of a weight mixed by all rows, `[n, r SETS, i, *kernel]`, what each input's own set gives."""
    n, rows, inputs, *kernel = weight.shape
    by_set, own = weight.reshape(n, rows // SETS, SETS, inputs, *kernel), _sets(inputs, tuple(kernel), weight.device)
    chosen: Tensor = by_set.gather(2, own.expand(n, by_set.shape[1], 1, *own.shape))
    return chosen.squeeze(2)


def mix(mixer: Tensor, weight: Tensor) -> Tensor:
    """Full gradients of a weight `[n, o, i, *kernel]`, mixed: `[n, r, i, *kernel]`."""
    outputs, inputs, *kernel = weight.shape[1:]
    own = _sets(inputs, tuple(kernel), weight.device)
    signs = _ways(outputs, weight.device).to(weight.dtype).T[:, own]
    return torch.einsum("ro,no...->nr...", mixer.to(weight.dtype), weight * signs)
