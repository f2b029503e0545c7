"""Which samples count: expressions over columns, masks, ids."""

from __future__ import annotations

import ast

import numpy as np
import numpy.typing as npt
import pandas as pd

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
    table = pd.DataFrame({"id": index.ids, **index.columns})
    _check_expression(expression)
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


_EXPRESSION = (
    *(ast.Expression, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
    *(ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop),
)


def _check_expression(expression: str) -> None:
    """Comparisons and arithmetic alone: pandas would also call methods, which can write files."""
    try:
        nodes = list(ast.walk(ast.parse(expression.strip(), mode="eval")))
    except SyntaxError as error:
        raise ValueError(f"where={expression!r} is no expression: {error.msg}.") from error
    for node in nodes:
        if not isinstance(node, _EXPRESSION):
            raise ValueError(
                f"where={expression!r} holds a {type(node).__name__.lower()}; use column names, values, comparisons, "
                "arithmetic, in, and, or, not."
            )
