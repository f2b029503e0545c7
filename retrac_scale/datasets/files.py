"""Image files as a dataset, named by their paths."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retrac_scale.columns import check_columns
from retrac_scale.datasets.base import Corrupt, ImageDataset, Paths, check_channels, listed, local, suffixes
from retrac_scale.datasets.metadata import CAPTIONS, KINDS, columns_beside, texts_beside

logger = logging.getLogger(__name__)


class ImageFiles(ImageDataset):
    """Image files, and all those in folders; their ids are their paths, column "folder" is the folder's name.

    Further columns are those of metadata.jsonl, .csv or .parquet in the folders, and in those below them, that have one
    text, number or boolean for every file; which others there are is warned of.

    Of a folder count the files that Hugging Face's `imagefolder` takes: whatever Pillow opens, by its suffix, in no
    folder and under no name that begins with a dot, as copies of editors and of macOS do.

    Args:
        paths: of files and folders, or one of them.
        channels: see `ImageDataset`.
        given: {name in the item: a column, or the suffix of texts beside the images}, such as `{"prompt": "text"}` or
            `{"prompt": ".txt"}`.
        size: see `ImageDataset`.
        corrupt: see `ImageDataset`.

    Raises:
        ValueError: a path is neither an image nor a folder that holds some, or an image lacks what is given with it.

    Attributes:
        described: all columns of the metadata, `{name: [n]}`, None where an image has no value.
    """

    def __init__(
        self,
        paths: Paths,
        channels: int = 3,
        *,
        given: Mapping[str, str] | None = None,
        size: int | None = None,
        corrupt: Corrupt = "raise",
    ) -> None:
        check_channels(channels)
        texts = {origin for name, origin in (given or {}).items() if name in CAPTIONS}.union(CAPTIONS)
        opened = suffixes()
        files: list[Path] = []
        columns: dict[str, list[Any]] = {}
        for path in map(Path, listed(paths, "ImageFiles got no paths")):
            if not path.exists():
                raise ValueError(f"there is no file or folder {path}.")
            found = sorted(_inside(path)) if path.is_dir() else [path]
            images = [file for file in found if file.suffix.lower() in opened]
            if not images:
                raise ValueError(f"{path} is no image and holds none; images end in .png, .jpg and what Pillow opens.")
            before = len(files)
            files += images
            for name, values in (columns_beside(path, images, texts) if path.is_dir() else {}).items():
                columns.setdefault(name, [None] * before).extend(values)
            for values in columns.values():
                values += [None] * (len(files) - len(values))
        self.described = columns
        self._files = [local(file) for file in files]
        self.source = ", ".join(listed(paths, ""))
        super().__init__(
            self.source,
            ids=[str(file) for file in files],
            columns={"folder": [file.parent.name for file in files]} | _whole(self.source, files, columns),
            given={name: self.told(origin) for name, origin in (given or {}).items()},
            channels=channels,
            size=size,
            corrupt=corrupt,
        )

    def files(self) -> list[str]:
        """See `ImageDataset.files`."""
        return self._files

    def told(self, origin: str) -> list[Any]:
        """What a column, or texts beside the images by their suffix, such as ".txt", say of each, `[n]`.

        Raises:
            ValueError: there is no such column, or an image lacks its value; names it.
        """
        beside = origin.startswith(".")
        if not beside and origin not in self.described:
            known = ", ".join(self.described) or "none"
            raise ValueError(
                f"{self.source} has no column {origin!r} in its metadata.jsonl, .csv or .parquet: {known}."
            )
        values = texts_beside(origin, list(map(Path, self._files))) if beside else self.described[origin]
        if None in values:
            file = Path(self._files[values.index(None)])
            where = f"no file {file.stem}{origin} beside it" if beside else f"no {origin!r} in the metadata"
            raise ValueError(
                f"{values.count(None)} of {len(values)} images of {self.source} are told nothing, such as {file.name}, "
                f"which has {where}; write it, an empty one where it was trained so."
            )
        return list(values)

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        return Path(self._files[row]).read_bytes()


def _whole(source: str, files: list[Path], columns: dict[str, list[Any]]) -> dict[str, Any]:
    """The columns that have a value for every file and can be kept; warns of the others, which none can filter by."""
    whole: dict[str, Any] = {}
    for name, values in columns.items():
        lacking = [file for file, value in zip(files, values, strict=True) if not isinstance(value, KINDS)]
        reason = "the folder's name is called so; rename it to filter or group by it" if name == "folder" else ""
        if lacking:
            reason = (
                f"{len(lacking)} of {len(files)} images have no text, number or boolean in it, such as {lacking[0]}; "
                "fill it in to filter or group by it"
            )
        try:
            kept = {} if reason else check_columns({name: values}, len(files))
        except ValueError as error:
            kept, reason = {}, str(error).removesuffix(".")
        whole |= kept
        if reason:
            logger.warning("%s: the metadata's column %r is left out, as %s.", source, name, reason)
    return whole


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder and those below, links to folders followed, but for hidden ones.

    Each has one path: that without links, where there is one, so that no link that is added renames it.
    """
    seen = set()
    ahead = [str(folder)]
    while ahead:
        links: list[str] = []
        for start in sorted(ahead):
            for place, folders, files in os.walk(start):
                if (real := os.path.realpath(place)) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = [name for name in folders if not name.startswith((".", "__"))]
                links += filter(os.path.islink, (os.path.join(place, name) for name in folders))
                yield from (Path(place, name) for name in files if not name.startswith("."))
        ahead = links
