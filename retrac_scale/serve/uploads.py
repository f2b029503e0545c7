"""An uploaded file as an image of the model's size; refuses everything else."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from retrac_scale.datasets.base import check_depth, is_transparent, middle_square, opaque
from retrac_scale.serve.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from retrac_scale.task.concepts import Concept
    from retrac_scale.task.diffusion import DiffusionTask

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MOST_ASPECT = 16
"""Of a longer image hardly anything would be left, and it is scaled whole before it is cut, as the datasets do it."""
VIEWS_AT_ONCE = 3
"""Sketched while other questions wait: for each alone the weights would be loaded anew, all would keep others long."""


@dataclass(frozen=True, eq=False)
class Upload:
    """A decoded upload.

    Attributes:
        key: digest of the file, its id.
        pixels: uint8 `[h, w]` or `[h, w, 3]`, of the model's size.
        note: what was done to the image to make it fit; empty when nothing.
        region: the part of it that is asked about, as for `Regions`; None for all of it.
        concept: that it is asked about for; None for the loss.
        views: in which it is asked about, as `Views` names them; none for as it is.
        prompt: that the model is told of it; None where it is told none.
    """

    key: str
    pixels: npt.NDArray[np.uint8]
    note: str
    region: Any = None
    concept: Concept | None = None
    views: tuple[str, ...] = ()
    prompt: str | None = None

    @property
    def dataset(self) -> Any:
        """A dataset of this one image, `[channels, h, w]` in -1 .. 1, or of its views."""
        dataset: Any = _One(self)
        if self.region is not None or self.concept is not None:
            from retrac_scale.task.concepts import Concepts
            from retrac_scale.task.regions import Regions

            dataset = dataset if self.region is None else Regions(dataset, self.region)
            dataset = dataset if self.concept is None else Concepts(dataset, self.concept)
        if self.views:
            from retrac_scale.task.views import Views

            dataset = Views(dataset)
        return dataset

    @property
    def pieces(self) -> list[Any]:
        """Its dataset in parts, each of which is sketched at once."""
        if not self.views:
            return [self.dataset]
        from torch.utils.data import Subset

        dataset, places = self.dataset, range(len(self.views))
        return [Subset(dataset, places[first : first + VIEWS_AT_ONCE]) for first in places[::VIEWS_AT_ONCE]]

    @property
    def words(self) -> str:
        """The note, and what of the image is asked about."""
        return ", ".join(filter(None, (self.note, *self._asked)))

    def part(self, region: Any, concept: Concept | None = None, views: tuple[str, ...] = ()) -> Upload:
        """The same image, of which a part is asked about, or which is asked about for a concept, or in views.

        Raises:
            ValueError: it is no region, or is empty.
        """
        part = replace(self, region=region, concept=concept, views=views)
        key = hashlib.blake2b(" ".join((self.key, *part._asked)).encode(), digest_size=8).hexdigest()
        return replace(part, key=key)

    @property
    def _asked(self) -> list[str]:
        concept, region = self.concept, self.region
        told = None if concept is None else [repr(one) for one in (concept.told, concept.against) if one is not None]
        return [
            *([] if region is None else [str(self.dataset.region)]),
            *([] if told is None else [f"about {' against '.join(told)}"]),
            *(["in views"] if self.views else []),
            *([f"under the prompt {self.prompt!r}"] if told is None and self.prompt is not None else []),
        ]


class _One:
    def __init__(self, upload: Upload) -> None:
        self.ids = [upload.key]
        self._pixels, self._prompt = upload.pixels, upload.prompt

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> Tensor | dict[str, Any]:
        import torch  # which takes seconds, and nobody may ever upload

        pixels = self._pixels if self._pixels.ndim == 3 else self._pixels[..., None]
        image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        return image if self._prompt is None else {"image": image, "prompt": self._prompt}


def shape_of(task: DiffusionTask, sample: Sequence[int] = ()) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a task takes, for a store of samples of a shape.

    Raises:
        ValueError: they are not known, or no images.
    """
    shape = task.picture_of(sample)
    if shape is None or shape[0] not in (1, 3):
        found = "others" if shape is None else f"{shape[0]} channels"
        raise ValueError(
            "uploads need a model that takes images of a known size in 1 or 3 channels, or latents of a VAE that comes "
            f"with it; it takes {found}."
        )
    return shape


