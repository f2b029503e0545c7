"""Running delayed tasks, here or on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask
import torch

if TYPE_CHECKING:
    from distributed import Client


def compute(tasks: list[Any], client: Client | None) -> list[Any]:
    """Results of delayed tasks, on the client's workers, or here on as many threads as torch is set to.

    Here, tasks run with one torch thread each, so that theirs and dask's do not compete; torch's setting is put back.
    """
    if client is not None:
        return list(client.gather(client.compute(tasks)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return list(dask.compute(*tasks, scheduler="threads", num_workers=threads))
    finally:
        torch.set_num_threads(threads)
