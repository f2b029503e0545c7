"""Compiled passes."""

import numpy as np
import pytest
import torch

from retrac_scale.compiled import THREAD_BYTES, compiled, over_rows


def test_a_function_is_compiled_where_it_cannot_be_kept() -> None:
    here: dict[str, object] = {}
    exec("def half(x):\n    return x / 2", here)  # of no file, so that there is no folder to keep it beside
    half = compiled(here["half"])  # type: ignore[type-var]
    assert half(3.0) == 1.5  # type: ignore[operator]
    assert half.signatures  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rows", "threads"), [(0, 2), (1, 2), (5, 1), (5, 2), (5, 8)])
def test_every_row_is_worked_on_once(rows: int, threads: int) -> None:
    done, before = np.zeros(rows, int), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        over_rows(lambda part: done.__setitem__(part, done[part] + 1), rows, 100 * THREAD_BYTES)
    finally:
        torch.set_num_threads(before)
    assert (done == 1).all()
