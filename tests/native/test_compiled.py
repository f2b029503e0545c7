"""Compiled passes."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from retrac_scale.native.compiled import compiled
from retrac_scale.native.threads import THREAD_BYTES, SharedPass, _torch_team, over_rows


def test_a_function_is_compiled_where_it_cannot_be_kept() -> None:
    here: dict[str, object] = {}
    exec("def half(x):\n    return x / 2", here)  # of no file, so that there is no folder to keep it beside
    half = compiled(here["half"])  # type: ignore[type-var]
    assert half(3.0) == 1.5
    assert half.signatures


@pytest.mark.parametrize(("rows", "threads"), [(0, 2), (1, 2), (5, 1), (5, 2), (5, 8)])
def test_every_row_is_worked_on_once(rows: int, threads: int) -> None:
    done, before = np.zeros(rows, int), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        over_rows(lambda part: done.__setitem__(part, done[part] + 1), rows, 100 * THREAD_BYTES)
    finally:
        torch.set_num_threads(before)
    assert (done == 1).all()


@pytest.mark.parametrize("pool", [False, True])
def test_an_error_in_a_thread_is_raised(pool: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if pool:
        monkeypatch.setattr("retrac_scale.native.threads._torch_team", lambda: None)
    elif _torch_team() is None:
        pytest.skip("this build of torch has no OpenMP")

    def fail(part: slice) -> None:
        if part.start:
            raise ValueError(f"at {part.start}")

    with pytest.raises(ValueError, match="at 2"):
        over_rows(fail, 4, 100 * THREAD_BYTES)


def test_a_fork_has_threads_of_its_own() -> None:
    torch.ones(1 << 20).exp()  # wakes torch's
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as fork:
        assert fork.submit(_worked_on, 2).result(timeout=60) == [0, 2]


def _worked_on(threads: int) -> list[int]:
    starts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        over_rows(lambda part: starts.append(part.start), 4, 100 * THREAD_BYTES)
    return sorted(starts)


def test_rows_left_undone_by_a_native_thread_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if _torch_team() is None:
        pytest.skip("this build of torch has no OpenMP")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    idle = SharedPass(None, lambda *given: None, _nothing)
    with pytest.raises(MemoryError, match="2 of 2 threads could not do their rows"):
        idle((), 4, 100 * THREAD_BYTES)


def _nothing(address: object) -> None:
    """Do no part."""
