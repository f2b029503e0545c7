"""Tasks on threads of this process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
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
            self._pool = self._cleanup.enter_context(one_thread_each(self._threads))

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


class _BlasAlone:
    """BLAS, whose threads all of the process share, on one for as long as anybody asks for that."""

    def __init__(self) -> None:
        self._lock, self._asking = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._asking == 0:
                self._limit = _libraries().limit(limits=1, user_api="blas")
            self._asking += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._asking -= 1
            if self._asking == 0:
                self._limit.restore_original_limits()


_blas_alone = _BlasAlone()


@functools.cache
def _setters() -> list[Callable[[int], Any]]:
    """What sets how many threads torch has in the calling thread; `torch.set_num_threads` tells those to come too."""
    import torch

    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(torch._C.__file__)
        mkl = [library.MKL_Set_Num_Threads_Local] if hasattr(library, "MKL_Set_Num_Threads_Local") else []
        return [library.omp_set_num_threads, *mkl]
    return [torch.set_num_threads]


def _set_here(threads: int) -> None:
    """torch on so many threads in the calling thread alone."""
    threads_here()  # at its first call in a thread, torch takes what it is set to
    for setter in _setters():
        setter(threads)


@contextlib.contextmanager
def one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads; in each, and in the calling one, torch and BLAS have one: theirs and ours would compete.

    Other threads of the process keep those of torch, whatever they begin or end meanwhile.
    """
    before = threads_here()
    with _blas_alone:
        _set_here(1)
        try:
            with ThreadPoolExecutor(threads, initializer=_set_here, initargs=(1,)) as pool:
                yield pool
        finally:
            _set_here(before)
