"""Which samples count: expressions over columns, masks, ids."""

from __future__ import annotations

import ast

import numpy as np
import numpy.typing as npt

from retrac_scale.index import Index
from retrac_scale.scan import Bools


def which(where: npt.ArrayLike | str | None, index: Index) -> Bools | None:
    """The samples that count, bool `[n]`; None for all.

    Args:
        where: an expression over the columns and `id`, a mask `[n]`, or ids.
        index: whose samples.

    Raises:
        ValueError: it fits the index badly, or no sample is left.
    """
    if where is None:
        return None
    if isinstance(where, str):
        return _evaluate(where, index)
    chosen, ids = np.asarray(where), index.ids
    if chosen.dtype == bool:
        if chosen.shape != ids.shape:
            raise ValueError(f"where= is a mask of shape {chosen.shape}; the index has {len(ids)} samples.")
        mask = chosen
    else:
        unknown = ~np.isin(chosen, ids)
        if unknown.any():
            raise ValueError(f"where= names the id {chosen[unknown].tolist()[0]!r}, which is not in the index.")
        mask = np.isin(ids, chosen)
    if not mask.any():
        raise ValueError("where= leaves no sample to score.")
    return mask


def _evaluate(expression: str, index: Index) -> Bools:
    import pandas as pd

    table = pd.DataFrame({"id": index.ids, **index.columns})
    _check_expression(expression, {name for name in table if not pd.api.types.is_numeric_dtype(table[name])})
    try:
        found = np.asarray(table.eval(expression, engine="python", local_dict={}, global_dict={}))
    except Exception as error:  # whatever a wrong expression makes pandas raise
        raise ValueError(
            f"where={expression!r} cannot be evaluated: {error}; the columns are {', '.join(table.columns)}."
        ) from error
    if found.dtype != bool or found.shape != (len(table),):
        raise ValueError(f"where={expression!r} must say yes or no for each sample; it gives {found.dtype}.")
    if not found.any():
        raise ValueError(f"where={expression!r} leaves no sample to score.")
    return found


_LOGIC = (ast.BitAnd, ast.BitOr, ast.BitXor)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)  # no powers: they can fill the memory
_EXPRESSION = (
    *(ast.Expression, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple, *_LOGIC, *_ARITHMETIC),
    *(ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.BinOp, ast.UnaryOp, ast.unaryop),
)
LONGEST = 2000
"""Characters of an expression."""


def _check_expression(expression: str, texts: set[str]) -> None:
    """Comparisons and arithmetic on numbers alone: pandas would also call methods, or repeat a text without end."""
    if len(expression) > LONGEST:
        raise ValueError(f"where= has {len(expression)} characters; at most {LONGEST} are read.")
    try:
        nodes = list(ast.walk(ast.parse(expression.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # what ast.parse raises for wild strings
        raise ValueError(f"where={expression!r} is no expression: {getattr(error, 'msg', error)}.") from error
    for node in nodes:
        if not isinstance(node, _EXPRESSION):
            raise ValueError(
                f"where={expression!r} holds a {type(node).__name__.lower()}; use column names, values, comparisons, "
                "arithmetic, in, and, or, not."
            )
        if isinstance(node, ast.BinOp) and isinstance(node.op, _ARITHMETIC):
            for side in (node.left, node.right):
                if not isinstance(side, ast.BinOp | ast.UnaryOp) and not _is_number(side, texts):
                    raise ValueError(f"where={expression!r} calculates with {ast.unparse(side)}, which is no number.")


def _is_number(node: ast.expr, texts: set[str]) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    return isinstance(node, ast.Name) and node.id not in texts
