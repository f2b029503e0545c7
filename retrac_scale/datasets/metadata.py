"""What a folder of images says of them in metadata.jsonl, metadata.csv or metadata.parquet, as `imagefolder` has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NAME = "file_name"
KINDS = (str, bool, int, float)


def columns_beside(folder: Path, files: Sequence[Path]) -> dict[str, list[Any]]:
    """`{column: [n]}` of the files in a folder, None where a file has no value.

    Raises:
        ValueError: the description cannot be read, or says nothing of a file; names it.
    """
    described = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if described is None:
        return {}
    try:
        rows = _rows(described)
    except (OSError, ValueError) as error:
        raise ValueError(f"{described} cannot be read: {error}") from error
    if any(NAME not in row for row in rows):
        raise ValueError(f"{described} has a row without {NAME!r}, the path of its image below {folder}.")
    row_of = {str(row[NAME]): row for row in rows}
    found = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        if name not in row_of:
            raise ValueError(f"{described} says nothing of {name}; add a row for it, or take the image away.")
        found.append(row_of[name])
    names = dict.fromkeys(name for row in found for name in row if name != NAME)
    return {name: [row.get(name) for row in found] for name in names}


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
            lines = beside.read_text(encoding="utf-8").strip().splitlines() if beside.is_file() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{beside} is no text in UTF-8: {error}; save it as such.") from None
        if lines is not None and len(lines) > 1:
            raise ValueError(f"{beside} has {len(lines)} lines; leave the one that the model was told.")
        found.append(None if lines is None else "".join(lines))
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    from pyarrow import csv, parquet

    table = csv.read_csv(file) if file.suffix == ".csv" else parquet.read_table(file)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
