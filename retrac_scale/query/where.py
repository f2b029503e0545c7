"""Which samples count: expressions over columns, masks, ids."""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Int64
from retrac_scale.columns import Column, Texts, as_ids
from retrac_scale.index.reader import IndexReader
from retrac_scale.store.schema import blocks

LONGEST, MOST_TERMS = 2000, 64
"""Characters and operations of an expression, each of which passes over all samples once."""
TEXT_TERMS, SEARCH_TERMS = 16, 8
"""Operations that a comparison counts for where the texts themselves are read: of two columns, of one with values."""
CHARACTER = np.dtype("<U1").itemsize
TILE = 2**16
"""Samples at a time: what is calculated of them stays in a core's cache, and nobody may want the rest."""


class NotWantedError(Exception):
    """Whoever asked is gone."""


def which(
    where: npt.ArrayLike | str | None, index: IndexReader, wanted: Callable[[], bool] = lambda: True
) -> Bools | None:
    """The samples that count, bool `[n]`; None for all.

    Args:
        where: an expression over the columns and `id`, a mask `[n]`, or ids.
        index: whose samples.
        wanted: asked now and then while an expression is worked out.

    Raises:
        ValueError: it fits the index badly, or no sample is left.
        NotWantedError: it is no longer wanted.
    """
    if where is None:
        return None
    if isinstance(where, str):
        return satisfying(where, index, wanted)
    chosen, ids = as_ids(np.asarray(where)), index.ids
    if chosen.dtype == bool:
        if chosen.shape != ids.shape:
            raise ValueError(f"where= is a mask of shape {chosen.shape}; the index has {len(ids)} samples.")
        mask = chosen
    else:
        if len(np.unique(chosen)) < chosen.size:  # as 0 and 1 for each sample, which would be two ids
            raise ValueError("where= names an id more than once; is it a mask? Give booleans, or each id once.")
        unknown = ~np.isin(chosen, ids)
        if unknown.any():
            raise ValueError(f"where= names the id {chosen[unknown].tolist()[0]!r}, which is not in the index.")
        mask = np.isin(ids, chosen)
    if not mask.any():
        raise ValueError("where= leaves no sample to score.")
    return mask


def satisfying(expression: str, index: IndexReader, wanted: Callable[[], bool] = lambda: True) -> Bools:
    """The samples for which an expression holds, bool `[n]`; see `which`."""
    tree = _parsed(expression)
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names = ["id", *index.column_names]
    if unknown := sorted(named - set(names)):
        raise ValueError(f"where={expression!r} names {unknown[0]!r}; the columns are {', '.join(names)}.")
    # first over no sample: what does not fit is told before anything is read
    answer = _Expression(expression, {name: index.column(name, read=False) for name in named}, {}).value(tree.body)
    if not isinstance(answer, np.ndarray) or answer.dtype != bool or answer.ndim != 1:
        raise ValueError(f"where={expression!r} must say yes or no for each sample.")
    columns = {name: index.places.ids if name == "id" else index.column(name) for name in named}
    found = np.empty(index.shape[1], bool)
    shared: dict[str, Int64] = {}
    for tile in blocks(len(found), TILE):
        if not wanted():
            raise NotWantedError(expression)
        some = {name: _some(column, tile) for name, column in columns.items()}
        found[tile] = _Expression(expression, some, shared).value(tree.body)
    if not found.any():
        raise ValueError(f"where={expression!r} leaves no sample to score.")
    return found


def _some(column: Column, samples: slice) -> Column:
    return column.some(samples) if isinstance(column, Texts) else column[samples]


