"""Scores in, metrics with intervals and ceilings out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.evaluate.intervals import Interval
from retrac_scale.evaluate.judging.base import Draws, Figure, Truth, truth

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64

Scores = str | os.PathLike[str] | npt.ArrayLike | Mapping[str, npt.ArrayLike]


@dataclass(frozen=True)
class Judgement:
    """What `judge` found; prints as a table.

    Attributes:
        truth: its name.
        said: what the truth holds.
        figures: each metric on each kind of query.
        notes: what looks wrong with the scores.
    """

    truth: str
    said: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, wanted: tuple[str, str]) -> Figure:
        """The figure of a metric on a kind of query: `judged["LDS", "held out"]`.

        Raises:
            KeyError: there is none; names those that there are.
        """
        for figure in self.figures:
            if (figure.metric, figure.queries) == wanted:
                return figure
        known = "; ".join(f"{figure.metric}, {figure.queries}" for figure in self.figures)
        raise KeyError(f"no figure {wanted!r}; there are: {known}.")

    def __str__(self) -> str:
        lines = [("queries", "count", "metric", "value", "ceiling")]
        lines += [
            (one.queries, str(one.count), one.metric, f"{one.value:.3f}", _ceiling(one.ceiling)) for one in self.figures
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([f"{self.truth}: {self.said}", *table, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists, dicts and numbers."""
        return asdict(self)


def judge(scores: Scores, truth: str | Truth, *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Judgement:
    """How right a method's scores are: metrics with intervals and ceilings, in seconds, whatever computed the scores.

    >>> judge(np.random.default_rng(0).normal(size=(192, 512)), "digits8-lds", draws=50).figures[0].metric
    'LDS'

    Args:
        scores: `[q, n]`, one row per query in the truth's order, one column per training sample, larger where the
            sample is more responsible for the query (a proponent: training on it lowers the query's loss). Or the path
            of such an array in a .npy file, or {kind of query: `[q, n]`}, which may hold more kinds than are asked.
        truth: a name (`evaluate.truths()` lists them) or a `Truth`.
        draws: resamples of the bootstrap.
        level: of the intervals.
        seed: of the resamples.

    Raises:
        ValueError: there is no such truth, or the scores are of another shape, not numbers, or NaN or infinite.
        FileNotFoundError: there is no such file.
    """
    known = _named(truth)
    values = _checked(scores, known)
    figures = tuple(known.figures(values, Draws(draws, level, seed)))
    return Judgement(known.name, known.sentence, figures, tuple(_notes(values, known, figures)))


def _named(given: str | Truth) -> Truth:
    return given if isinstance(given, Truth) else truth(given)


def _checked(scores: Scores, known: Truth) -> Float64:
    """Float64 `[q, n]`, finite, in the truth's order."""
    if isinstance(scores, Mapping):
        missing = [kind for kind in known.kinds if kind not in scores]
        if missing:
            raise ValueError(
                f"{known.name} asks for scores of {', '.join(map(repr, known.kinds))}; {missing[0]!r} is missing."
            )
        parts = [
            _numbers(scores[kind], (count, known.samples), f"{known.name}, {kind}")
            for kind, count in known.kinds.items()
        ]
        return np.concatenate(parts)
    if isinstance(scores, str | os.PathLike):
        scores = _read(Path(scores))
    return _numbers(
        scores, known.shape, f"{known.name} ({', '.join(f'{c} {kind}' for kind, c in known.kinds.items())})"
    )


def _read(file: Path) -> npt.NDArray[Any]:
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}; give a .npy file with scores [queries, samples].")
    try:
        loaded = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is no array of numbers in a .npy file: {error}") from None
    if not isinstance(loaded, np.ndarray):
        raise ValueError(f"{file} holds several arrays; save the scores alone with numpy.save.")
    return loaded


def _numbers(given: npt.ArrayLike, shape: tuple[int, int], where: str) -> Float64:
    array = np.asarray(given)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"scores of {where} are {array.dtype}, expected real numbers.")
    if array.shape == shape[::-1] and array.shape != shape:
        raise ValueError(f"scores of {where} are {array.shape}, expected {shape}: transposed? Give scores.T.")
    if array.shape != shape:
        raise ValueError(
            f"scores of {where} are {array.shape}, expected {shape}: a row for each query, a column for each training "
            "sample."
        )
    values = array.astype(np.float64)
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"scores of {where} hold {len(wrong)} NaN or inf, first for query {row}, sample {column}; a sample "
            "without a score cannot be judged."
        )
    return values


def _notes(values: Float64, known: Truth, figures: tuple[Figure, ...]) -> list[str]:
    notes = []
    flat = int((np.ptp(values, axis=1) == 0).sum())
    if flat:
        notes.append(f"{flat} of {len(values)} queries have the same score for every sample.")
    below = [one.queries for one in figures if one.metric == "LDS" and one.value.high < 0]
    if below:
        notes.append(f"LDS is below zero ({', '.join(below)}): is the sign turned? Proponents have the largest scores.")
    return notes


def _ceiling(ceiling: Interval | None) -> str:
    if ceiling is None:
        return ""
    return f"{ceiling.value:.3f}" if ceiling.low == ceiling.high else f"{ceiling:.3f}"
