"""Tasks on threads of this process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from threadpoolctl import ThreadpoolController

from retrac_scale.runtime.tasks import PER_THREAD, Outcome, Task


class Here:
    """Threads of this process, or the calling thread alone."""

    def __init__(self, function: Callable[..., Any], shared: Any, threads: int | None) -> None:
        self._function, self._shared = function, shared
        self._threads = threads_here() if threads is None else threads
        self._finished: SimpleQueue[Future[Any]] = SimpleQueue()
        self._cleanup = contextlib.ExitStack()
        if self._threads > 1:
            self._cleanup.enter_context(one_thread_each())
            self._pool = self._cleanup.enter_context(ThreadPoolExecutor(self._threads))

    def room(self) -> int:
        """Tasks that may be under way at a time."""
        return PER_THREAD * self._threads if self._threads > 1 else 1

    def start(self, task: Task) -> Future[Any]:
        """Give a task out; what it is known by."""
        submit = self._pool.submit if self._threads > 1 else _at_once
        future = submit(self._function, self._shared, *task.args)
        future.add_done_callback(self._finished.put)
        return future

    def finished(self) -> Outcome:
        """The next one that ended."""
        future = self._finished.get()
        error = future.exception()
        return future, None if error else future.result(), error

    def cancel(self, futures: list[Any]) -> None:
        """Forget tasks that were given out."""
        for future in futures:
            future.cancel()

    def close(self) -> None:
        """Nothing is given out any more."""
        self._cleanup.close()


def _at_once(function: Callable[..., Any], *args: Any) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


def threads_here() -> int:
    """As many as torch is set to."""
    import torch  # takes seconds, which a run in the calling thread has no use for

    return torch.get_num_threads()


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """torch and BLAS on one thread per calling thread, so that theirs and ours do not compete; set back after."""
    import torch

    threads = torch.get_num_threads()
    with _libraries().limit(limits=1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
