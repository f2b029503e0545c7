"""A map-style dataset of Hugging Face's `datasets`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrac_scale.datasets.base import Columns, Corrupt, ImageDataset, decoding, local, origins


class HuggingFace(ImageDataset):
    """A `datasets.Dataset` with a column of images, decoded as the dataset's own feature does it, in its mode.

    Args:
        dataset: map-style; a streamed one has no rows to name.
        image: its column of images, or of arrays of uint8.
        id: its column of unique ids; None numbers the rows.
        columns: its columns that go into the store, or {name there: column}.
        given: {name in the item: column}, e.g. `{"label": "label", "prompt": "caption"}`.
        channels: see `ImageDataset`.
        size: see `ImageDataset`.
        corrupt: see `ImageDataset`.
    """

    def __init__(
        self,
        dataset: Any,
        image: str = "image",
        *,
        id: str | None = None,
        columns: Columns = (),
        given: Mapping[str, str] | None = None,
        channels: int = 3,
        size: int | None = None,
        corrupt: Corrupt = "raise",
    ) -> None:
        import datasets

        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError("the dataset is streamed; load it map-style, without streaming=True.")
        if isinstance(dataset, datasets.DatasetDict):
            raise ValueError(f"there are several splits; give one of them, dataset[{next(iter(dataset), '')!r}].")
        kept = origins(columns)
        names = dict.fromkeys([image, *([id] if id else []), *kept.values(), *(given or {}).values()])
        missing = [name for name in names if name not in dataset.column_names]
        if missing:
            raise ValueError(f"the dataset has no column {missing[0]!r}; it has {dataset.column_names}.")
        self._images = dataset.select_columns([image]).with_format(None)  # a training loop's transform is its own
        feature = dataset.features[image]
        self._feature = datasets.Image(mode=feature.mode) if isinstance(feature, datasets.Image) else None
        if self._feature is not None:
            self._images = self._images.cast_column(image, datasets.Image(mode=feature.mode, decode=False))
        self._whole = isinstance(feature, (datasets.Array2D, datasets.Array3D)) and feature.dtype == "uint8"
        self._image_column, self._folder = image, os.getcwd()
        rest = dataset.select_columns([name for name in names if name != image]).with_format(None)
        super().__init__(
            f"column {image!r} of the dataset",
            ids=None if id is None else list(rest[id]),
            columns={name: list(rest[column]) for name, column in kept.items()},
            given={name: list(rest[column]) for name, column in (given or {}).items()},
            channels=channels,
            size=size,
            corrupt=corrupt,
            n=len(dataset),
        )

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        value = self._images[row][self._image_column]
        if self._feature is None or value is None:
            return np.asarray(value, dtype=np.uint8) if self._whole else value
        if value["bytes"] is None and value["path"] is not None:
            value = {**value, "path": local(value["path"], self._folder)}
        with decoding():
            return self._feature.decode_example(value)