def _parsed(expression: str) -> ast.Expression:
    if len(expression) > LONGEST:
        raise ValueError(f"where= has {len(expression)} characters; at most {LONGEST} are read.")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        terms = sum(
            len(getattr(node, "ops", [0])) + isinstance(getattr(node, "op", None), _SLOW)
            for node in ast.walk(tree)
            if isinstance(node, _COSTLY)
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # what ast.parse raises for wild strings
        raise ValueError(f"where={expression!r} is no expression: {getattr(error, 'msg', error)}.") from error
    if terms > MOST_TERMS:
        raise ValueError(f"where= has {terms} operations; at most {MOST_TERMS} are made, and `in` takes a whole list.")
    return tree


_COSTLY = (ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp)
_SLOW = (ast.FloorDiv, ast.Mod)
_COMPARED: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MIRRORED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}
_LOGIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {  # no powers: they leave every range
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FURTHEST: Mapping[Callable[[Any, Any], Any], Callable[[int, int], int]] = {  # from zero that results of integers are
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.floordiv: lambda one, other: one if other > 0 else -one,
    operator.mod: lambda one, other: other,
}


class _Expression:
    """What an expression says of each sample: arrays `[n]` of booleans, numbers or texts, or constants.

    Args:
        text: the expression.
        columns: of some samples.
        shared: what is worked out once for all samples, kept here: see `_ranks`.
    """

    def __init__(self, text: str, columns: Mapping[str, Column], shared: dict[str, Int64]) -> None:
        self._text, self._columns, self._shared, self._terms = text, columns, shared, 0

    def value(self, node: ast.expr) -> Any:
        """The value of a part of the expression."""
        match node:
            case ast.Name():
                return self._columns[node.id]
            case ast.Constant() if isinstance(node.value, bool | int | float | str):
                return node.value
            case ast.List() | ast.Tuple():
                raise self._error(f"holds {ast.unparse(node)}, which only stands behind `in`")
            case ast.Compare():
                return self._comparison(node)
            case ast.BoolOp():
                join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
                found = self._yes_or_no(node.values[0])
                for other in node.values[1:]:
                    found = join(found, self._yes_or_no(other))
                return found
            case ast.BinOp() if type(node.op) in _LOGIC:
                return _LOGIC[type(node.op)](self._yes_or_no(node.left), self._yes_or_no(node.right))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return self._calculated(_ARITHMETIC[type(node.op)], node.left, node.right)
            case ast.UnaryOp(op=ast.Not() | ast.Invert()):
                return ~self._yes_or_no(node.operand)
            case ast.UnaryOp(op=ast.USub()):
                return self._calculated(operator.sub, ast.Constant(0), node.operand)
            case ast.UnaryOp(op=ast.UAdd()):
                return self._number(node.operand)
        what = type(getattr(node, "op", node)).__name__.lower()
        raise self._error(f"holds a {what}; use column names, values, comparisons, arithmetic, in, and, or, not")

    def _comparison(self, node: ast.Compare) -> Bools:
        found: Any = True
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
            found = found & self._compared(left, op, right)
        answer: Bools = found
        return answer

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            found = self._is_among(self.value(left), right)
            return found if isinstance(op, ast.In) else ~found
        if type(op) not in _COMPARED:
            raise self._error("compares by `is`; use ==")
        one, other = self.value(left), self.value(right)
        if _is_text(one) != _is_text(other):
            raise self._error(f"compares {ast.unparse(left)} with {ast.unparse(right)}, a text with a number")
        if isinstance(one, str) and isinstance(other, Texts):
            one, other, op = other, one, _MIRRORED.get(type(op), type(op))()
        if isinstance(one, Texts) and isinstance(other, str):
            return _codes_compared(one, type(op), other)
        if _is_text(one):
            self._charge(SEARCH_TERMS if isinstance(one, str) or isinstance(other, str) else TEXT_TERMS)
        if isinstance(one, Texts) and isinstance(other, Texts):
            ranks = self._ranks(f"{ast.unparse(left)} {ast.unparse(right)}", one, other)
            return _COMPARED[type(op)](ranks[one.codes], 2 * other.codes)
        return np.asarray(self._worked_out(_COMPARED[type(op)], _beside(one, other), _beside(other, one)))

    def _ranks(self, names: str, one: Texts, other: Texts) -> Int64:
        """What the codes of a column stand for, to be compared with twice those of another; both by their names."""
        if names not in self._shared:
            from retrac_scale.native.texts import merge  # numba, which takes a while to load

            self._shared[names] = np.empty(one.count, np.int64)
            merge(one.text, one.ends, other.text, other.ends, self._shared[names])
        return self._shared[names]

    def _is_among(self, one: Any, listed: ast.expr) -> Bools:
        if not isinstance(listed, ast.List | ast.Tuple):
            raise self._error(f"looks in {ast.unparse(listed)}; `in` takes a list of values, such as [1, 2]")
        values = [self.value(value) for value in listed.elts]
        if isinstance(one, str | bool | int | float) or any(_is_text(value) != _is_text(one) for value in values):
            raise self._error(f"looks for a text among numbers, or for a number among texts: {ast.unparse(listed)}")
        if not all(isinstance(value, str | bool | int | float) for value in values):
            raise self._error(f"looks in {ast.unparse(listed)}, which holds more than values")
        if isinstance(one, Texts):
            places = [one.find(value) for value in values]
            return np.isin(one.codes, [code for code, there in places if there])
        if not _is_text(one):
            if one.dtype.kind in "iu":  # NumPy would compare them in float64 beside what they cannot be
                has = np.iinfo(one.dtype)
                whole = [int(value) for value in values if value % 1 == 0 and has.min <= value <= has.max]
                return np.isin(one, np.array(whole, one.dtype))
            return np.isin(one, np.array(values))
        self._charge(SEARCH_TERMS)
        texts = np.unique(np.array(["", *values], dtype=str))
        found: Bools = texts[np.minimum(np.searchsorted(texts, one), len(texts) - 1)] == one
        return found if "" in values else found & (one != "")

    def _yes_or_no(self, node: ast.expr) -> Bools:
        found = self.value(node)
        if not isinstance(found, np.ndarray) or found.dtype != bool:
            raise self._error(f"takes {ast.unparse(node)} for a condition; put conditions joined by & or | into (...)")
        return found

    def _number(self, node: ast.expr) -> Any:
        found = self.value(node)
        if _is_text(found) or (isinstance(found, np.ndarray) and found.dtype == bool):
            raise self._error(f"calculates with {ast.unparse(node)}, which is no number")
        return found

    def _calculated(self, operation: Callable[[Any, Any], Any], left: ast.expr, right: ast.expr) -> Any:
        return self._worked_out(partial(_result, operation), self._number(left), self._number(right))

    def _worked_out(self, operation: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
        try:
            with np.errstate(all="ignore"):
                return operation(one, other)
        except OverflowError as error:
            raise self._error(f"holds a number that is too large: {error}") from None

    def _charge(self, terms: int) -> None:
        """Count operations that take as long as several."""
        self._terms += terms
        if self._terms > MOST_TERMS:
            raise self._error(
                f"compares texts too often: two columns count for {TEXT_TERMS}, ids for {SEARCH_TERMS} "
                f"of at most {MOST_TERMS} operations"
            )

    def _error(self, what: str) -> ValueError:
        return ValueError(f"where={self._text!r} {what}.")


def _result(operation: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """What is calculated: of constants by Python, of integers exactly where 64 bits hold it, else in float64."""
    if not isinstance(one, np.ndarray) and not isinstance(other, np.ndarray):
        with suppress(ZeroDivisionError):
            return operation(one, other)
    dtype = _holding(operation, one, other)
    found = operation(np.asarray(one, dtype), np.asarray(other, dtype))
    if dtype is np.float64 or operation not in (operator.floordiv, operator.mod) or np.all(other):
        return found
    by_zero = operation(np.asarray(one, np.float64), np.asarray(other, np.float64))  # no integer is infinite
    return np.where(np.equal(other, 0), by_zero, found)[()]


def _holding(operation: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """The type of integers that holds two of them and what is calculated of them, or float64."""
    some, others = _ends(one), _ends(other)
    if operation not in _FURTHEST or not some or not others:
        return np.float64
    every = [*some, *others, *itertools.starmap(_FURTHEST[operation], itertools.product(some, others))]
    ranges = ((dtype, np.iinfo(dtype)) for dtype in (np.int64, np.uint64))
    return next((dtype for dtype, has in ranges if has.min <= min(every) and max(every) <= has.max), np.float64)


def _ends(value: Any) -> tuple[int, ...]:
    """The smallest and the largest of integers; none of other numbers."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return (int(value.min()), int(value.max())) if value.size else (0,)
    return (value,) if isinstance(value, int) else ()


def _is_text(value: Any) -> bool:
    return isinstance(value, str | Texts) or (isinstance(value, np.ndarray) and value.dtype.kind == "U")


def _beside(value: Any, ids: Any) -> Any:
    """A value as it is compared; a column of texts, with ids."""
    return value.whole(ids.itemsize // CHARACTER) if isinstance(value, Texts) else value


def _codes_compared(column: Texts, op: type[ast.cmpop], text: str) -> Bools:
    """A column of texts against one text, by the order of the codes."""
    first, there = column.find(text)
    bounds = {ast.Lt: first, ast.LtE: first + there, ast.Gt: first + there, ast.GtE: first}
    if op in (ast.Lt, ast.LtE):
        return column.codes < bounds[op]
    if op in (ast.Gt, ast.GtE):
        return column.codes >= bounds[op]
    equal: Bools = column.codes == (first if there else -1)
    return equal if op is ast.Eq else ~equal
