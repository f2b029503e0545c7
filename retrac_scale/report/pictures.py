"""Pictures of training samples and queries, looked up by id."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

SHORT_SIDE = 64


class Pictures:
    """Training images `[n, h, w(, 3)]` with their ids `[n]`, and query images `[q, h, w(, 3)]`; 0..1 or uint8."""

    def __init__(self, images: npt.NDArray[Any], ids: npt.NDArray[Any], queries: npt.NDArray[Any]) -> None:
        if len(images) != len(ids):
            raise ValueError(f"got {len(images)} images for {len(ids)} ids; give one picture per training sample.")
        self.images = images
        self.queries = queries
        self._rows = {sample: row for row, sample in enumerate(ids.tolist())}

    def image(self, sample: Any) -> npt.NDArray[np.uint8]:
        """The picture of a training sample."""
        key = sample.item() if isinstance(sample, np.generic) else sample
        if key not in self._rows:
            raise ValueError(f"there is no picture of sample {key!r}; pass the images of all indexed samples.")
        return to_uint8(self.images[self._rows[key]])

    def query(self, place: int) -> npt.NDArray[np.uint8]:
        """The picture of the query at a place in the answer."""
        return to_uint8(self.queries[place])


def to_uint8(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """0..1 floats to 0..255; uint8 as it is."""
    if image.dtype == np.uint8:
        return image
    grey: npt.NDArray[np.uint8] = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return grey


def data_uri(image: npt.NDArray[np.uint8]) -> str:
    """A PNG data URI, enlarged without smoothing when small."""
    picture = Image.fromarray(image)
    factor = max(1, SHORT_SIDE // min(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
