"""A task, how it can end, and which failures may pass."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

ATTEMPTS = 3
"""At a task whose failure may pass: one by the disk, the network or the death of workers. Dask itself runs a task again
when its worker dies, up to `distributed.scheduler.allowed-failures` times in each attempt. What is lost by no fault of
its own, with the scheduler or its connection, begins again as often as it takes."""
GIVE_UP = 16
"""Failures in a row after which the rest would fail alike: a full disk, a model that is not what was said."""
PER_THREAD = 2
"""Tasks that wait for each thread."""
PASSING = (None, errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE)
"""Error numbers of the network and of object stores; a full or forbidden disk is none of them."""


@dataclass(frozen=True, eq=False)
class Task:
    """One call of the function of a run; its name is shown on the dashboard and in errors."""

    name: str
    args: tuple[Any, ...]


class FailedTasksError(RuntimeError):
    """Some tasks of a run failed, and all others are done.

    Attributes:
        failures: the tasks, each with the exception that it ended with.
    """

    def __init__(self, message: str, failures: list[tuple[Task, BaseException]]) -> None:
        super().__init__(message, failures)
        self.message = message
        self.failures = failures

    def __str__(self) -> str:
        lines = [f"  {task.name}: {type(error).__name__}: {error}" for task, error in self.failures[:GIVE_UP]]
        more = len(self.failures) - len(lines)
        return "\n".join([self.message, *lines, *[f"  and {more} more, see .failures"] * bool(more)])


class LostError(Exception):
    """The scheduler has forgotten a task, is another one, or the connection to it broke."""


Outcome = tuple[Any, Any, BaseException | None]
"""A task or future, its result, and the exception that it ended with."""


def may_pass(error: BaseException) -> bool:
    """Whether a task that failed so may succeed when it is tried again."""
    return error.errno in PASSING if isinstance(error, OSError) else is_killed(error)


def is_killed(error: BaseException) -> bool:
    """Whether workers died of a task, or with it, too often."""
    from distributed import KilledWorker

    return isinstance(error, KilledWorker)
