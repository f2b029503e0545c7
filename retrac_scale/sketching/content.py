"""What the items of a dataset hold, as words that tell another item under the same id."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrac_scale.store.reader import Words
from retrac_scale.store.schema import CONTENT_WORDS
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import Item, brought, seems_unit, warn_of_unit_range
from retrac_scale.task.regions import REGION

if TYPE_CHECKING:
    from retrac_scale.store import SketchStore

logger = logging.getLogger(__name__)

ITEM, LOOKS, STAMP = 0, slice(1, 3), 3
"""Words of a sample: a digest of all that its gradient is a function of, what it looks like, and the stamp of its file.

A word is 0 where it is not known.
"""
FIELDS = 4
"""A picture is seen as the means of so many rows and columns of fields, in 1 .. 255."""
SEVERAL = np.uint64(2**64 - 1)
"""In place of an item's digest, where blocks were computed from several items under one id."""
NEAR = 3
"""Levels of 255 by which such means may differ: those of one picture do, by rounding."""
FULL_CHECK_SAMPLES = 10_000
NAMED = 5


class ChangedItemsError(ValueError):
    """Items are not those that were sketched, or not the same twice.

    Attributes:
        ids: of the samples.
    """

    def __init__(self, message: str, ids: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.ids = list(ids)


def digest_of(item: Item) -> int:
    """A digest, 64 bits, of an item: another type of its numbers, or order of its keys, is no change."""
    digest = hashlib.blake2b(f"{item.encoded} {item.prompt!r}".encode(), digest_size=8)
    beside = {" label": item.label, REGION: item.region}
    if item.against is not None:
        against = digest_of(item.against) if isinstance(item.against, Item) else item.against
        digest.update(f"against {against} ".encode())
    given = {"": item.sample, **item.conditioning} | {name: x for name, x in beside.items() if x is not None}
    for name, value in sorted(given.items()):
        array = _array(value)
        if array.dtype.kind != "c":
            array = np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int64)
        digest.update(f"{name} {array.shape} ".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return int.from_bytes(digest.digest(), "little") or 1


def content_of(item: Item) -> Words:
    """The words of an item, `[4]`, without a stamp."""
    words = np.zeros(CONTENT_WORDS, np.uint64)
    words[ITEM] = digest_of(item)
    if not item.encoded and item.sample.ndim == 3 and item.sample.shape[0] in (1, 3):
        words[LOOKS] = _looks(_array(item.sample))
    return words


def _array(value: Tensor) -> npt.NDArray[Any]:
    plain = value.detach().cpu()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def _looks(sample: npt.NDArray[Any]) -> Words:
    """Two words of the sixteen means of a sample in -1 .. 1, `[c, h, w]`; zeros outside that range."""
    if not -1.001 <= sample.min() <= sample.max() <= 1.001:
        return np.zeros(2, np.uint64)
    _, height, width = sample.shape
    means = _fields(height) @ sample.mean(0, dtype=np.float32) @ _fields(width).T
    levels = np.rint((means + 1) * 127.5).clip(1, 255).astype(np.uint8)
    words: Words = levels.reshape(-1).view("<u8").astype(np.uint64)
    return words


@lru_cache(maxsize=16)
def _fields(size: int) -> npt.NDArray[np.float32]:
    """What makes means of fields out of rows or columns, `[4, size]`; those of fewer stand in several fields."""
    first = np.arange(FIELDS)[:, None] * size // FIELDS
    last = np.maximum((np.arange(FIELDS)[:, None] + 1) * size // FIELDS, first + 1)
    inside = (np.arange(size) >= first) & (np.arange(size) < last)
    means: npt.NDArray[np.float32] = (inside / inside.sum(1, keepdims=True)).astype(np.float32)
    return means


def looks_like(picture: Tensor, words: Words) -> bool | None:
    """Whether a picture, `[c, h, w]` in -1 .. 1, is what a sample looked like; None where that is not known."""
    if not words[LOOKS].any():
        return None
    both = (_looks(_array(picture)), words[LOOKS])
    shown, sketched = (two.astype("<u8").view(np.uint8).astype(int) for two in both)
    in_unit_range = 2 * sketched - 255  # the means of samples whose range is 0 .. 1
    return bool(np.abs(shown - sketched).max() <= NEAR or np.abs(shown - in_unit_range).max() <= 2 * NEAR)


def stamps_of(dataset: Any) -> Words:
    """The stamps that a dataset brings of the files of its items `[n]`, zeros where it brings none."""
    stamps = brought(dataset, "stamps")
    return np.zeros(len(dataset), np.uint64) if stamps is None else np.asarray(stamps, np.uint64)


def look_through(
    task: DiffusionTask, dataset: Any, ids: npt.NDArray[Any], stored: Words | None = None, *, every: bool = False
) -> tuple[Words, dict[str, Any]]:
    """Read and check all items of a small dataset, an even sample of a large one, and those whose file has changed.

    Warns where all pictures seem to be in 0 .. 1.

    Args:
        task: that the items are for.
        dataset: map-style.
        ids: of its samples, or of the first of them, `[n]`.
        stored: what was sketched of them, from `stored_contents`.
        every: read all of a large one too.

    Returns:
        the words of all items `[n, 4]`, of those not read but the stamp zeros; and for the plan of a store the shape of
        a sample, and whether the first item is a picture of 8 bits and nothing else.

    Raises:
        ValueError: an item is not as the task takes it, or of another shape than the first.
    """
    words = np.zeros((len(ids), CONTENT_WORDS), np.uint64)
    words[:, STAMP] = stamps_of(dataset)[: len(ids)]
    wanted = np.zeros(len(ids), bool)
    wanted[:: 1 if every else max(1, len(ids) // FULL_CHECK_SAMPLES)] = True
    if stored is not None:
        touched = (words[:, STAMP] != stored[:, STAMP]) & (words[:, STAMP] > 0) & (stored[:, ITEM] > 0)
        wanted |= touched | (stored[:, ITEM] == SEVERAL)
    shape: tuple[int, ...] = ()
    is_picture, unit = False, set()
    for row in np.flatnonzero(wanted).tolist():
        item = task.read_item(ids[row], dataset[row])
        if not shape:
            shape, is_picture = tuple(item.sample.shape), _is_picture(item)
        if tuple(item.sample.shape) != shape:
            raise ValueError(
                f"dataset item {ids[row]} has shape {tuple(item.sample.shape)}, but item {ids[0]} has {shape}; "
                "resize or crop all items to one shape in the dataset."
            )
        words[row, :STAMP] = content_of(item)[:STAMP]
        unit.add(seems_unit(item))
    if True in unit and False not in unit:
        warn_of_unit_range()
    return words, {"sample": list(shape), "pictures": is_picture}


def _is_picture(item: Item) -> bool:
    """Whether an item is what `pixels` makes of a picture."""
    sample = item.sample.detach().cpu().float()
    told = item.conditioning or item.label is not None or item.prompt is not None or item.encoded
    if told or sample.ndim != 3 or sample.shape[0] not in (1, 3):
        return False
    return torch.equal(((sample + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1, sample)


def stored_contents(store: SketchStore, ids: npt.NDArray[Any]) -> Words:
    """What was sketched of some samples, `[n, 4]`, zeros where nothing was; warns where that is not kept."""
    row_of = {sample: row for row, sample in enumerate(ids.tolist())}
    found = np.zeros((len(ids), CONTENT_WORDS), np.uint64)
    untold = False
    for written, words in store.written_contents(ids):
        rows = np.array([row_of.get(sample, -1) for sample in written.tolist()], np.int64)
        if words is None:
            untold = untold or bool((rows >= 0).any())
            continue
        rows, words = rows[rows >= 0], words[rows >= 0]
        several = (found[rows, ITEM] > 0) & (found[rows, ITEM] != words[:, ITEM])
        found[rows] = words
        found[rows[several], ITEM] = SEVERAL
    if untold:
        _say_untold(str(store.url or "the store"))
    return found


@lru_cache
def _say_untold(place: str) -> None:
    logger.warning(
        "%s keeps nothing of the items that it was made of, as an earlier release or a training wrote it: whether they "
        "are the same cannot be told.",
        place,
    )


def refuse(place: Any, remedy: str, changed: Sequence[Any], now: Words) -> None:
    """Raise ChangedItemsError: items are others than those that something was made of."""
    compared = np.count_nonzero(now[:, ITEM])
    raise ChangedItemsError(
        f"{place} was made of other items under the same ids: {len(changed)} of {compared} that were compared differ, "
        f"{listed(changed)}; {remedy}, or choose another path.",
        changed,
    )


def changed_items(task: DiffusionTask, dataset: Any, ids: npt.NDArray[Any], now: Words, stored: Words) -> list[Any]:
    """Ids of the samples that are known on both sides, and are others.

    Raises:
        ChangedItemsError: the first of them is another one each time that it is read.
    """
    differs = (now[:, ITEM] != stored[:, ITEM]) & (now[:, ITEM] > 0) & (stored[:, ITEM] > 0)
    rows = np.flatnonzero(differs)
    if len(rows):
        read_again(task, ids[rows[0]], dataset[int(rows[0])], now[rows[0]])
    changed: list[Any] = ids[rows].tolist()
    return changed


def read_again(task: DiffusionTask, number: Any, item: Any, known: Words) -> tuple[Item, Words]:
    """An item, checked and taken apart, and its words; it may have been read before.

    Raises:
        ChangedItemsError: it is another one this time.
    """
    found = task.read_item(number, item)
    if known[ITEM] == 0:
        words = content_of(found)
        words[STAMP] = known[STAMP]
        return found, words
    if known[ITEM] != digest_of(found):
        raise ChangedItemsError(
            f"dataset item {number} differs between two readings: turn off random augmentation (flips, crops, random "
            "captions, images drawn anew), and leave the files alone while they are sketched.",
            [number],
        )
    return found, known


def listed(ids: Sequence[Any]) -> str:
    """The first of some ids, and how many others there are."""
    some = ", ".join(repr(name) for name in ids[:NAMED])
    return some if len(ids) <= NAMED else f"{some} and {len(ids) - NAMED} more"
