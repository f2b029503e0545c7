"""One process of a machine at a time at a place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from zarr.storage import LocalStore, StorePath

from retrac_scale.store.schema import Url


@contextlib.contextmanager
def alone(place: StorePath, out: Url, *, wait: bool = True) -> Iterator[None]:
    """Keep others out of a folder, which is made; the lock ends with the process that holds it.

    Places elsewhere than on a disk, and systems without such locks, have none.

    Args:
        place: a store or an index.
        out: its path, for messages.
        wait: until another process is done; otherwise it is an error.

    Raises:
        ValueError: there is a file, or another process writes there.
    """
    if not isinstance(place.store, LocalStore):
        yield
        return
    folder = Path(place.store.root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{out} is a file; choose another path.") from None
    except NotADirectoryError:
        raise ValueError(f"{out} is below a file; choose another path.") from None
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"somebody else is writing to {out}; wait until they are done.") from None
    except OSError:  # a file system that has no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
