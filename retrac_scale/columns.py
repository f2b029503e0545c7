"""Sample ids and the user's columns: checked, and texts as codes of their sorted distinct values."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RESERVED = ("id", "deleted", "parts")
"""Names at the root of a store that neither a column nor a checkpoint may take."""


@dataclass(frozen=True, eq=False)
class Texts:
    """A column of texts: `values[codes]` in short.

    Attributes:
        values: sorted and distinct, `[v]`.
        codes: int32 `[n]`.
    """

    values: npt.NDArray[np.str_]
    codes: npt.NDArray[np.int32]

    @staticmethod
    def of(texts: npt.NDArray[Any]) -> Texts:
        """Those of an array of strings `[n]`."""
        import pandas as pd

        codes, values = pd.factorize(texts.astype(object), sort=True)
        return Texts(np.array(values.tolist(), dtype=str), codes.astype(np.int32))

    def whole(self) -> npt.NDArray[np.str_]:
        """The texts themselves, `[n]`."""
        return self.values[self.codes]


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
        asked, ids = np.asarray(wanted), self.ids
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


def distinct(column: Column) -> npt.NDArray[Any]:
    """Its sorted distinct values."""
    return column.values if isinstance(column, Texts) else np.unique(column)


def check_ids(ids: Sequence[Any] | npt.NDArray[Any] | None, n_samples: int) -> npt.NDArray[Any]:
    """Sample ids as an int64 or string array `[n]`, 0 .. n-1 when None.

    Raises:
        ValueError: the wrong number, the wrong type, or an id given twice (which is named).
    """
    if ids is None:
        return np.arange(n_samples, dtype=np.int64)
    array = _texts(ids, "sample id")
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
    """User columns as arrays `{name: [n]}` of booleans, numbers or strings.

    Raises:
        ValueError: the wrong length or type, or a name that cannot stand beside the ids; names the column.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise ValueError(f"columns must map names to values, got a {type(columns).__name__}.")
    checked = {}
    for name, values in (columns or {}).items():
        array = _texts(values, f"column {name!r}: value")
        if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
            raise ValueError(
                f"a column cannot be called {name!r}; use letters, digits and '_', and neither one of {RESERVED} nor a "
                "word that has a meaning in where=, such as 'in' and all of Python's keywords."
            )
        if array.shape != (n_samples,):
            raise ValueError(
                f"column {name!r} has shape {array.shape} for {n_samples} samples; give one value for each."
            )
        if array.dtype.kind not in "biufU":
            dates = "write dates and times as strings, values.astype(str)"
            advice = dates if array.dtype.kind in "mM" else "give booleans, numbers or strings"
            raise ValueError(f"column {name!r} has dtype {array.dtype}; {advice}.")
        checked[name] = array
    return checked


def _texts(values: Any, what: str) -> npt.NDArray[Any]:
    """Values as an array; Python strings that stand in one of objects, as pandas has them, as one of strings.

    Raises:
        ValueError: a string has no UTF-8, as a file's name in Latin-1; names it.
    """
    array = np.asarray(values)
    if array.dtype == object and all(isinstance(value, str) for value in array.flat):
        array = array.astype(str)
    if array.dtype.kind == "U":
        for text in array.flat:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{what} {str(text)!r} has no UTF-8; give it another name.") from None
    return array


def column_types(ids: npt.NDArray[Any], columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """How zarr stores the ids and the columns: "string", or a NumPy type."""
    every = {"id": ids, **columns}
    return {name: "string" if values.dtype.kind in "UT" else values.dtype.name for name, values in every.items()}
