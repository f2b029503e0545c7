"""Processes that train together (torch.distributed), and what they tell each other."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

SAID = "retrac_scale"
"""Key under which the first process tells the others something."""

T = TypeVar("T")


def process_of_all() -> tuple[int, int]:
    """Number of this process and of all that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Go on when all have come here."""
    if process_of_all()[1] > 1:
        distributed.barrier()


def from_first(read: Callable[[], T]) -> T:
    """What the first process reads, on all of them, so that none sees what another has begun to write.

    What it raises is raised on all of them: otherwise the others would wait for it until the group gives up.

    It goes through the group's key-value store. Tensors that Python made are freed by gloo's threads, which need the
    interpreter's lock for it; a process that ends meanwhile holds that lock and waits for those threads, for ever.
    """
    process, processes = process_of_all()
    if processes == 1:
        return read()
    store: Any = distributed.distributed_c10d._get_default_store()
    failure: Exception | None = None
    if process == 0:
        try:
            store.set(SAID, pickle.dumps((read(), None)))
        except Exception as error:
            failure = error
            store.set(SAID, pickle.dumps((None, _sendable(error))))
    distributed.barrier()
    answer = store.get(SAID)
    distributed.barrier()  # all have it, and the first may say something else
    said, told = pickle.loads(answer)
    if told is not None:
        raise failure or told
    return said  # type: ignore[no-any-return]


def _sendable(error: Exception) -> Exception:
    """An exception, or what it says where it cannot be pickled and opened again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
