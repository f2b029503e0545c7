"""When a store was last changed, as the modification times of its folders tell."""

from __future__ import annotations

import time

from zarr.storage import LocalStore

from retrac_scale.store.reader import SketchStore

SETTLED_NS = 10**9
Stamp = tuple[int, ...]


def stamp_of(store: SketchStore) -> Stamp | None:
    """Modification times of all that changes when a store on disk does; None where they cannot tell.

    Every change of a store adds or replaces a file by renaming, which sets the time of its folder. Clocks of file
    systems tick in milliseconds, so that a stamp counts only when its youngest time is some time ago.
    """
    if not isinstance(store.root.store, LocalStore):
        return None
    base = store.root.store.root
    places = [base, base / "parts"]
    for part in store.parts:
        folder = base / part.root.path
        places += [folder, folder / "deleted" / "c", *(folder / name / "commit" for name in part.checkpoints)]
    try:
        times = [place.stat().st_mtime_ns for place in places if place.name != "parts" or place.exists()]
    except FileNotFoundError:
        return None
    return tuple(times) if time.time_ns() - max(times) > SETTLED_NS else None
