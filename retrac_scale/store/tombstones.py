"""Which samples of a part are deleted: marks in an array of their own, and what these marks may be after a deletion."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import zarr

from retrac_scale.store import objects
from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.schema import LIST_CHUNK, digest_of

KEPT, DELETED, UNKNOWN = 0, 1, 255
KEY = "deleted/digests"
"""JSON: digests that a chunk of marks may have, by its number; a chunk that no deletion wrote is not among them."""

Allowed = dict[str, list[str]]


def allowed(root: zarr.Group, place: str) -> Allowed:
    """The digests that chunks may have now; two of a chunk while a deletion writes it, or when it was cut short."""
    content = objects.read(root, KEY)
    if content is None:
        return {}
    try:
        found = {str(chunk): [str(digest) for digest in digests] for chunk, digests in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{place}/{KEY} is damaged ({error!r}); restore it from a backup.") from None
    return found


def allow(root: zarr.Group, digests: Mapping[str, list[str]]) -> None:
    """Say what chunks may be from now on."""
    objects.write_all(root, {KEY: json.dumps(digests).encode()})


def by_chunk(marks: npt.NDArray[np.uint8]) -> dict[str, str]:
    """BLAKE2b, 128 bits, of each chunk of the marks `[n]`."""
    chunks = (marks[start : start + LIST_CHUNK].tobytes() for start in range(0, len(marks), LIST_CHUNK))
    return {str(i): digest_of(chunk) for i, chunk in enumerate(chunks)}


def stale(marks: npt.NDArray[np.uint8], digests: Allowed) -> list[str]:
    """Numbers of the chunks that are not what the last deletion left."""
    return [chunk for chunk, digest in by_chunk(marks).items() if digest not in digests.get(chunk, [digest])]
