"""Many independent tasks, here or on a cluster."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from retrac_scale.runtime.here import Here
from retrac_scale.runtime.tasks import ATTEMPTS, GIVE_UP, FailedTasksError, LostError, Outcome, Task, may_pass
from retrac_scale.runtime.workers import There

if TYPE_CHECKING:
    from distributed import Client


def run(
    function: Callable[..., Any],
    tasks: Iterable[Task],
    client: Client | None = None,
    *,
    shared: Any = None,
    threads: int | None = None,
    resources: Mapping[str, float] | None = None,
    fatal: tuple[type[BaseException], ...] = (),
) -> Iterator[tuple[Task, Any]]:
    """Results of `function(shared, *task.args)`, as they come.

    Tasks are taken from their iterable no faster than they are done, so that a million of them fills neither this
    process nor the scheduler. A failure that may pass is tried again, before further tasks once there are many; any
    other is kept for the end. Workers may die at any instant, and others come; while there are none, it waits.

    Args:
        function: of a module, so that a worker can import it.
        tasks: independent of each other; one may run twice, when its worker dies.
        client: None runs them here.
        shared: what all of them need; a worker gets it once.
        threads: here, None for as many as torch is set to, each with one thread of torch and BLAS, which are set back
            after; 1 runs all in the calling thread, and touches no setting.
        resources: that a worker must have declared, such as {"GPU": 1}.
        fatal: exceptions that end the run at once.

    Raises:
        FailedTasksError: when all others are done, or after many failures in a row that do not pass.
        ConnectionError: the scheduler is gone.
    """
    pool = Here(function, shared, threads) if client is None else There(function, shared, client, resources)
    failed: dict[Task, BaseException] = {}
    in_a_row = 0
    with contextlib.closing(pool):
        for (task, result, error), is_last in _attempts(pool, tasks):
            if error is None:
                in_a_row = 0
                failed.pop(task, None)
                yield task, result
                continue
            if isinstance(error, fatal):
                raise error
            failed[task] = error
            in_a_row += is_last
            if in_a_row == GIVE_UP:
                break
    if failed:
        failures = [*failed.items()]
        message = f"{len(failures)} task{'s' * (len(failures) > 1)} failed, "
        message += f"the last {GIVE_UP} in a row, the rest was left" if in_a_row == GIVE_UP else "all others are done"
        raise FailedTasksError(f"{message}; repeat the call once that is repaired:", failures) from failures[0][1]


def _attempts(pool: Here | There, tasks: Iterable[Task]) -> Iterator[tuple[Outcome, bool]]:
    """How each attempt at a task ended, and whether it was the last: it succeeded, or fails for good."""
    rest, is_more = iter(tasks), True
    while is_more:
        again: list[Task] = []
        todo: Iterable[Task] = _while_few_wait(rest, again)
        for attempt in range(1, ATTEMPTS + 1):
            for task, result, error in _round(pool, todo, alone=attempt == ATTEMPTS):
                is_last = error is None or attempt == ATTEMPTS or not may_pass(error)
                again += [] if is_last else [task]
                yield (task, result, error), is_last
            if attempt == 1:
                is_more = len(again) >= GIVE_UP
            todo, again = again, []


def _while_few_wait(rest: Iterator[Task], again: list[Task]) -> Iterator[Task]:
    """Tasks that were not begun, until so many wait for another try that these are better tried first."""
    while len(again) < GIVE_UP and (task := next(rest, None)) is not None:
        yield task


def _round(pool: Here | There, tasks: Iterable[Task], *, alone: bool) -> Iterator[Outcome]:
    """One attempt at each task; when alone, one after the other, so that one that kills workers takes none along."""
    todo, running = iter(tasks), dict[Any, Task]()
    try:
        while True:
            for task in itertools.islice(todo, max(0, (1 if alone else pool.room()) - len(running))):
                running[pool.start(task)] = task
            if not running:
                return
            future, result, error = pool.finished()
            task = running.pop(future)
            if isinstance(error, LostError):
                running[pool.start(task)] = task
            else:
                yield task, result, error
    finally:
        pool.cancel(list(running))


def results(
    function: Callable[..., Any], tasks: Iterable[Task], client: Client | None = None, *, shared: Any = None
) -> list[Any]:
    """Results of `run` in the order of the tasks."""
    order = list(tasks)
    found = dict(run(function, order, client, shared=shared))
    return [found[task] for task in order]
