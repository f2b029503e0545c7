"""WebDataset tar shards: the files of a sample share the name before the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from retrac_scale.datasets.base import SUFFIXES, Corrupt, ImageDataset, Paths, listed, local, suffixes

MOST_ZEROS = 2**20
"""Bytes looked at behind the last file; archives are filled up to some 10,000."""


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
        image: the extension of the images, such as "jpg" or "left.png", where samples have several; None takes the one
            that each has.
        columns: {column: where from}, of each sample: the extension of a file ("cls", "txt"), or "json.name" for an
            entry of its JSON file.
        given: {name in the item: where from}, likewise.
        channels: see `ImageDataset`.
        size: see `ImageDataset`.
        corrupt: see `ImageDataset`.

    Raises:
        ValueError: a shard is no plain tar file or is cut, a sample lacks a file that was asked for or has one that
            cannot be read, a name stands twice; names it.
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
        self._images, opened = [], suffixes()
        for name, files in samples:
            found = _images(files, image, opened)
            if len(found) > 1:
                raise ValueError(f"sample {name!r} of {source} has images {', '.join(found)}; say which, image=.")
            if not found:
                asked = f" .{image.removeprefix('.')}" if image else ""
                raise ValueError(f"sample {name!r} of {source} has no image{asked}, only {sorted(files)}.")
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


def _images(files: Mapping[str, _Place], image: str | None, opened: tuple[str, ...]) -> list[str]:
    """The extensions of a sample's images: that which was asked for, else usual ones, else those that Pillow opens."""
    if image is not None:
        return [extension for extension in files if extension == image.lower().removeprefix(".")]
    usual = [extension for extension in files if f".{extension}" in SUFFIXES]
    return usual or [extension for extension in files if f".{extension}".endswith(opened)]


def _samples(shard: str) -> list[tuple[str, dict[str, _Place]]]:
    """The samples of a shard, in its order: name and the places of its files by extension."""
    found: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name, extension = _parts(member.name)
                if not extension or not (member.isfile() or member.islnk() or member.issym()):
                    continue
                files = found.setdefault(name, {})
                if extension in files:
                    raise ValueError(f"{shard} holds {member.name} twice; give every sample a name of its own.")
                if member.isfile():
                    files[extension] = _Place(local(shard), member.offset_data, member.size)
                else:
                    files[extension] = _linked(shard, member, found)
            _check_end(shard, tar.offset)
    except tarfile.ReadError as error:
        raise ValueError(f"{shard} is no whole uncompressed tar file: {error}; unpack .tar.gz first.") from error
    return list(found.items())


def _parts(path: str) -> tuple[str, str]:
    """The sample that a file belongs to and its extension, empty where it belongs to none."""
    folder, _, file = path.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower() if stem else ""


def _linked(shard: str, member: tarfile.TarInfo, found: Mapping[str, Mapping[str, _Place]]) -> _Place:
    """The place of the file that a hard link stands for, which comes before it."""
    name, extension = _parts(member.linkname)
    if member.issym() or extension not in found.get(name, {}):
        raise ValueError(f"{shard} holds {member.name} as a link to {member.linkname}; pack the file itself.")
    return found[name][extension]


def _check_end(shard: str, offset: int) -> None:
    """ValueError unless a shard ends where reading did, as tar files do: in two blocks of zeros, or more of them."""
    with open(shard, "rb") as file:
        file.seek(offset)
        rest = file.read(MOST_ZEROS)
    if len(rest) < 2 * tarfile.BLOCKSIZE or any(rest):
        raise ValueError(
            f"{shard} is cut or damaged at byte {offset}, where there is neither a file nor the end of the archive, "
            "two blocks of zeros; copy or pack it again."
        )


def _field(name: str, files: Mapping[str, _Place], origin: str) -> Any:
    """The value of a file of a sample, by its extension, or of an entry of its JSON file."""
    extension, _, entry = origin.partition(".") if origin.startswith("json.") else (origin.lower(), "", "")
    if extension not in files:
        raise ValueError(f"sample {name!r} has no file .{extension}, only {sorted(files)}.")
    try:
        content = files[extension].read().decode()
        values = json.loads(content) if entry else int(content) if extension == "cls" else content.strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"file .{extension} of sample {name!r} cannot be read: {error}.") from error
    if not entry:
        return values
    if not isinstance(values, dict) or entry not in values:
        known = sorted(values) if isinstance(values, dict) else f"{values!r:.60}"
        raise ValueError(f"the JSON file of sample {name!r} has no entry {entry!r}, only {known}.")
    return values[entry]