def read_upload(content: bytes, shape: tuple[int, int, int], limits: Limits, background: str = "") -> Upload:
    """Decode an image and bring it to the model's size.

    Args:
        content: the file.
        shape: (channels, height, width) that the model takes.
        limits: its size is checked before anything is decoded.
        background: that a transparent image is put onto, see `datasets.base.opaque`.

    Raises:
        ValueError: it is no image of a known format, damaged, or too large; says which.
    """
    channels, height, width = shape
    known = ", ".join(FORMATS)
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            size = image.size
            has = f"the image has {size[0]} x {size[1]} pixels"
            if size[0] * size[1] > limits.pixels:
                raise ValueError(f"{has}; {limits.pixels} are allowed.")
            if max(size) > MOST_ASPECT * min(size):
                raise ValueError(f"{has}; one side may be {MOST_ASPECT} times the other.")
            check_depth(image)
            transparent = is_transparent(image)
            upright = ImageOps.exif_transpose(image)  # before it is put onto a ground, which has no orientation
            upright = opaque(upright, background).convert("L" if channels == 1 else "RGB")
            size = upright.size
            square = height == width  # as the datasets do it; they know no other shape
            fitted = middle_square(upright, width) if square else ImageOps.fit(upright, (width, height))
    except ValueError as error:
        raise (
            error if str(error).startswith("the image has") else ValueError(f"the image is damaged: {error}")
        ) from error
    except UnidentifiedImageError:
        raise ValueError(f"the file is no image; {known} are read.") from None
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise ValueError(f"the image is damaged or too large: {error}") from error
    notes = [_fitting(size, (width, height))] if size != (width, height) else []
    if transparent:
        notes.append(f"put onto {background}" if background else "its transparency dropped")
    return Upload(hashlib.blake2b(content, digest_size=8).hexdigest(), np.asarray(fitted), ", ".join(notes))


def _fitting(size: tuple[int, int], wanted: tuple[int, int]) -> str:
    """What was done to an image of another size."""
    alike = size[0] * wanted[1] == size[1] * wanted[0]
    how = "resized" if alike else "cropped" if min(size) == min(wanted) else "cropped and resized"
    return f"{how} from {size[0]} x {size[1]} to {wanted[0]} x {wanted[1]}"


def painted(content: bytes, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """A picture of a mask, white where it counts, in 0 .. 1.

    Args:
        content: the file.
        size: (height, width) of what it is a mask of, compared before anything is decoded.

    Raises:
        ValueError: it is no PNG, damaged, or of another size.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.size != size[::-1]:
                has, wanted = (f"{width} x {height}" for width, height in (image.size, size[::-1]))
                raise ValueError(f"it has {has} pixels, and the picture {wanted}")
            return np.asarray(image.convert("L"), np.float32) / np.float32(255)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise ValueError(f"the mask is no PNG of the picture's size that can be read: {error}.") from error


def region_asked(box: list[int] | None, mask: str | None, rest: bool, size: tuple[int, int]) -> Any:
    """What a request says of a region, as `Regions` takes it; None for all of a picture.

    Args:
        box: x0, y0, x1, y1.
        mask: a PNG, in base64.
        rest: whether all but it is meant.
        size: (height, width) of the picture.

    Raises:
        ValueError: there are both, or the mask cannot be read, or there is none and all but it is meant.
    """
    if box is None and mask is None and not rest:
        return None
    if (box is None) == (mask is None):
        raise ValueError("give box, [x0, y0, x1, y1], or mask, a PNG in base64.")
    try:
        found: Any = tuple(box) if box is not None else painted(base64.b64decode(mask or "", validate=True), size)
    except binascii.Error as error:
        raise ValueError(f"the mask is not in base64: {error}.") from None
    if not rest:
        return found
    from retrac_scale.task.regions import AllBut

    return AllBut(found)
