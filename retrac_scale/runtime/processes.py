"""Worker processes on this machine, for as long as they are needed, or those of a scheduler that is there."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S = 10
QUIET = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__MONITOR_INTERVAL": "1s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "500ms",
}
"""Dask's watching of itself, which costs what every core could compute."""


def dask_setup(worker: object) -> None:
    """Run by Dask in each of the processes: an interrupt from the keyboard, which reaches all, is the caller's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def workers(told: str) -> Iterator[Client]:
    """A client of workers.

    Args:
        told: how many processes of one thread to run on this machine while inside; or a Dask scheduler's address, such
            as "tcp://host:8786".

    Raises:
        ValueError: it is neither, or there is no scheduler.
    """
    from distributed import Client, LocalCluster

    if told.isdecimal() and int(told) > 0:
        count = int(told)
        # without a limit of memory, for batches are made to fit
        options = {"memory_limit": 0, "dashboard_address": None, "env": QUIET, "preload": [__name__]}
        with (
            LocalCluster(n_workers=count, threads_per_worker=1, processes=True, **options) as cluster,
            Client(cluster) as client,
        ):
            client.wait_for_workers(count)
            yield client
        return
    if ":" not in told:
        raise ValueError(f"{told!r} is neither a number of processes nor the address of a scheduler, tcp://host:8786.")
    try:
        client = Client(told, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no Dask scheduler at {told}: {error}.") from None
    with client:
        yield client
