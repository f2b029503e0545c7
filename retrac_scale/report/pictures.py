"""Pictures of training samples and queries, looked up by id."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from retrac_scale.columns import Column, Places, Texts
from retrac_scale.datasets.base import opaque

TINY, SMALL, LARGEST = 12, 64, 160
SLACK = 0.05
"""By how much floats may lie outside 0 .. 1, as sharp edges do that were resized."""
Images = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]
"""`[n, h, w(, 3)]`, floats 0 .. 1 or integers 0 .. 255; or as many arrays, read when they are asked for."""


class Paths(Sequence[str]):
    """Names in a folder as paths, each made when it is asked for."""

    def __init__(self, names: Column, folder: str) -> None:
        self._names, self._folder = names, folder

    def __len__(self) -> int:
        return len(self._names.codes if isinstance(self._names, Texts) else self._names)

    def __getitem__(self, row: Any) -> Any:
        name = self._names.value(row) if isinstance(self._names, Texts) else str(self._names[row])
        return os.path.join(self._folder, name)


class PictureFiles(Sequence[npt.NDArray[Any]]):
    """Image files as arrays `[h, w, 3]`, read when they are asked for."""

    def __init__(self, paths: Sequence[str], background: str = "") -> None:
        self.paths, self.background = paths, background

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: Any) -> Any:
        with Image.open(self.paths[row]) as picture:
            upright = ImageOps.exif_transpose(picture)  # upright and opaque, as the dataset has it
            return np.asarray(opaque(upright, self.background).convert("RGB"))


def read_images(file: str | None, ids: Column, folder: str = "", background: str = "") -> Images:
    """The images of samples: a .npy file `[n, h, w(, 3)]`, or without one the files that their ids name.

    Args:
        file: None for the files that the ids name.
        ids: of the samples `[n]`, or what else names their files.
        folder: that the ids are relative to; where it has no such files, they are taken as they are.
        background: of transparent files, see `datasets.base.opaque`.

    Raises:
        ValueError: the ids name no files, or the file is no array of images.
    """
    if file is None:
        for paths in (Paths(ids, folder), Paths(ids, "")) if isinstance(ids, Texts) or ids.dtype.kind == "U" else ():
            if os.path.isfile(paths[0]):
                return PictureFiles(paths, background)
        raise ValueError(f"the ids, such as {Paths(ids, '')[0]}, are no image files; give the pictures in a .npy file.")
    try:
        images = np.lib.format.open_memmap(file, mode="r")
    except ValueError as error:
        raise ValueError(f"{file} is no .npy file of images: {error}") from None
    if images.ndim != 3 and images.shape[3:] != (3,):
        raise ValueError(f"{file} has shape {images.shape}; give images as [n, h, w] or [n, h, w, 3].")
    return images


class Pictures:
    """Pictures of training samples with their ids `[n]`, and of queries in the order in which they are asked."""

    def __init__(self, images: Images, ids: npt.NDArray[Any], queries: Images) -> None:
        if len(images) != len(ids):
            raise ValueError(f"got {len(images)} images for {len(ids)} ids; give one picture per training sample.")
        self.images = images
        self.queries = queries
        self._places = Places(ids)

    def image(self, sample: Any) -> npt.NDArray[np.uint8]:
        """The picture of a training sample."""
        key = sample.item() if isinstance(sample, np.generic) else sample
        row = int(self._places.find([key])[0])
        if row < 0:
            raise ValueError(f"there is no picture of sample {key!r}; pass the images of all indexed samples.")
        return to_uint8(self.images[row])

    def query(self, place: int) -> npt.NDArray[np.uint8]:
        """The picture of the query at a place in the answer."""
        return to_uint8(self.queries[place])


def to_uint8(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Floats 0 .. 1 to 0 .. 255, integers as they are.

    Raises:
        ValueError: floats lie outside by more than what rounds or resizes them makes.
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind == "f" and not -SLACK <= image.min() <= image.max() <= 1 + SLACK:
        raise ValueError(
            f"a picture has floats from {image.min():.3g} to {image.max():.3g}, where 0 .. 1 are shown: give "
            "(images + 1) / 2 of a model's -1 .. 1, images / 255 of 0 .. 255, or uint8."
        )
    values = np.clip(image, 0, 255) if image.dtype.kind in "iu" else (np.clip(image, 0, 1) * 255).round()
    grey: npt.NDArray[np.uint8] = values.astype(np.uint8)
    return grey


def is_tiny(image: npt.NDArray[np.uint8]) -> bool:
    """Whether a picture has so few pixels that, shown as squares, they hide what it shows."""
    return bool(max(image.shape[:2]) <= TINY)


def data_uri(image: npt.NDArray[np.uint8]) -> str:
    """A data URI: PNG as it is when small, smoothly enlarged when tiny, otherwise a JPEG of at most 160 pixels."""
    picture = Image.fromarray(image)
    if is_tiny(image):
        times = SMALL // max(picture.size)
        picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.BILINEAR)
    small = max(picture.size) <= SMALL
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
