"""A few tasks that depend on each other, as a graph, here or on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retrac_scale.runtime.here import one_thread_each, threads_here
from retrac_scale.runtime.sealed import Sealed, itself
from retrac_scale.runtime.tasks import ATTEMPTS, LostError, is_killed
from retrac_scale.runtime.workers import Watch, cause, however_large

if TYPE_CHECKING:
    from distributed import Client


def delayed(function: Callable[..., Any]) -> Any:
    """A function whose calls are delayed tasks, for `compute`."""
    import dask  # which a question that one thread answers has no use for

    return dask.delayed(Sealed(function), pure=False)


def constant(value: Any) -> Any:
    """A delayed task that brings a value to those that depend on it; a worker gets it once."""
    import dask

    return dask.delayed(itself, pure=False)(Sealed(value))


def compute(tasks: list[Any], client: Client | None, ended: Callable[[str], object] | None = None) -> list[Any]:
    """Results of a few delayed tasks with all that they depend on, on the client's workers, or here on threads.

    Args:
        tasks: of `delayed`.
        client: None computes them here.
        ended: told the key of each task that ends here, and of none on workers.
    """
    if client is not None:
        return _compute_there(tasks, client)
    import dask.threaded
    from dask.callbacks import Callback

    threads = threads_here()
    tell = None if ended is None else lambda key, *_: ended(key)
    with Callback(posttask=tell), one_thread_each(threads) as pool:
        # not "threads": for a name, dask loads distributed to see whether there is a client
        return list(dask.compute(*tasks, scheduler=dask.threaded.get, pool=pool))


def _compute_there(tasks: list[Any], client: Client) -> list[Any]:
    """`compute` on workers: a graph that is lost, or whose workers died again and again, is sent anew."""
    from dask.graph_manipulation import clone

    killed, watch = 0, Watch(client)
    while True:
        asked = watch.look()
        placed = any(layer.annotations for task in tasks for layer in task.dask.layers.values())
        with however_large():
            futures = client.compute(tasks, retries=ATTEMPTS - 1)
        try:
            return watch.gather(futures, homes=asked.keys() if placed else None)
        except Exception as raised:
            error = cause(raised, futures)
            killed += is_killed(error)
            if killed == ATTEMPTS or not (is_killed(error) or isinstance(error, LostError)):
                raise
        tasks = clone(tasks)  # under other keys, and without homes
