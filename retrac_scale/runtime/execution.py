"""Many independent tasks, here or on a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import dask
import dask.threaded
import torch
from dask.graph_manipulation import clone
from threadpoolctl import ThreadpoolController

from retrac_scale.runtime.sealed import Sealed, itself

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""At a task whose failure may pass: one by the disk, the network or the death of workers. Dask itself runs a task again
when its worker dies, up to `distributed.scheduler.allowed-failures` times in each attempt. What is lost by no fault of
its own, with the scheduler or its connection, begins again as often as it takes."""
GIVE_UP = 16
"""Failures in a row after which the rest would fail alike: a full disk, a model that is not what was said."""
WAITING, PER_THREAD = 16, 2
"""Tasks at the scheduler: so many in any case, and so many per thread of the cluster."""
LOOK_AGAIN_S, PATIENCE_S = 1.0, 30.0
"""Between two looks at the workers, and without any before the cluster is asked for them."""
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


class _LostError(Exception):
    """The scheduler has forgotten a task, is another one, or the connection to it broke."""


Outcome = tuple[Any, Any, BaseException | None]
"""A task or future, its result, and the exception that it ended with."""


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
    process nor the scheduler. A failure that may pass is tried again; any other is kept for the end. Workers may die at
    any instant, and others come; while there are none, it waits.

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
        FailedTasksError: when all others are done, or after many failures in a row.
        ConnectionError: the scheduler is gone.
    """
    pool = _Here(function, shared, threads) if client is None else _There(function, shared, client, resources)
    failures: list[tuple[Task, BaseException]] = []
    again: list[Task] = []
    in_a_row = 0
    with contextlib.closing(pool):
        for attempt in range(1, ATTEMPTS + 1):
            for task, result, error in _round(pool, tasks, alone=attempt == ATTEMPTS):
                if error is None:
                    in_a_row = 0
                    yield task, result
                    continue
                if isinstance(error, fatal):
                    raise error
                in_a_row += 1
                if attempt < ATTEMPTS and _may_pass(error):
                    again.append(task)
                else:
                    failures.append((task, error))
                if in_a_row == GIVE_UP:
                    again, failures = [], [*failures, *((task, error) for task in again)]
                    break
            tasks, again = again, []
    if failures:
        message = f"{len(failures)} task{'s' * (len(failures) > 1)} failed, "
        message += f"the last {GIVE_UP} in a row, the rest was left" if in_a_row == GIVE_UP else "all others are done"
        raise FailedTasksError(f"{message}; repeat the call once that is repaired:", failures) from failures[0][1]


def _round(pool: _Here | _There, tasks: Iterable[Task], *, alone: bool) -> Iterator[Outcome]:
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
            if isinstance(error, _LostError):
                running[pool.start(task)] = task
            else:
                yield task, result, error
    finally:
        pool.cancel(list(running))


def gpu_label(client: Client) -> dict[str, float] | None:
    """The resource by which tasks find a GPU, {"GPU": 1}, when workers declare it, as dask-cuda's can; else None."""
    watch = _Watch(client)
    while not watch.look():  # what they declare is known when one is there
        time.sleep(LOOK_AGAIN_S)
    declared = client.scheduler_info(n_workers=-1)["workers"].values()
    return {"GPU": 1} if any(worker["resources"].get("GPU") for worker in declared) else None


def results(
    function: Callable[..., Any], tasks: Iterable[Task], client: Client | None = None, *, shared: Any = None
) -> list[Any]:
    """Results of `run` in the order of the tasks."""
    order = list(tasks)
    found = dict(run(function, order, client, shared=shared))
    return [found[task] for task in order]


def delayed(function: Callable[..., Any]) -> Any:
    """A function whose calls are delayed tasks, for `compute`."""
    return dask.delayed(Sealed(function), pure=False)


def constant(value: Any) -> Any:
    """A delayed task that brings a value to those that depend on it; a worker gets it once."""
    return dask.delayed(itself, pure=False)(Sealed(value))


def compute(tasks: list[Any], client: Client | None) -> list[Any]:
    """Results of a few delayed tasks with all that they depend on, on the client's workers, or here on threads."""
    if client is not None:
        return _compute_there(tasks, client)
    threads = torch.get_num_threads()
    with _one_thread_each():
        # not "threads": for a name, dask loads distributed to see whether there is a client
        return list(dask.compute(*tasks, scheduler=dask.threaded.get, num_workers=threads))


def _compute_there(tasks: list[Any], client: Client) -> list[Any]:
    """`compute` on workers: a graph that is lost, or whose workers died again and again, is sent anew."""
    killed, watch = 0, _Watch(client)
    while True:
        asked = watch.look()
        placed = any(layer.annotations for task in tasks for layer in task.dask.layers.values())
        with _however_large():
            futures = client.compute(tasks, retries=ATTEMPTS - 1)
        try:
            return watch.gather(futures, homes=asked.keys() if placed else None)
        except Exception as raised:
            error = _cause(raised, futures)
            killed += _is_killed(error)
            if killed == ATTEMPTS or not (_is_killed(error) or isinstance(error, _LostError)):
                raise
        tasks = clone(tasks)  # under other keys, and without homes


