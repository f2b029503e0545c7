"""Sample ids and the user's columns: checked, and texts as codes of their sorted distinct values."""

from __future__ import annotations

import bisect
import itertools
import keyword
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

LOOKED_AT = 2**16
"""Entries of a column at a time, where its distinct values are few or do not count."""
RESERVED = ("id", "deleted", "parts")
"""Names at the root of a store that neither a column nor a checkpoint may take."""


@dataclass(frozen=True, eq=False)
class Texts:
    """A column of texts: the distinct ones in their order, of which one is found without reading the others.

    Attributes:
        text: the distinct texts in UTF-8, one after the other, uint8 `[b]`; their bytes sort as they do.
        ends: where each of them ends, int64 `[v]`.
        codes: which of them each sample has, int32 `[n]`.
        read: the distinct texts as arrays, once they have been; the column of some of the samples shares them.
    """

    text: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int32]
    read: dict[int | None, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(texts: npt.NDArray[Any]) -> Texts:
        """Those of an array of strings `[n]`."""
        every = texts.tolist()
        values = sorted(set(every))
        code_of = {value: code for code, value in enumerate(values)}
        codes = np.fromiter(map(code_of.__getitem__, every), np.int32, len(every))
        return Texts.coded([value.encode() for value in values], codes)

    @staticmethod
    def coded(values: Sequence[bytes], codes: npt.NDArray[Any]) -> Texts:
        """Those of sorted distinct texts in UTF-8 and codes."""
        ends = np.cumsum([len(value) for value in values], dtype=np.int64)
        return Texts(np.frombuffer(b"".join(values), np.uint8), ends, codes.astype(np.int32, copy=False))

    @property
    def count(self) -> int:
        """How many distinct texts there are."""
        return len(self.ends)

    @property
    def values(self) -> npt.NDArray[Any]:
        """The distinct texts, sorted, `[v]`."""
        return self._values(None)

    def encoded(self) -> Iterator[bytes]:
        """The distinct texts in UTF-8, in their order."""
        every = self.text.tobytes()
        return (every[start:stop] for start, stop in itertools.pairwise([0, *self.ends.tolist()]))

    def value(self, sample: int) -> str:
        """The text of one sample."""
        return self._encoded(int(self.codes[sample])).decode()

    def find(self, text: str) -> tuple[int, bool]:
        """How many of the distinct texts come before a text, and whether it is the next of them."""
        wanted = text.encode(errors="surrogatepass")
        place = bisect.bisect_left(range(self.count), wanted, key=self._encoded)
        return place, place < self.count and self._encoded(place) == wanted

    def some(self, samples: Any) -> Texts:
        """The column of some samples, chosen as an array is."""
        return replace(self, codes=self.codes[samples])

    def whole(self, beside: int | None = None) -> npt.NDArray[Any]:
        """The texts themselves, `[n]`; of few samples theirs alone are read.

        Args:
            beside: None, or what they are compared with has at most so many characters: then long ones are cut where
                no comparison can tell.
        """
        if self.read or self.count <= len(self.codes):
            return self._values(beside)[self.codes]
        codes, places = np.unique(self.codes, return_inverse=True)
        return _array([self._encoded(code).decode() for code in codes.tolist()], beside)[places]

    def _values(self, beside: int | None) -> npt.NDArray[Any]:
        if beside not in self.read:
            self.read[beside] = _array([text.decode() for text in self.encoded()], beside)
        return self.read[beside]

    def _encoded(self, code: int) -> bytes:
        return self.text[int(self.ends[code - 1]) if code else 0 : int(self.ends[code])].tobytes()


def _array(texts: list[str], beside: int | None) -> npt.NDArray[Any]:
    """Texts as `is_text` has them, or, cut as `Texts.whole` says, in one length, which NumPy compares faster."""
    if beside is None or "\0" in "".join(texts):  # in one length, zeros at the end are none
        return np.array(texts, object)
    return np.array([text[: beside + 1] for text in texts], str)


class Places:
    """Where each of some ids stands, without a table of all of them: they are searched where they ascend, or in order.

    Args:
        ids: distinct, `[n]`, int64 or str.
    """

    def __init__(self, ids: npt.NDArray[Any]) -> None:
        self.ids = ids
        self._order = None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")

    def find(self, wanted: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The places of ids `[m]`; -1 for those that are not there, be they of another type."""
        asked, ids = as_ids(np.asarray(wanted)), self.ids
        texts = ids.dtype.kind == "U"
        found = np.full(asked.shape, -1, np.int64)
        if not ids.size or not (asked.dtype.kind == "U" if texts else asked.dtype.kind in "iu"):
            return found
        # what no id can be is left out first: a longer text, a larger number would have all ids copied to its type
        fits = np.char.str_len(asked) <= ids.itemsize // 4 if texts else asked <= np.iinfo(np.int64).max
        some = asked[fits].astype(ids.dtype)
        place = np.minimum(np.searchsorted(ids, some, sorter=self._order), len(ids) - 1)
        if self._order is not None:
            place = self._order[place]
        found[fits] = np.where(ids[place] == some, place, -1)
        return found


Column = npt.NDArray[Any] | Texts


def joined(several: Sequence[Column]) -> Column:
    """Columns of one type, one after the other; no text takes up more room than it needs."""
    if len(several) == 1:
        return several[0]
    texts = [column for column in several if isinstance(column, Texts)]
    if not texts:
        return np.concatenate([np.asarray(column) for column in several])
    every = [text for column in texts for text in column.encoded()]
    order = sorted(range(len(every)), key=every.__getitem__)  # of runs that are sorted already
    is_new = [True, *(every[a] != every[b] for a, b in itertools.pairwise(order))]
    rank = np.empty(len(every), np.int32)
    rank[order] = np.cumsum(is_new)[: len(every)] - 1
    parts = np.split(rank, np.cumsum([column.count for column in texts])[:-1])
    codes = np.concatenate([part[column.codes] for part, column in zip(parts, texts, strict=True)])
    return Texts.coded([every[i] for i, new in zip(order, is_new, strict=False) if new], codes)


def is_text(values: npt.NDArray[Any]) -> bool:
    """Whether an array holds Python's strings, as columns of texts do: each takes the room that it needs.

    NumPy's strings of one length have room for the longest in each; its `StringDType` fails when some are chosen
    (2.0, 2.1: numpy/numpy#27737), and `np.unique` mistakes zeros in it.
    """
    return values.dtype == object and all(isinstance(one, str) for one in values.flat)


def as_ids(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers as they are; texts in an array that has room for the longest in each, which is searched faster."""
    return np.array(values.tolist(), dtype=str) if values.dtype.kind == "T" or is_text(values) else values


def as_column(values: Any, what: str = "value") -> npt.NDArray[Any]:
    """Values as an array; texts, and numbers among them, as `is_text` has them.

    Raises:
        ValueError: a text has no UTF-8, as a file's name in Latin-1, NaN stands among texts, an array of pandas lacks a
            value, or integers do not fit into 64 bits; names it.
    """
    if isinstance(values, Sequence) and not isinstance(values, str):
        values = list(values)
    if isinstance(values, list) or _is_of_pandas(values):
        row = lacking(values)
        if row is not None and not (isinstance(values, list) and values[row] is None):
            raise ValueError(f"{what} in row {row} is missing; fill it in, or leave the row or the column out.")
    if isinstance(values, list) and _become_texts(values):  # NumPy would make them texts of one length
        array = np.array(list(map(str, values)), object)
    else:
        array = np.asarray(values)
        array = array.astype(object) if array.dtype.kind in "UT" else array
    if isinstance(values, list) and array.dtype.kind in "fO" and _are_integers(values):
        array = _unsigned(values, what)
    for text in array.flat if is_text(array) else ():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} {text!r} has no UTF-8; give it another name.") from None
    return array


def lacking(values: Any) -> int | None:
    """The first row without a value, if any: it has None, NA or NaT of pandas, or NaN unless it is among numbers."""
    if _is_of_pandas(values):
        return next(iter(np.flatnonzero(np.asarray(values.isna())).tolist()), None)
    if getattr(getattr(values, "dtype", np.dtype(object)), "kind", "f") not in "OT":  # torch's types have no kind
        return None
    kinds = set(map(type, values))
    none = {kind for kind in kinds if kind.__name__ in ("NoneType", "NAType", "NaTType")}
    numbers = all(issubclass(kind, int | float | np.number) and kind is not bool for kind in kinds)
    floats = () if numbers else tuple(kind for kind in kinds if issubclass(kind, float | np.floating))
    if not none and not floats:
        return None
    every = enumerate(values)
    return next((row for row, one in every if type(one) in none or (isinstance(one, floats) and one != one)), None)


def _is_of_pandas(values: Any) -> bool:
    """Whether values are in an array of a type that pandas has beside NumPy's, of which NumPy hides what is missing."""
    return hasattr(getattr(values, "dtype", None), "na_value")


def _are_integers(values: list[Any]) -> bool:
    return bool(values) and all(
        issubclass(kind, int | np.integer) and kind is not bool for kind in set(map(type, values))
    )


def _unsigned(values: list[Any], what: str) -> npt.NDArray[np.uint64]:
    """Integers of which some are from 2**63 on, where NumPy rounds them to floats beside smaller ones."""
    try:
        return np.array(values, np.uint64)
    except OverflowError:
        beyond = next(one for one in values if not -(2**63) <= one < 2**63)
        raise ValueError(f"{what} {beyond} is beyond int64; give such {what.split()[-1]}s as strings.") from None


def _become_texts(values: Sequence[Any]) -> bool:
    """Whether NumPy makes texts of them: one is, and the others are that or numbers."""
    kinds = set(map(type, values))
    known = all(issubclass(kind, str | bool | int | float | np.number | np.bool_) for kind in kinds)
    return known and any(issubclass(kind, str) for kind in kinds)


def distinct(column: Column, most: int) -> npt.NDArray[Any] | None:
    """Its sorted distinct values; None where there are more than so many."""
    if isinstance(column, Texts):
        return column.values if column.count <= most else None
    values = column[:0]
    for start in range(0, len(column), LOOKED_AT):
        some = column[start : start + LOOKED_AT]
        if len(values):
            some = some[values[np.minimum(np.searchsorted(values, some), len(values) - 1)] != some]
        if len(some):
            values = np.unique(np.concatenate([values, some]))
        if len(values) > most:
            return None
    return values


def check_ids(ids: Sequence[Any] | npt.NDArray[Any] | None, n_samples: int) -> npt.NDArray[Any]:
    """Sample ids as an int64 or string array `[n]`, 0 .. n-1 when None.

    Raises:
        ValueError: the wrong number, the wrong type, or an id given twice (which is named).
    """
    if ids is None:
        return np.arange(n_samples, dtype=np.int64)
    array = as_ids(as_column(ids, "sample id"))
    if array.shape != (n_samples,):
        raise ValueError(f"got ids of shape {array.shape} for {n_samples} samples; give one id per sample.")
    if array.dtype.kind not in "iU":  # a list with a number beyond int64 becomes unsigned, float or object
        beyond = [
            one for one in np.asarray(ids, object).tolist() if isinstance(one, int) and not -(2**63) <= one < 2**63
        ]
        if beyond:
            raise ValueError(f"sample id {beyond[0]} is beyond int64; give such ids as strings.")
    if array.dtype.kind not in "iuU":
        raise ValueError(f"sample ids must be integers or strings, got dtype {array.dtype}.")
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        twice = values[np.argmax(counts > 1)].item()
        places = np.flatnonzero(array == twice)[:2].tolist()
        raise ValueError(f"id {twice!r} is given twice, at positions {places}; give every sample an id of its own.")
    return array.astype(np.int64) if array.dtype.kind in "iu" else array


def check_columns(columns: Mapping[str, Any] | None, n_samples: int) -> dict[str, npt.NDArray[Any]]:
    """User columns as arrays `{name: [n]}` of booleans, numbers or texts, see `is_text`.

    Raises:
        ValueError: the wrong length or type, or a name that cannot stand beside the ids; names the column.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise ValueError(f"columns must map names to values, got a {type(columns).__name__}.")
    checked = {}
    for name, values in (columns or {}).items():
        if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
            raise ValueError(
                f"a column cannot be called {name!r}; use letters, digits and '_', and neither one of {RESERVED} nor a "
                "word that has a meaning in where=, such as 'in' and all of Python's keywords."
            )
        array = as_column(values, f"column {name!r}: value")
        if array.shape != (n_samples,):
            raise ValueError(
                f"column {name!r} has shape {array.shape} for {n_samples} samples; give one value for each."
            )
        if array.dtype.kind not in "biuf" and not is_text(array):
            raise ValueError(f"column {name!r} has dtype {array.dtype}{_advice(array)}.")
        checked[name] = array
    return checked


def _advice(array: npt.NDArray[Any]) -> str:
    """What to make of values that no column holds; of objects, which one is such a value."""
    if array.dtype.kind in "mM":
        return "; write dates and times as strings, values.astype(str)"
    row, odd = next(((row, one) for row, one in enumerate(array.tolist()) if not isinstance(one, str)), (0, None))
    found = f", {odd!r:.60} in row {row}" if array.dtype == object else ""
    if isinstance(odd, date | time | timedelta):
        return f"{found}; write dates and times as strings"
    return f"{found}; give booleans, numbers or strings"


def column_types(ids: npt.NDArray[Any], columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """How zarr stores the ids and the columns: "string", or a NumPy type."""
    every = {"id": ids, **columns}
    return {name: "string" if values.dtype.kind in "UO" else values.dtype.name for name, values in every.items()}
