"""WebDataset tar shards: the files of a sample share the name before the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from retrac_scale.datasets.base import SUFFIXES, Corrupt, ImageDataset, Paths, listed, local


class _Place(NamedTuple):
    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.shard} ends after {len(content)} of {self.size} bytes")
        return content


class TarShards(ImageDataset):
    """Uncompressed tar files as the WebDataset format has them, read at any row; ids are the samples' names.

    Args:
        shards: paths of tar files, or of one.
        image: the extension of the images, where samples have several; None takes the one that each has.
        columns: {column: where from}, of each sample: the extension of a file ("cls", "txt"), or "json.name" for an
            entry of its JSON file.
        given: {name in the item: where from}, likewise.
        channels: see `ImageDataset`.
        size: see `ImageDataset`.
        corrupt: see `ImageDataset`.

    Raises:
        ValueError: a shard is no plain tar file, a sample lacks a file that was asked for, a name stands twice.
    """

    def __init__(
        self,
        shards: Paths,
        *,
        image: str | None = None,
        columns: Mapping[str, str] | None = None,
        given: Mapping[str, str] | None = None,
        channels: int = 3,
        size: int | None = None,
        corrupt: Corrupt = "raise",
    ) -> None:
        places = listed(shards, "TarShards got no shards")
        samples: list[tuple[str, dict[str, _Place]]] = []
        for shard in places:
            samples += _samples(shard)
        source = ", ".join(places)
        self._images = []
        for name, files in samples:
            found = [extension for extension in files if f".{extension}" in SUFFIXES and image in (None, extension)]
            if len(found) > 1:
                raise ValueError(f"sample {name!r} of {source} has images {', '.join(found)}; say which, image=.")
            if not found:
                raise ValueError(
                    f"sample {name!r} of {source} has no image{f' .{image}' if image else ''}, only {sorted(files)}."
                )
            self._images.append(files[found[0]])
        super().__init__(
            source,
            ids=[name for name, _ in samples],
            columns={column: [_field(*sample, origin) for sample in samples] for column, origin in _items(columns)},
            given={column: [_field(*sample, origin) for sample in samples] for column, origin in _items(given)},
            channels=channels,
            size=size,
            corrupt=corrupt,
        )

    def files(self) -> list[str]:
        """See `ImageDataset.files`: a shard stands for all that it holds."""
        return [place.shard for place in self._images]

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        return self._images[row].read()


def _items(origins: Mapping[str, str] | None) -> list[tuple[str, str]]:
    return list((origins or {}).items())


def _samples(shard: str) -> list[tuple[str, dict[str, _Place]]]:
    """The samples of a shard, in its order: name and the places of its files by extension."""
    found: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, dot, extension = file.partition(".")
                if member.isfile() and dot and stem:
                    name = f"{folder}/{stem}" if folder else stem
                    files = found.setdefault(name, {})
                    if extension.lower() in files:
                        raise ValueError(f"{shard} holds {member.name} twice; give every sample a name of its own.")
                    files[extension.lower()] = _Place(local(shard), member.offset_data, member.size)
    except tarfile.ReadError as error:
        raise ValueError(f"{shard} is no whole uncompressed tar file: {error}; unpack .tar.gz first.") from error
    return list(found.items())


def _field(name: str, files: Mapping[str, _Place], origin: str) -> Any:
    """The value of a file of a sample, by its extension, or of an entry of its JSON file."""
    extension, _, entry = origin.partition(".") if origin.startswith("json.") else (origin, "", "")
    if extension not in files:
        raise ValueError(f"sample {name!r} has no file .{extension}, only {sorted(files)}.")
    content = files[extension].read().decode()
    if entry:
        values = json.loads(content)
        if entry not in values:
            raise ValueError(f"the JSON file of sample {name!r} has no entry {entry!r}, only {sorted(values)}.")
        return values[entry]
    return int(content) if extension == "cls" else content.strip()
