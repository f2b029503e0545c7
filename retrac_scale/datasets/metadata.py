"""What folders say of their images in metadata.jsonl, metadata.csv or metadata.parquet, as `imagefolder` has it."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NAME = "file_name"
KINDS = (str, bool, int, float)
CAPTIONS = ("prompt", "text", "caption")
"""Columns of what a model is told: texts, also where all of a CSV file are numbers."""
INTEGER = r"^-?(0|[1-9][0-9]*)$"
NUMBER = r"^-?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|inf|Infinity)$"
"""Not those that begin with zeros, 007, which are names."""


class _Described(NamedTuple):
    file: Path
    row_of: dict[str, dict[str, Any]]


def columns_beside(folder: Path, files: Sequence[Path], texts: Collection[str] = CAPTIONS) -> dict[str, list[Any]]:
    """`{column: [n]}` of the files in a folder, None where a file has no value.

    An image may be described in its own folder, or in one between it and the given one.

    Args:
        folder: that they are in, or in folders below it.
        files: of images.
        texts: columns that stay as they stand in a CSV file, be they numbers.

    Raises:
        ValueError: a description cannot be read, says nothing of a file beside or below it, or a file has two rows;
            names it.
    """
    described = cache(partial(_described, texts=texts))
    known: dict[str, list[tuple[_Described, str]]] = {}
    found = []
    for file in files:
        place, name = os.path.split(file)
        if place not in known:
            up = [Path(place), *Path(place).parents][: len(Path(place).relative_to(folder).parts) + 1]
            known[place] = [(one, _way(one, place)) for above in up for one in described(above)]
        found.append(_row(name, known[place]))
    names = dict.fromkeys(name for row in found for name in row if name != NAME)
    return {name: [row.get(name) for row in found] for name in names}


def _described(place: Path, texts: Collection[str]) -> list[_Described]:
    """What the metadata in a folder says, by the normal paths of images below it; none where there is none."""
    file = next((place / name for name in FILES if (place / name).is_file()), None)
    if file is None:
        return []
    try:
        rows = _rows(file, texts)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if any(NAME not in row for row in rows):
        raise ValueError(f"{file} has a row without {NAME!r}, the path of its image below {place}.")
    row_of: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = posixpath.normpath(str(row[NAME]))
        if row_of.setdefault(name, row) is not row:
            raise ValueError(f"{file} has two rows for {name}; leave the one that holds.")
    return [_Described(file, row_of)]


def _way(described: _Described, place: str) -> str:
    """From where a description lies to a folder, as its rows begin for the images there."""
    below = Path(place).relative_to(described.file.parent).as_posix()
    return "" if below == "." else f"{below}/"


def _row(name: str, told: list[tuple[_Described, str]]) -> dict[str, Any]:
    """What is said of an image in one of some descriptions, each with the way from it to the image; nothing without."""
    found = [(one.file, row) for one, way in told if (row := one.row_of.get(way + name)) is not None]
    if len(found) > 1:
        raise ValueError(f"{found[0][0]} and {found[1][0]} both have a row for {name}; leave it in one of them.")
    if told and not found:
        nearest, way = told[0]
        raise ValueError(f"{nearest.file} says nothing of {way}{name}; add a row for it, or take the image away.")
    return found[0][1] if found else {}


def texts_beside(suffix: str, files: Sequence[Path]) -> list[str | None]:
    """The line in the file beside each image, `[n]`, of the same name but for its suffix, as kohya's trainers have it.

    None where there is none; where it is empty, the empty text.

    Raises:
        ValueError: a file is no text, or has several lines, of which trainers make different things; names it.
    """
    found: list[str | None] = []
    for file in files:
        beside = file.with_suffix(suffix)
        try:
            text = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside} is no text in UTF-8: {error}; save it as such.") from None
        if text is not None and "\n" in text:  # where other signs break lines, they are the caption's own
            raise ValueError(f"{beside} has {len(text.splitlines())} lines; leave the one that the model was told.")
        found.append(text)
    return found


def _rows(file: Path, texts: Collection[str]) -> list[dict[str, Any]]:
    if file.suffix == ".csv":
        return _csv(file, texts)
    if file.suffix == ".jsonl":
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # no other sign ends a line
        rows = [json.loads(line) for line in lines if line.strip()]
    else:
        from pyarrow import parquet

        rows = parquet.read_table(file).to_pylist()
    odd = next((row for row in rows if not isinstance(row, dict)), None)
    if odd is not None:
        raise ValueError(f"a row is {odd!r:.60}, no object with {NAME!r} and more.")
    return rows


def _csv(file: Path, texts: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a CSV file, whose columns are numbers or texts, to the character."""
    import pyarrow as pa
    from pyarrow import csv

    parsing = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(file, parse_options=parsing) as begun:
        names = begun.schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"it has two columns {twice!r}; name them differently.")
    as_they_stand = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    table = csv.read_csv(file, parse_options=parsing, convert_options=as_they_stand)
    columns = [table[name].to_pylist() if name in (NAME, *texts) else _numbers(table[name]) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _numbers(column: Any) -> list[Any]:
    """A column of a CSV file as integers or floats, None where it says nothing; as it is where some are neither."""
    import pyarrow as pa
    from pyarrow import compute as pc
    from pyarrow.csv import ConvertOptions

    cells = pc.utf8_trim_whitespace(column)
    none = pc.is_in(cells, pa.array(ConvertOptions().null_values))  # as pandas has them too: "", "NA", "nan", ...
    told = cells.filter(pc.invert(none))
    if not len(told) or not pc.all(pc.match_substring_regex(told, NUMBER)).as_py():
        return list(column.to_pylist())
    kind = int if pc.all(pc.match_substring_regex(told, INTEGER)).as_py() else float
    return [None if cell is None else kind(cell) for cell in pc.if_else(none, None, cells).to_pylist()]
