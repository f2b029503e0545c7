"""What of an index that is there can stay: all of it, all but new samples, or nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from retrac_scale.arrays import Bools
from retrac_scale.estimators import Estimator
from retrac_scale.estimators.ridge import BY_QUERIES, is_firm
from retrac_scale.index import seals
from retrac_scale.index.reader import IndexReader, only_grown
from retrac_scale.index.segments import ARRAYS, DELETED, MOST, RIDGE, Segment, write_packed
from retrac_scale.store import DamagedStoreError, SketchStore, objects
from retrac_scale.store.opening import open_root
from retrac_scale.store.part import ROOT
from retrac_scale.store.schema import ATTRIBUTE, Url, differences, digest_of

logger = logging.getLogger(__name__)

ASKED = ("format", "store", "measure", "estimator", "dtype")
"""What of an index's description was asked for; the rest is what its store was when it was built."""
STATE = ("revision", "parts")
"""What of it tells the state of the store."""
FOUND = ("complete", "fit", "gains", "ridge", "segments", "deleted", "covered", "seals", "digest")
"""What came out of building."""


def stored_description(location: Any, out: Url) -> Any:
    """The description of what is at `out`: None when nothing is, or an index whose description cannot be read."""
    try:
        return zarr.open_group(location, mode="r").attrs.get(ATTRIBUTE, {})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        place = objects.place_of(location)
        if None in objects.read_all(place, [f"{name}/{ROOT}" for name in ARRAYS[:3]]).values():
            raise ValueError(f"{out} holds something damaged that is no index: {error}; choose another path.") from None
        logger.warning("%s is damaged and built again: %s", out, error)
        return None


def kept_index(out: Url, stored: Any, meta: Mapping[str, Any], store: SketchStore) -> IndexReader | None:
    """The index that is at `out` already; None where one is to be built there.

    Raises:
        ValueError: something else is there, or another index.
    """
    if stored is None:
        return None
    if not isinstance(stored, dict) or stored.get("what") != "index":
        raise ValueError(f"{out} holds something that is no index; choose another path.")
    if not stored.get("complete"):
        return None
    found = differences(_without(stored, FOUND), meta)
    if not found and (sound := _if_sound(out, store)) is not None:
        return sound
    other = differences({key: stored[key] for key in ASKED}, {key: meta[key] for key in ASKED})
    if other or (found and meta["store"] is None):
        raise ValueError(f"{out} already holds a different index: {'; '.join(other or found)}; choose another path.")
    return None


def _if_sound(url: Url, store: SketchStore) -> IndexReader | None:
    """The complete index at a URL; None where it is on this disk and damaged. Queries check no file again."""
    try:
        index = IndexReader(open_root(url, "index"), url, store)
        if isinstance(index.root.store, LocalStore):
            for number in range(len(index.chunks)):
                index.chunk(number)
        _ = index.columns
    except (KeyError, ValueError) as error:
        logger.warning("%s is damaged and built again: %s", url, error)
        return None
    if "seals" not in index.meta:
        logger.warning("%s is of an earlier release, which did not seal it, and built again", url)
        return None
    return index


def is_readable(location: Any, stored: Any) -> bool:
    """Whether somebody may have a complete index open there."""
    if not isinstance(stored, dict) or not stored.get("complete") or "seals" not in stored:
        return False
    with contextlib.suppress(DamagedStoreError):
        seals.description(zarr.open_group(location, mode="r"), location)
        return True
    return False


def is_same(stored: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
    """Whether the description of an index says that it was built of what there is now."""
    return not differences(_without(stored, FOUND), meta)


def base_of(
    out: Url, stored: Any, meta: Mapping[str, Any], store: SketchStore, estimator: Estimator
) -> IndexReader | None:
    """The index at `out` where a further segment, and a mark of deleted samples, make it that of the store as it is."""
    if not isinstance(stored, dict) or "seals" not in stored or "covered" not in stored or is_same(stored, meta):
        return None
    if differences(_without(stored, (*FOUND, *STATE)), _without(meta, STATE)) or not only_grown(stored, meta["parts"]):
        return None
    if not _can_grow(stored, store, estimator):
        logger.info("%s is built whole: its rows depend on all samples, by the ridge of %s", out, estimator)
        return None
    try:
        base = IndexReader(open_root(out, "index"), out, store)
        _ = base.ridges
        rows = sum(one.shape[1] for one in base.segments)
        gone, back = _changed(base.segments, store.deleted)
    except (KeyError, ValueError) as error:
        logger.warning("%s is damaged and built again: %s", out, error)
        return None
    too_many = len(base.segments) >= MOST or 2 * np.count_nonzero(gone) > rows
    return None if back or too_many else base


def _can_grow(stored: Mapping[str, Any], store: SketchStore, estimator: Estimator) -> bool:
    """Whether an index's rows stay what they are when samples come and go; its ridge is then solved anew."""
    if estimator.damping is None:
        return True
    enough = int(np.count_nonzero(store.alive)) >= BY_QUERIES * store.shape[2]
    return bool(stored.get(RIDGE)) and enough and estimator.alone and is_firm(estimator.damping)


def mark_deleted(root: zarr.Group, segments: Sequence[Segment], deleted: Bools) -> str | None:
    """Write which rows are those of samples that are deleted now; the name of that mark, None where there are none."""
    gone, _ = _changed(segments, deleted)
    if not gone.any():
        return None
    # of other rows, another mark: that of the index that readers have open stays as it is
    name = digest_of(f"{len(gone)} ".encode() + np.packbits(gone).tobytes())[:8]
    write_packed(root, f"{DELETED}/{name}", gone)
    return name


def _changed(segments: Sequence[Segment], deleted: Bools) -> tuple[Bools, bool]:
    """Which rows of segments are deleted, and whether a sample is back that was deleted when they were written."""
    places = np.concatenate([one.places for one in segments])
    alive = sum(np.count_nonzero(~deleted[one.start : one.stop]) for one in segments)
    gone: Bools = deleted[places]
    return gone, bool(alive > np.count_nonzero(~gone))


def _without(description: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in description.items() if key not in names}
