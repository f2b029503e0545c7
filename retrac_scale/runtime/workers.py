"""Tasks on the workers of a cluster, which may die at any instant, and others come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import CancelledError
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from retrac_scale.runtime.sealed import Sealed, itself
from retrac_scale.runtime.tasks import PER_THREAD, LostError, Outcome, Task, may_pass

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

WAITING = 16
"""Tasks at the scheduler in any case, beside those per thread of the cluster."""
LOOK_AGAIN_S, PATIENCE_S = 1.0, 30.0
"""Between two looks at the workers, and without any before the cluster is asked for them."""


class There:
    """Workers of a cluster, which may grow, shrink and die."""

    def __init__(
        self, function: Callable[..., Any], shared: Any, client: Client, resources: Mapping[str, float] | None
    ) -> None:
        self._function, self._shared, self._client, self._resources = Sealed(function), shared, client, resources
        self._finished: SimpleQueue[Any] = SimpleQueue()
        self._at_workers: Any = None
        self._watch = Watch(client)
        self._room, self._looked = 0, -math.inf

    def room(self) -> int:
        """Tasks that may be under way at a time."""
        if time.monotonic() - self._looked > LOOK_AGAIN_S:
            self._room = WAITING + PER_THREAD * sum(self._watch.look().values())
            self._looked = time.monotonic()
        return self._room

    def start(self, task: Task) -> Any:
        """Give a task out; what it is known by."""
        _wait_for_connection(self._client)
        if self._at_workers is None or _is_lost(self._at_workers):
            self._at_workers = self._submit("shared", itself, Sealed(self._shared))
        future = self._submit(task.name, self._function, self._at_workers, *task.args, resources=self._resources)
        future.add_done_callback(self._finished.put)
        return future

    def _submit(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        key = f"{name}-{uuid.uuid4().hex[:8]}"  # of its own: never the result of an earlier run
        with however_large():
            return self._client.submit(function, *args, key=key, pure=False, **options)

    def finished(self) -> Outcome:
        """The next one that ended."""
        future = None
        while future is None:
            try:
                future = self._finished.get(timeout=LOOK_AGAIN_S)
            except Empty:
                self._watch.look()
        try:
            return future, self._watch.gather([future])[0], None
        except Exception as error:
            return future, None, cause(error, [future])

    def cancel(self, futures: list[Any]) -> None:
        """Forget tasks that were given out."""
        if futures and self._client.status == "running":
            self._client.cancel(futures)

    def close(self) -> None:
        """Nothing is given out any more."""
        self._at_workers = None


def worker_threads(client: Client) -> dict[str, int]:
    """Threads of the workers that are there, by address."""
    while True:
        _wait_for_connection(client)
        with contextlib.suppress(OSError):  # the connection broke while the scheduler was asked
            return dict(client.nthreads())
        time.sleep(0.1)


def gpu_label(client: Client) -> dict[str, float] | None:
    """The resource by which tasks find a GPU, {"GPU": 1}, when workers declare it, as dask-cuda's can; else None."""
    watch = Watch(client)
    while not watch.look():  # what they declare is known when one is there
        time.sleep(LOOK_AGAIN_S)
    declared = client.scheduler_info(n_workers=-1)["workers"].values()
    return {"GPU": 1} if any(worker["resources"].get("GPU") for worker in declared) else None


def most_on_a_machine(client: Client) -> int:
    """Workers of the machine that has the most of them, which share its memory."""
    declared = client.scheduler_info(n_workers=-1)["workers"].values()
    return max(Counter(worker["host"] for worker in declared).values(), default=1)


class Watch:
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
                raise LostError


def _wait_for_connection(client: Client) -> None:
    while client.status == "connecting":
        time.sleep(0.1)
    if client.status != "running":
        raise ConnectionError(
            f"the connection to the scheduler is lost (the client is {client.status}); what was done until then "
            "stands, repeat the call with a new client."
        )


def cause(raised: Exception, futures: list[Any]) -> Exception:
    """Why results of futures could not be had: the task's own exception, or that they are lost."""
    failed = any(future.status == "error" for future in futures)
    return LostError() if not failed and isinstance(raised, (CancelledError, OSError)) else raised


def _is_lost(held: Any) -> bool:
    return held.status == "cancelled" or (held.status == "error" and may_pass(held.exception()))


_sending = threading.Lock()


@contextlib.contextmanager
def however_large() -> Iterator[None]:
    """Dask warns of graphs above 10 MB; ours hold a model on purpose."""
    import dask

    with _sending, dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 PB"}):
        yield
