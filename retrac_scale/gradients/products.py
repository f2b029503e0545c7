"""Matrix products of a batch, by the fastest kernel at hand."""

from __future__ import annotations

import threading
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANY_OPERATIONS = 1 << 20
"""Multiply-adds per sample from which one oneDNN call each beats a batched MKL call (alike at 0.8 million)."""

_scratch = threading.local()


def _faster_than_mkl() -> Any:
    """oneDNN's product, None where there is none or MKL is there and runs on a processor that it is made for."""
    mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    processor = Path("/proc/cpuinfo")
    if mkl and processor.exists() and "GenuineIntel" in processor.read_text():
        return None
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if onednn else None


_onednn = _faster_than_mkl()


def batched_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`[n, a, s]` times `[n, b, s]`, summed over s, into `out [n, a, b]`.

    torch's float32 products on the CPU go to MKL, which on AMD processors reaches 0.4 of oneDNN's rate; on Intel's it
    is as fast or, since it writes into `out` itself, up to four times faster.
    """
    a, s = left.shape[1:]
    b = right.shape[1]
    if s == 1:
        return torch.mul(left, right.mT, out=out)
    if _onednn is None or left.dtype != torch.float32 or left.device.type != "cpu" or a * b * s < MANY_OPERATIONS:
        return torch.bmm(left, right.mT, out=out)
    for product, a_s, b_s in zip(out.unbind(0), left.unbind(0), right.unbind(0), strict=True):
        product.copy_(_onednn(a_s, b_s, None, "none", [], ""))
    return out


def scratch(purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory, valid until this thread asks for the same purpose again.

    Touching fresh pages costs more than the products that fill them.
    """
    name = f"{purpose} {like.device} {like.dtype}"
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.numel() < prod(shape):
        buffer = like.new_empty(prod(shape))
        setattr(_scratch, name, buffer)
    view: Tensor = buffer[: prod(shape)].view(shape)
    return view
