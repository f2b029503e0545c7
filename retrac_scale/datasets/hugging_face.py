"""A map-style dataset of Hugging Face's `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrac_scale.datasets.base import Corrupt, ImageDataset


class HuggingFace(ImageDataset):
    """A `datasets.Dataset` with a column of images.

    Args:
        dataset: map-style; a streamed one has no rows to name.
        image: its column of images.
        id: its column of unique ids; None numbers the rows.
        columns: its columns that go into the store.
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
        columns: Sequence[str] = (),
        given: Mapping[str, str] | None = None,
        channels: int = 3,
        size: int | None = None,
        corrupt: Corrupt = "raise",
    ) -> None:
        import datasets

        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError("the dataset is streamed; load it map-style, without streaming=True.")
        names = dict.fromkeys([image, *([id] if id else []), *columns, *(given or {}).values()])
        missing = [name for name in names if name not in dataset.column_names]
        if missing:
            raise ValueError(f"the dataset has no column {missing[0]!r}; it has {dataset.column_names}.")
        self._images = dataset.select_columns([image]).with_format(None)  # a training loop's transform is its own
        if isinstance(dataset.features[image], datasets.Image):
            self._images = self._images.cast_column(image, datasets.Image(decode=False))
        self._image_column = image
        rest = dataset.select_columns([name for name in names if name != image]).with_format(None)
        super().__init__(
            f"column {image!r} of the dataset",
            ids=None if id is None else list(rest[id]),
            columns={name: list(rest[name]) for name in columns},
            given={name: list(rest[column]) for name, column in (given or {}).items()},
            channels=channels,
            size=size,
            corrupt=corrupt,
            n=len(dataset),
        )

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        value = self._images[row][self._image_column]
        if isinstance(value, Mapping):
            return value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
        return value
