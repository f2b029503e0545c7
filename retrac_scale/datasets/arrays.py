"""Images in a NumPy or Zarr array."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from retrac_scale.datasets.base import Corrupt, ImageDataset, local, pixels


class Arrays(ImageDataset):
    """Images `[n, h, w]`, `[n, h, w, channels]` or `[n, channels, h, w]` in uint8, scaled to -1 .. 1; or floats as is.

    Args:
        images: an array, NumPy or Zarr, a tensor, or the path of a .npy file or a Zarr array, which is read row by row.
        ids: `[n]`; None numbers the rows.
        columns: {name: `[n]`}.
        given: {name in the item: `[n]`}.
        channels: of uint8 images, see `ImageDataset`; None for as many as they have.
        size: of uint8 images, see `ImageDataset`.
        corrupt: see `ImageDataset`; floats that are NaN or infinite count as corrupt.

    Raises:
        ValueError: the array has neither uint8 nor floats, or not as many axes.
    """

    def __init__(
        self,
        images: Any,
        *,
        ids: Sequence[Any] | npt.NDArray[Any] | None = None,
        columns: Mapping[str, Any] | None = None,
        given: Mapping[str, Sequence[Any]] | None = None,
        channels: int | None = None,
        size: int | None = None,
        corrupt: Corrupt = "raise",
    ) -> None:
        source = "the array"
        if isinstance(images, (str, os.PathLike)):
            source, place = os.fspath(images), local(images)
            images = np.load(place, mmap_mode="r") if place.endswith(".npy") else zarr.open_array(place, mode="r")
        if isinstance(images, Tensor):  # bfloat16 is none of NumPy's
            images = (images.float() if images.is_floating_point() else images).numpy(force=True)
        self._images, self._scaled = images, images.dtype == np.uint8
        if not self._scaled and images.dtype.kind != "f":
            raise ValueError(f"{source} has dtype {images.dtype}; give uint8, or floats in the model's range.")
        if self._scaled and (images.ndim not in (3, 4) or (images.ndim == 4 and not self._channel_axis())):
            raise ValueError(
                f"{source} has shape {images.shape}; give images [n, h, w(, 1 or 3)] or [n, 1 or 3, h, w]."
            )
        own = images.shape[self._channel_axis()] if self._scaled and images.ndim == 4 else 1
        super().__init__(
            source,
            ids=ids,
            columns=columns,
            given=given,
            channels=own if channels is None else channels,
            size=size,
            corrupt=corrupt,
            n=images.shape[0],
        )

    def _channel_axis(self) -> int:
        """Of uint8 images: 1 or 3, 0 for none."""
        return next((axis for axis in (1, 3) if self._images.shape[axis] in (1, 3)), 0)

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        image = np.asarray(self._images[row])
        return image.transpose(1, 2, 0) if self._scaled and image.ndim == 3 and self._channel_axis() == 1 else image

    def read(self, row: int) -> Tensor:
        """See `ImageDataset.read`."""
        if self._scaled:
            return pixels(self.raw(row), self.channels, self.size)
        values = torch.from_numpy(np.array(self.raw(row), dtype=np.float32))
        if not torch.isfinite(values).all():
            raise ValueError("it has NaN or infinite entries")
        return values
