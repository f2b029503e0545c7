"""A full check of a store, and the repair that can be made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import zarr
from zarr.storage import StorePath

from retrac_scale.store import commits, objects, tombstones
from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.opening import PARTS, WHAT, check_description
from retrac_scale.store.part import ROOT, Part, check_root, lay_out
from retrac_scale.store.schema import ATTRIBUTE, LIST_CHUNK, Url, digest_of, zarr_location

Kind = Literal["metadata", "damaged", "unwritten", "stray", "foreign"]


@dataclass(frozen=True)
class Finding:
    """One object that is not as it should be.

    Attributes:
        kind: "metadata" serves a whole part; "damaged" belongs to a committed block; "unwritten" is the missing commit
            record of a block; "stray" was left by a process that was killed; "foreign" is no part of a store.
        key: the object, relative to the store.
        problem: what is wrong with it.
        checkpoint: whose block it belongs to, None when it belongs to none.
        samples: positions of the block's samples within its part, None likewise.
        part: name of its part, "" for the one at the root.
    """

    kind: Kind
    key: str
    problem: str
    checkpoint: str | None = None
    samples: slice | None = None
    part: str = ""

    def __str__(self) -> str:
        if self.checkpoint is None or self.samples is None:
            return f"{self.key}: {self.problem}"
        samples = f"samples {self.samples.start} .. {self.samples.stop - 1}"
        return f"checkpoint {self.checkpoint}, {samples}: {self.key}: {self.problem}"


@dataclass(frozen=True)
class Verdict:
    """What a full check of `blocks` blocks found."""

    blocks: int
    findings: list[Finding]

    def of(self, *kinds: Kind) -> list[Finding]:
        """The findings of some kinds."""
        return [finding for finding in self.findings if finding.kind in kinds]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged; blocks may still be unwritten."""
        return not self.of("metadata", "damaged")

    @property
    def is_whole(self) -> bool:
        """Whether nothing is damaged and every block is written."""
        return self.is_sound and not self.of("unwritten")


def verify_store(url: Url | zarr.Group) -> Verdict:
    """Read every object of a store and compare it with digests and commit records.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: something else is there, or a store of a newer format.
    """
    place = _place(url)
    keys = set(objects.all_keys(place))
    if not any(key.rpartition("/")[2] == ROOT for key in keys):
        raise FileNotFoundError(f"there is no {WHAT} at {url}.")
    inside = [key for key in keys if key.startswith(f"{PARTS}/") and key.count("/") > 1]
    names = sorted({key.split("/")[1] for key in inside if not key.endswith(".partial")})  # alone, they are no part
    known = {f"{PARTS}/{ROOT}"} if inside else set()
    findings, blocks = [], 0
    for name in ["", *names]:
        prefix = _prefix(name)
        own = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        if not name:
            own = {key for key in own if not key.startswith(f"{PARTS}/")}
        opened = _open(place, name)
        if isinstance(opened, Part):
            blocks += len(opened.blocks) * len(opened.meta["checkpoints"])
            findings += [replace(finding, key=prefix + finding.key) for finding in _check_part(opened, own)]
            known |= {prefix + key for key in _keys(opened)}
        else:
            findings.append(opened)
            known |= {prefix + key for key in own}
    return Verdict(blocks, findings + [_unknown(key) for key in sorted(keys - known)])


def repair_store(url: Url | zarr.Group) -> list[Finding]:
    """Restore metadata that follows from the description, and drop what is damaged and what killed processes left.

    No other process may be writing. A block of which something was dropped is no longer committed: `sketch(...)`
    computes it again, and `write_store(...)` writes it again. What is no part of a store is left alone.

    Returns:
        what is beyond repair, and has to come from a backup; nothing is dropped or removed then.
    """
    place = _place(url)
    beyond = [finding for finding in verify_store(url).of("metadata") if not _restore(place, finding)]
    if beyond:
        return beyond
    verdict = verify_store(url)
    for finding in verdict.of("damaged"):
        part = _open(place, finding.part)
        assert isinstance(part, Part)
        assert finding.checkpoint is not None
        assert finding.samples is not None
        block = finding.samples.start // part.meta["block_samples"]
        objects.delete_all(part.root, [commits.commit_key(finding.checkpoint, block)])  # first: it vouches for the rest
        objects.delete_all(place, [finding.key])
    objects.delete_all(place, [finding.key for finding in verdict.of("stray")])
    return []


def _unknown(key: str) -> Finding:
    if key.endswith(".partial"):
        return Finding("stray", key, "was left by a process that was killed")
    return Finding("foreign", key, "is no part of the store; it is left alone")


def _place(url: Url | zarr.Group) -> StorePath:
    if isinstance(url, zarr.Group):
        return url.store_path
    return objects.place_of(zarr_location(url))


