"""Parquet files with encoded images in a column."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from retrac_scale.datasets.base import Columns, Corrupt, ImageDataset, Paths, listed, local, origins


class Parquet(ImageDataset):
    """Rows of Parquet files, in the files' order; the row group of the last image read is kept in memory.

    Args:
        paths: of the files, or of one.
        image: the column of images: bytes, or a struct with "bytes" or "path" as Hugging Face writes them.
        id: the column of unique ids; None numbers the rows.
        columns: those that go into the store, or {name there: column}.
        given: {name in the item: column}.
        channels: see `ImageDataset`.
        size: see `ImageDataset`.
        corrupt: see `ImageDataset`.

    Raises:
        ValueError: a file is no Parquet file or lacks a column.
    """

    def __init__(
        self,
        paths: Paths,
        image: str = "image",
        *,
        id: str | None = None,
        columns: Columns = (),
        given: Mapping[str, str] | None = None,
        channels: int = 3,
        size: int | None = None,
        corrupt: Corrupt = "raise",
    ) -> None:
        places, kept = listed(paths, "Parquet got no files"), origins(columns)
        self._column, self._folder = image, os.getcwd()
        self._groups: list[tuple[str, int]] = []
        sizes: list[int] = []
        names = list(dict.fromkeys([*([id] if id else []), *kept.values(), *(given or {}).values()]))
        rest: dict[str, list[Any]] = {name: [] for name in names}
        for path in map(local, places):
            try:
                file = pq.ParquetFile(path)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is no whole Parquet file: {error}.") from error
            missing = [name for name in (image, *names) if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}; it has {file.schema_arrow.names}.")
            groups = range(file.num_row_groups)
            self._groups += [(path, group) for group in groups]
            sizes += [file.metadata.row_group(group).num_rows for group in groups]
            table = file.read(columns=names)
            for name, values in rest.items():  # whose type may be another in each file
                values += table[name].to_pylist()
        self._ends = list(accumulate(sizes))
        self._held: tuple[int, Any] = (-1, None)
        super().__init__(
            ", ".join(places),
            ids=None if id is None else rest[id],
            columns={name: rest[column] for name, column in kept.items()},
            given={name: rest[column] for name, column in (given or {}).items()},
            channels=channels,
            size=size,
            corrupt=corrupt,
            n=self._ends[-1] if self._ends else 0,
        )

    def raw(self, row: int) -> Any:
        """See `ImageDataset.raw`."""
        number = bisect_right(self._ends, row)
        held, images = self._held
        if held != number:
            path, group = self._groups[number]
            images = pq.ParquetFile(path).read_row_group(group, columns=[self._column])[self._column]
            self._held = number, images
        value = images[row - (self._ends[number] - len(images))].as_py()
        if not isinstance(value, Mapping) or value.get("bytes") is not None or value.get("path") is None:
            return value["bytes"] if isinstance(value, Mapping) else value
        with fsspec.open(local(value["path"], self._folder)) as file:
            return file.read()
