"""Image files as a dataset, named by their paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrac_scale.datasets.base import SUFFIXES, Corrupt, ImageDataset, check_channels


class ImageFiles(ImageDataset):
    """Image files, and all those in folders; their ids are their paths, column "folder" is the folder's name.

    Args:
        paths: of files and folders.
        channels: see `ImageDataset`.
        size: see `ImageDataset`.
        corrupt: see `ImageDataset`.

    Raises:
        ValueError: a path is neither an image nor a folder that holds some.
    """

    def __init__(
        self, paths: Sequence[str], channels: int = 3, *, size: int | None = None, corrupt: Corrupt = "raise"
    ) -> None:
        check_channels(channels)
        files: list[Path] = []
        for path in map(Path, paths):
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            images = [file for file in found if file.suffix.lower() in SUFFIXES and file.is_file()]
            if not images:
                raise ValueError(f"{path} is no image and holds none; images end in {', '.join(SUFFIXES)}.")
            files += images
        self._files = files
        super().__init__(
            ", ".join(map(str, paths)),
            ids=[str(file) for file in files],
            columns={"folder": [file.parent.name for file in files]},
            given=None,
            channels=channels,
            size=size,
            corrupt=corrupt,
        )

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        return self._files[row].read_bytes()
