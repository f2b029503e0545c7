"""A ground truth: what is asked of the scores of one setting's queries, read from and written to one file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from retrac_scale.evaluate.intervals import Interval

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64

FOLDER = Path(__file__).parent.parent / "truths"
FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """One metric on one kind of query.

    Attributes:
        queries: their kind, such as "held out".
        count: how many of them were judged.
        metric: its name.
        value: with an interval.
        ceiling: what can be reached; None where that is 1.
    """

    queries: str
    count: int
    metric: str
    value: Interval
    ceiling: Interval | None = None


@dataclass(frozen=True)
class Draws:
    """How intervals are made: resamples, level and seed of a bootstrap."""

    count: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.level < 1:
            raise ValueError(
                f"intervals need at least 1 resample and a level between 0 and 1, got draws={self.count} and "
                f"level={self.level}."
            )


@dataclass(frozen=True, eq=False)
class Truth:
    """What is asked of scores: one of `Subsets`, `Groups` and `Wanted`, which say how.

    Attributes:
        name: such as "emoji16-lds"; what stands before the hyphen is the setting.
        kinds: {kind of query: how many}; rows of scores stand in this order.
        samples: n, how many training samples each row has a score for.
        about: the protocol: seeds, digests of data, model and code, versions, hours.
    """

    name: str
    kinds: Mapping[str, int]
    samples: int
    about: Mapping[str, Any]

    what: ClassVar[str]
    registered: ClassVar[dict[str, type[Truth]]] = {}

    def __init_subclass__(cls) -> None:
        cls.registered[cls.what] = cls

    @property
    def setting(self) -> str:
        """The name of its setting, for `evaluate.setting`."""
        return self.name.split("-")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of scores, (q, n)."""
        return sum(self.kinds.values()), self.samples

    @property
    def rows(self) -> dict[str, slice]:
        """Where the queries of each kind stand."""
        ends = np.cumsum([0, *self.kinds.values()]).tolist()
        return {kind: slice(a, b) for kind, a, b in zip(self.kinds, ends[:-1], ends[1:], strict=True)}

    def some(self, kinds: Sequence[str]) -> Self:
        """The same, asked about queries of some kinds alone: for a method that has no scores for the others."""
        rows = np.concatenate([np.arange(self.shape[0])[self.rows[kind]] for kind in kinds])
        return replace(self, kinds={kind: self.kinds[kind] for kind in kinds}, **self._of_queries(rows))

    def figures(self, scores: Float64, draws: Draws) -> Iterator[Figure]:
        """All metrics of scores `[q, n]`, finite and of this truth's shape."""
        raise NotImplementedError

    @property
    def sentence(self) -> str:
        """What the truth holds, in a few words."""
        raise NotImplementedError

    def _of_queries(self, rows: Any) -> dict[str, Any]:
        """What its kind adds, of some queries by number."""
        raise NotImplementedError

    def _arrays(self) -> dict[str, Any]:
        """What its kind adds, as arrays for a file."""
        raise NotImplementedError

    @classmethod
    def _of(cls, common: dict[str, Any], arrays: Mapping[str, Any]) -> Truth:
        """From the arrays of a file."""
        raise NotImplementedError


def write_truth(truth: Truth, folder: Path = FOLDER) -> Path:
    """Write a truth into `folder/NAME.npz`, the same bytes for the same content."""
    file = folder / f"{truth.name}.npz"
    head = {
        "format": FORMAT,
        "what": truth.what,
        "kinds": dict(truth.kinds),
        "samples": truth.samples,
        "about": dict(truth.about),
    }
    np.savez_compressed(file, head=np.array(json.dumps(head)), **truth._arrays())
    return file


def truths(folder: Path = FOLDER) -> list[str]:
    """Names of the truths that `judge` knows."""
    return sorted(file.stem for file in folder.glob("*.npz"))


def truth(name: str, folder: Path = FOLDER) -> Truth:
    """A truth by its name.

    Raises:
        ValueError: there is no such truth; names those that there are.
    """
    known = truths(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no truth {name!r}; {meant}There are: {', '.join(known) or 'none'}.")
    with np.load(folder / f"{name}.npz") as file:
        arrays = dict(file)
    head = json.loads(str(arrays.pop("head")))
    if head["format"] != FORMAT:
        raise ValueError(f"{name} has format {head['format']}, this version reads {FORMAT}; update the package.")
    common = {"name": name, **{key: head[key] for key in ("kinds", "samples", "about")}}
    return Truth.registered[head["what"]]._of(common, arrays)
