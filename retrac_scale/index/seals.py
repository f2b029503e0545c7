"""The seal of an index: what each of its objects held when it was written, in its sealed description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import SuffixByteRequest

from retrac_scale.index.segments import UNSEALED, holds
from retrac_scale.store import objects
from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.mapping import CRC_BYTES, crc32c
from retrac_scale.store.opening import open_root
from retrac_scale.store.part import NO_DIGEST, ROOT, check_root, sealed
from retrac_scale.store.schema import ATTRIBUTE, Url

Seals = Mapping[str, int]
"""For each object below a group, by key: the CRC-32C that a chunk ends with, that of the whole of any other."""


def seal(root: zarr.Group, meta: Mapping[str, Any], known: Seals) -> dict[str, Any]:
    """Write an index's description with the seals of its objects, and with a digest of its own; returns it.

    Args:
        root: its group.
        meta: the description.
        known: seals of objects that stood before; the others that it holds are sealed now.
    """
    held = [key for key in objects.all_keys(root) if holds(meta, key)]
    keys = [key for key in held if key not in known]
    chunks = [key for key in keys if not key.endswith(ROOT)]
    tails = objects.read_all(root, chunks, SuffixByteRequest(CRC_BYTES))
    whole = objects.read_all(root, [key for key in keys if key.endswith(ROOT)])
    seals = {key: known[key] for key in held if key in known}
    seals |= {key: _stored(tail) for key, tail in tails.items()} | {key: _crc(x) for key, x in whole.items()}
    content = sealed({**meta, "seals": dict(sorted(seals.items())), "digest": NO_DIGEST})
    objects.write_all(root, {ROOT: content})
    described: dict[str, Any] = json.loads(content)["attributes"][ATTRIBUTE]
    return described


def description(root: zarr.Group, place: Any) -> dict[str, Any]:
    """The description of a group, compared with its digest where it has one: earlier releases gave it none.

    Raises:
        DamagedStoreError: it is not, byte for byte, what was written.
    """
    attribute: dict[str, Any] = dict(root.attrs[ATTRIBUTE])  # type: ignore[arg-type]
    if not attribute.get("complete"):
        return attribute
    content = objects.read(root, ROOT) or b""
    return check_root(content, str(place)) if b'"digest"' in content else attribute


def verify_index(url: Url) -> list[str]:
    """Read every object of an index and compare it with its seal; what is wrong, a line for each object.

    Raises:
        FileNotFoundError: nothing is there.
        DamagedStoreError: the description is damaged.
        ValueError: something else is there, an unfinished index, or one of an earlier release without seals.
    """
    root = open_root(url, "index")
    meta = description(root, url)
    if not meta.get("complete"):
        raise ValueError(f"the index at {url} was not finished; run its build_index(...) again.")
    if "seals" not in meta:
        raise ValueError(f"the index at {url} is of an earlier release, which did not seal it; build the index again.")
    strays = sorted(set(objects.all_keys(root)) - meta["seals"].keys() - set(UNSEALED))
    found = [f"{key}: {problem}" for key, problem in problems(root, meta["seals"])]
    return found + [f"{key}: belongs to nothing; a killed process may have left it" for key in strays]


def check(root: zarr.Group, seals: Seals, keys: list[str], place: Any) -> None:
    """Raise DamagedStoreError unless objects are those that were sealed; those without a seal are passed over."""
    for key, problem in problems(root, {key: seals[key] for key in keys if key in seals}):
        raise DamagedStoreError(f"{place}/{key} {problem}; build the index again.")


def problems(root: zarr.Group, seals: Seals) -> list[tuple[str, str]]:
    """Keys of the objects that are not what was sealed, and what is wrong with each."""
    found = []
    for key in seals:  # one at a time: a chunk is tens of megabytes
        content = objects.read(root, key)
        if content is None:
            found.append((key, "is missing"))
        elif key.endswith(ROOT):
            if _crc(content) != seals[key]:
                found.append((key, "is not what was written"))
        elif _stored(content[-CRC_BYTES:]) != seals[key]:
            found.append((key, "is not the chunk that belongs there"))
        elif _crc(content[:-CRC_BYTES]) != seals[key]:
            found.append((key, "fails its checksum"))
    return found


def _stored(tail: bytes | None) -> int:
    return int.from_bytes(tail or b"", "little")


def _crc(content: bytes | None) -> int:
    return crc32c(np.frombuffer(content or b"", np.uint8))