class _Here:
    """Threads of this process, or the calling thread alone."""

    def __init__(self, function: Callable[..., Any], shared: Any, threads: int | None) -> None:
        self._function, self._shared = function, shared
        self._threads = torch.get_num_threads() if threads is None else threads
        self._finished: SimpleQueue[Future[Any]] = SimpleQueue()
        self._cleanup = contextlib.ExitStack()
        if self._threads > 1:
            self._cleanup.enter_context(_one_thread_each())
            self._pool = self._cleanup.enter_context(ThreadPoolExecutor(self._threads))

    def room(self) -> int:
        return PER_THREAD * self._threads if self._threads > 1 else 1

    def start(self, task: Task) -> Future[Any]:
        submit = self._pool.submit if self._threads > 1 else _at_once
        future = submit(self._function, self._shared, *task.args)
        future.add_done_callback(self._finished.put)
        return future

    def finished(self) -> Outcome:
        future = self._finished.get()
        error = future.exception()
        return future, None if error else future.result(), error

    def cancel(self, futures: list[Any]) -> None:
        for future in futures:
            future.cancel()

    def close(self) -> None:
        self._cleanup.close()


def _at_once(function: Callable[..., Any], *args: Any) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


class _There:
    """Workers of a cluster, which may grow, shrink and die."""

    def __init__(
        self, function: Callable[..., Any], shared: Any, client: Client, resources: Mapping[str, float] | None
    ) -> None:
        self._function, self._shared, self._client, self._resources = Sealed(function), shared, client, resources
        self._finished: SimpleQueue[Any] = SimpleQueue()
        self._at_workers: Any = None
        self._watch = _Watch(client)
        self._room, self._looked = 0, -math.inf

    def room(self) -> int:
        if time.monotonic() - self._looked > LOOK_AGAIN_S:
            self._room = WAITING + PER_THREAD * sum(self._watch.look().values())
            self._looked = time.monotonic()
        return self._room

    def start(self, task: Task) -> Any:
        _wait_for_connection(self._client)
        if self._at_workers is None or _is_lost(self._at_workers):
            self._at_workers = self._submit("shared", itself, Sealed(self._shared))
        future = self._submit(task.name, self._function, self._at_workers, *task.args, resources=self._resources)
        future.add_done_callback(self._finished.put)
        return future

    def _submit(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        key = f"{name}-{uuid.uuid4().hex[:8]}"  # of its own: never the result of an earlier run
        with _however_large():
            return self._client.submit(function, *args, key=key, pure=False, **options)

    def finished(self) -> Outcome:
        future = None
        while future is None:
            try:
                future = self._finished.get(timeout=LOOK_AGAIN_S)
            except Empty:
                self._watch.look()
        try:
            return future, self._watch.gather([future])[0], None
        except Exception as error:
            return future, None, _cause(error, [future])

    def cancel(self, futures: list[Any]) -> None:
        if futures and self._client.status == "running":
            self._client.cancel(futures)

    def close(self) -> None:
        self._at_workers = None


def worker_threads(client: Client) -> dict[str, int]:
    """Threads of the workers that are there, by address."""
    while True:
        _wait_for_connection(client)
        with contextlib.suppress(OSError):  # the connection broke while the scheduler was asked
            return dict(client.nthreads())
        time.sleep(0.1)


class _Watch:
    """Looks at the workers while their results are awaited."""

    def __init__(self, client: Client) -> None:
        self._client, self._seen = client, time.monotonic()

    def look(self) -> dict[str, int]:
        """`worker_threads`. When there have been none for a while, the cluster is asked for those that it gave up.

        Dask's clusters close a worker that was killed and is not back after `distributed.deploy.lost-worker-timeout`,
        15 s, in which one beside busy processes hardly starts, and then forget it until they are scaled.
        """
        found, now = worker_threads(self._client), time.monotonic()
        if found:
            self._seen = now
        elif now - self._seen > PATIENCE_S:
            self._seen = now
            logger.warning("for %.0f s there has been no worker; the run goes on when one comes", PATIENCE_S)
            cluster = self._client.cluster
            if promised := getattr(cluster, "worker_spec", None):
                cluster.scale(len(promised))
        return found

    def gather(self, futures: list[Any], homes: Set[str] | None = None) -> list[Any]:
        """Results of tasks. Those that were given homes would never run when none of these is left, whoever comes."""
        coming = self._client.gather(futures, asynchronous=True)
        waiting = asyncio.run_coroutine_threadsafe(coming, self._client.loop.asyncio_loop)
        while True:
            try:
                return list(waiting.result(LOOK_AGAIN_S))
            except TimeoutError:
                if waiting.done():  # a task's own
                    raise
            left = self.look().keys()
            if homes is not None and not homes & left:
                raise _LostError


def _wait_for_connection(client: Client) -> None:
    while client.status == "connecting":
        time.sleep(0.1)
    if client.status != "running":
        raise ConnectionError(
            f"the connection to the scheduler is lost (the client is {client.status}); what was done until then "
            "stands, repeat the call with a new client."
        )


def _cause(raised: Exception, futures: list[Any]) -> Exception:
    """Why results of futures could not be had: the task's own exception, or that they are lost."""
    failed = any(future.status == "error" for future in futures)
    return _LostError() if not failed and isinstance(raised, (CancelledError, OSError)) else raised


def _is_lost(held: Any) -> bool:
    return held.status == "cancelled" or (held.status == "error" and _may_pass(held.exception()))


def _may_pass(error: BaseException) -> bool:
    return error.errno in PASSING if isinstance(error, OSError) else _is_killed(error)


def _is_killed(error: BaseException) -> bool:
    from distributed import KilledWorker

    return isinstance(error, KilledWorker)


_sending = threading.Lock()


@contextlib.contextmanager
def _however_large() -> Iterator[None]:
    """Dask warns of graphs above 10 MB; ours hold a model on purpose."""
    with _sending, dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 PB"}):
        yield


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch and BLAS on one thread per calling thread, so that theirs and ours do not compete; set back after."""
    threads = torch.get_num_threads()
    with _libraries().limit(limits=1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
