"""Image files as a dataset, named by their paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from retrac_scale.datasets.base import Corrupt, ImageDataset, Paths, check_channels, listed, local
from retrac_scale.datasets.metadata import columns_beside


class ImageFiles(ImageDataset):
    """Image files, and all those in folders; their ids are their paths, column "folder" is the folder's name.

    Further columns are those of metadata.jsonl, .csv or .parquet in the folders, see `columns_beside`.

    Of a folder count the files that Hugging Face's `imagefolder` takes: whatever Pillow opens, by its suffix, in no
    folder and under no name that begins with a dot, as copies of editors and of macOS do.

    Args:
        paths: of files and folders, or one of them.
        channels: see `ImageDataset`.
        size: see `ImageDataset`.
        corrupt: see `ImageDataset`.

    Raises:
        ValueError: a path is neither an image nor a folder that holds some.
    """

    def __init__(self, paths: Paths, channels: int = 3, *, size: int | None = None, corrupt: Corrupt = "raise") -> None:
        check_channels(channels)
        Image.init()
        suffixes = tuple(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN)
        files: list[Path] = []
        columns: dict[str, list[Any]] = {}
        for path in map(Path, listed(paths, "ImageFiles got no paths")):
            if not path.exists():
                raise ValueError(f"there is no file or folder {path}.")
            found = sorted(_inside(path)) if path.is_dir() else [path]
            images = [file for file in found if file.suffix.lower() in suffixes]
            if not images:
                raise ValueError(f"{path} is no image and holds none; images end in .png, .jpg and what Pillow opens.")
            files += images
            for name, values in (columns_beside(path, images) if path.is_dir() else {}).items():
                columns.setdefault(name, []).extend(values)
        self._files = [local(file) for file in files]
        super().__init__(
            ", ".join(listed(paths, "")),
            ids=[str(file) for file in files],
            columns={"folder": [file.parent.name for file in files]}
            | {name: values for name, values in columns.items() if len(values) == len(files)},
            given=None,
            channels=channels,
            size=size,
            corrupt=corrupt,
        )

    def files(self) -> list[str]:
        """See `ImageDataset.files`."""
        return self._files

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        return Path(self._files[row]).read_bytes()


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder and those below, links to folders followed, but for hidden ones."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (Path(place, name) for name in files if not name.startswith("."))
