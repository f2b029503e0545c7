"""Image files as a dataset, named by their paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFiles:
    """Image files, and all those in folders, as tensors `[channels, h, w]` in -1 .. 1; their ids are their paths.

    Raises:
        ValueError: a path is neither an image nor a folder that holds some.
    """

    def __init__(self, paths: Sequence[str], channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"the model takes {channels} channels, so images would have to be encoded first.")
        self.channels = channels
        self.ids: list[str] = []
        for path in map(Path, paths):
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            images = [str(file) for file in found if file.suffix.lower() in SUFFIXES and file.is_file()]
            if not images:
                raise ValueError(f"{path} is no image and holds none; images end in {', '.join(SUFFIXES)}.")
            self.ids += images

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.ids[row]) as image:
            pixels = np.asarray(image.convert("L" if self.channels == 1 else "RGB"), dtype=np.float32)
        return torch.from_numpy(pixels).reshape(*pixels.shape[:2], self.channels).permute(2, 0, 1) / 127.5 - 1
