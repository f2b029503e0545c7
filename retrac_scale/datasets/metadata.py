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
    """`{column: [n]}` of the files in a folder; those alone that have one text, number or boolean for every file.

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
    names = [name for name in (found[0] if found else {}) if name != NAME]
    values = {name: [row.get(name) for row in found] for name in names}
    return {name: own for name, own in values.items() if all(isinstance(value, KINDS) for value in own)}


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    from pyarrow import csv, parquet

    table = csv.read_csv(file) if file.suffix == ".csv" else parquet.read_table(file)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
