"""The record of a training run on disk.

A folder holds a log, one JSON object per line, and for every run and process a file of rows, one for each sample that
an optimizer step was made of. Both are only ever appended to. A run that continues an earlier one begins after a step
of it; what the earlier one recorded past that step then counts no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.void]

ROW = np.dtype(
    [
        ("step", "<i8"),  # optimizer steps are counted from 1
        ("sample", "<i8"),  # place in the training set
        ("noise_seed", "<i8"),
        ("lr", "<f8"),
        ("timestep", "<i4"),
        ("epoch", "<i4"),
        ("process", "<i4"),
        ("rows", "<i4"),  # of this process in this step
    ]
)
NO_SEED = -1
LOG, IDS = "log.jsonl", "ids.npy"


@dataclass(frozen=True)
class Run:
    """One start of the training: it made the steps `after` + 1 .. `until` that still count, None: its last."""

    number: int
    after: int
    processes: int
    until: int | None = None


@dataclass(frozen=True)
class TrainingRecord:
    """What a `TrainingRecorder` wrote.

    Attributes:
        path: its folder.
        n_samples: size of the training set.
        runs: in order.
        checkpoints: name -> optimizer steps made before it, in that order.
    """

    path: Path
    n_samples: int
    runs: list[Run]
    checkpoints: dict[str, int]

    @property
    def ids(self) -> npt.NDArray[Any] | None:
        """Sample ids `[n]` when the training set has ids of its own, None when they are 0 .. n-1."""
        file = self.path / IDS
        return np.load(file, allow_pickle=False) if file.exists() else None

    @property
    def begun(self) -> int:
        """Optimizer steps made before the recording began; 0 unless a training in progress was joined."""
        return min(run.after for run in self.runs if run.until is None or run.until > run.after)

    def before(self, checkpoint: str) -> tuple[int, int]:
        """The steps (a, b] from the previous checkpoint to this one.

        Raises:
            ValueError: there is no such checkpoint.
        """
        if checkpoint not in self.checkpoints:
            raise ValueError(
                f"no training record for checkpoint {checkpoint!r} in {self.path} (it has "
                f"{sorted(self.checkpoints) or 'none'}); name the checkpoints as in TrainingRecorder.checkpoint(name), "
                "or use EvenlySpaced(count)."
            )
        until = self.checkpoints[checkpoint]
        return max((step for step in self.checkpoints.values() if step < until), default=self.begun), until

    def rows(self, after: int, until: int) -> Rows:
        """The rows of the steps `after` + 1 .. `until`, by step and process.

        Raises:
            ValueError: a process has not recorded all of them; says which steps are missing.
        """
        rows = np.concatenate([np.empty(0, ROW), *self._pieces(after, until)])
        return rows[np.lexsort((rows["process"], rows["step"]))]  # stable: within a step in the order of training

    def _pieces(self, after: int, until: int) -> Iterator[Rows]:
        done = after
        for run in self.runs:
            first, last = max(after, run.after), until if run.until is None else min(until, run.until)
            if first >= last:
                continue
            for process in range(run.processes):
                file = rows_file(self.path, run.number, process)
                size = file.stat().st_size // ROW.itemsize if file.exists() else 0
                rows = np.memmap(file, ROW, "r", shape=(size,)) if size else np.empty(0, ROW)
                low, high = np.searchsorted(rows["step"], [first, last], side="right")
                piece = rows[low:high]
                self._check(piece, first, last, run.processes, process)
                yield piece
            done = last
        if done < until:
            raise ValueError(f"{self.path} records steps up to {done}, not up to {until}.")

    def _check(self, rows: Rows, first: int, last: int, processes: int, process: int) -> None:
        steps, starts, counts = np.unique(rows["step"], return_index=True, return_counts=True)
        whole = steps[counts == rows["rows"][starts]]
        missing = np.setdiff1d(np.arange(first + 1, last + 1), whole, assume_unique=True)
        if len(missing):
            raise ValueError(
                f"the training record in {self.path} is incomplete: process {process} of {processes} lacks "
                f"{len(missing)} of the steps {first + 1} .. {last}, the first of them {missing[0]}; "
                "was one of the processes' files lost?"
            )


class SampleRows:
    """Where samples stand in the training set, by their ids.

    Args:
        n_samples: size of the training set.
        ids: its sample ids `[n]`; None when they are 0 .. n-1.
    """

    def __init__(self, n_samples: int, ids: npt.NDArray[Any] | None) -> None:
        self.n_samples = n_samples
        self._places = None if ids is None else {sample: row for row, sample in enumerate(ids.tolist())}

    def rows(self, ids: Any) -> npt.NDArray[np.int64]:
        """Places `[m]` of samples.

        Raises:
            ValueError: an id is not in the training set.
        """
        given = np.asarray(ids)
        if self._places is not None:
            unknown = [sample for sample in given.tolist() if sample not in self._places]
            if unknown:
                raise ValueError(f"sample id {unknown[0]!r} is none of the recorded training set's ids.")
            return np.array([self._places[sample] for sample in given.tolist()], dtype=np.int64)
        if given.dtype.kind not in "iu":
            raise ValueError(
                f"recorded sample ids are the integers 0 .. {self.n_samples - 1}, got dtype {given.dtype}; "
                "give the recorder the dataset in place of its size if it has ids of its own."
            )
        bad = (given < 0) | (given >= self.n_samples)
        if bad.any():
            raise ValueError(
                f"sample id {given[bad][0]} is outside the recorded training set 0 .. {self.n_samples - 1}."
            )
        return given.astype(np.int64)


def rows_file(path: Path, run: int, process: int) -> Path:
    """Where the rows of a process in a run stand."""
    return path / f"run-{run:04d}-process-{process:04d}.rows"


def write_whole(file: int, content: bytes) -> None:
    """Append all of it to an open file, or nothing: straight to the system, so that it outlives this process."""
    before = os.fstat(file).st_size
    rest = memoryview(content)
    try:
        while rest:  # the system may take a part only, as of a disk that is nearly full
            rest = rest[os.write(file, rest) :]
    except BaseException:
        os.ftruncate(file, before)
        raise


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add one line to the log, in place of one that was cut off in writing, and force it to the disk."""
    with open(path / LOG, "a+b") as log:
        log.seek(0)
        log.truncate(log.read().rfind(b"\n") + 1)
        log.write(json.dumps(entry).encode() + b"\n")
        log.flush()
        os.fsync(log.fileno())


def read_record(path: str | os.PathLike[str]) -> TrainingRecord | None:
    """The record in a folder, None when there is none.

    Raises:
        ValueError: the log is damaged.
    """
    folder = Path(path)
    if not (folder / LOG).exists():
        return None
    runs: list[Run] = []
    checkpoints: dict[str, int] = {}
    n_samples = 0
    for number, line in enumerate((folder / LOG).read_bytes().split(b"\n")[:-1], 1):  # a cut-off line has no end
        try:
            entry = json.loads(line)
            if "run" in entry:
                after, n_samples = entry["after"], entry["n_samples"]
                runs = [replace(run, until=after if run.until is None else min(run.until, after)) for run in runs]
                runs.append(Run(entry["run"], after, entry["processes"]))
                checkpoints = {name: step for name, step in checkpoints.items() if step <= after}
            else:
                checkpoints[entry["checkpoint"]] = entry["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {folder / LOG} is damaged: {error!r}.") from error
    return TrainingRecord(folder, n_samples, runs, checkpoints) if runs else None
