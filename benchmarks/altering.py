"""Pictures that were altered a little."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

ALTERED = ("shifted", "darker", "noisy", "JPEG", "mirrored")


def alter(images: Any, how: str) -> Any:
    """Images in -1 .. 1, `[n, c, h, w]`, shifted by a pixel, a tenth darker, with noise of 0.1, JPEG or mirrored."""
    if how == "shifted":
        return torch.cat([images[..., :1], images[..., :-1]], dim=-1)
    if how == "darker":
        return (images + 1) * 0.9 - 1
    if how == "noisy":
        return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return torch.stack([_through_jpeg(image) for image in images]) if how == "JPEG" else images.flip(-1)


def _through_jpeg(image: Any) -> Any:
    pixels = ((image + 1) * 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", quality=75)
    read = np.array(Image.open(buffer))
    return torch.from_numpy(read.reshape(pixels.shape)).permute(2, 0, 1).float() / 127.5 - 1