def _prefix(name: str) -> str:
    return f"{PARTS}/{name}/" if name else ""


def _open(place: StorePath, name: str) -> Part | Finding:
    """A part, or what keeps it from being opened."""
    key = _prefix(name) + ROOT
    content = objects.read(place, key)
    if content is None:
        return Finding("metadata", key, "is missing", part=name)
    try:
        attribute = json.loads(content)["attributes"][ATTRIBUTE]
        if attribute.get("creating") is True:
            return Finding("unwritten", key, "was not laid out to the end", part=name)
        meta = attribute if attribute.get("what") == "index" else check_root(content, _prefix(name))  # refused below
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Finding("metadata", key, f"is damaged ({error!r})", part=name)
    check_description(attribute, WHAT, f"{place}/{_prefix(name)}")
    path = f"{place.path}/{_prefix(name)}".strip("/")
    return Part(zarr.open_group(place.store, path=path or None, mode="r+"), meta, name, f"{place}/{path}".rstrip("/"))


def _keys(part: Part) -> set[str]:
    """The keys of all objects that a part may have."""
    keys = {ROOT, tombstones.KEY, *part.meta["digests"]}
    keys |= {f"deleted/c/{i}" for i in range(-(-part.shape[0] // LIST_CHUNK))}
    for checkpoint in part.meta["checkpoints"]:
        for block in range(len(part.blocks)):
            keys |= {commits.commit_key(checkpoint, block), commits.aside_key(checkpoint, block)}
            keys |= {part.chunk_key(checkpoint, quantity, block) for quantity in part.meta["quantities"]}
    return keys


def _check_part(part: Part, there: set[str]) -> Iterator[Finding]:
    """What is wrong with the objects of a part; `there` are the keys it has."""
    broken = set()
    for key, content in objects.read_all(part.root, part.meta["digests"]).items():
        if content is None or digest_of(content) != part.meta["digests"][key]:
            broken.add(key)
            problem = "is missing" if content is None else "is damaged: it does not have its digest"
            yield Finding("metadata", key, problem, part=part.name)
    if f"deleted/{ROOT}" not in broken:
        try:
            _ = part.deleted
        except DamagedStoreError as error:
            yield Finding("metadata", "deleted/c", str(error), part=part.name)
    for checkpoint in part.meta["checkpoints"]:
        sound = [q for q in part.meta["quantities"] if f"{checkpoint}/{q}/{ROOT}" not in broken]
        for block, samples in enumerate(part.blocks):
            for kind, key, problem in _check_block(part, checkpoint, block, sound, there):
                yield Finding(kind, key, problem, checkpoint, samples, part.name)


def _check_block(
    part: Part, checkpoint: str, block: int, quantities: list[str], there: set[str]
) -> Iterator[tuple[Kind, str, str]]:
    """Kind, key and problem of each object of a block that is not what was committed."""
    try:
        record = part.record(checkpoint, block)
    except DamagedStoreError as error:
        yield "damaged", commits.commit_key(checkpoint, block), f"is damaged ({error})"
        return
    if record is None:
        data = [q for q in quantities if part.chunk_key(checkpoint, q, block) in there]
        problem = f"is missing, though {', '.join(data)} are there" if data else "is missing: not written yet"
        yield "unwritten", commits.commit_key(checkpoint, block), problem
        return
    for quantity in quantities:
        key = part.chunk_key(checkpoint, quantity, block)
        if key not in there:
            yield "damaged", key, "is missing"
            continue
        try:
            values = part.read_through(checkpoint, quantity, block, record)
        except DamagedStoreError as error:
            yield "damaged", key, f"is damaged ({error})"
            continue
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            yield "damaged", key, "holds NaN or infinite values"
        elif quantity in ("scale", "norm") and (values < 0).any():
            yield "damaged", key, "holds negative values"


def _restore(place: StorePath, finding: Finding) -> bool:
    """Write a metadata file again that follows from its part's description; False when it cannot be known."""
    key = finding.key.removeprefix(_prefix(finding.part))
    part = _open(place, finding.part)
    if isinstance(part, Finding) or not key.endswith(f"/{ROOT}"):
        return False
    meta = {name: value for name, value in part.meta.items() if name not in ("digests", "digest")}
    blank: dict[str, Any] = {
        name: np.zeros(part.shape[0], "U1" if kind == "string" else kind) for name, kind in meta["columns"].items()
    }
    laid_out = lay_out(meta, blank.pop("id"), blank)[key]
    content = laid_out if isinstance(laid_out, bytes) else laid_out.to_bytes()
    if digest_of(content) != part.meta["digests"][key]:
        return False
    objects.write_all(part.root, {key: content})
    return True
