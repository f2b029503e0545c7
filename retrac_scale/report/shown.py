"""Whether the pictures on a page are those that were sketched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.datasets.base import pixels
from retrac_scale.store import SketchStore
from retrac_scale.store.reader import Words

Picture = npt.NDArray[np.uint8]


def check_shown(store: SketchStore, ids: Sequence[Any], pictures: Iterable[Picture], *, exact: bool = False) -> str:
    """A sentence where it is not known of some pictures whether they are what was sketched; empty otherwise.

    Nothing is expected of stores that were made of arrays.

    Args:
        store: whose samples are shown.
        ids: of those shown.
        pictures: of each of them.
        exact: they come from the files that were sketched, and not by way of somebody's rounding.

    Raises:
        ChangedItemsError: pictures are not what was sketched.
    """
    if "scheduler" not in store.fingerprint:
        return ""
    from retrac_scale.sketching.content import ChangedItemsError, listed, stored_contents  # torch, which takes seconds

    shape, words = store.plan.get("sample", []), stored_contents(store, np.asarray(ids))
    exact = exact and bool(store.plan.get("pictures"))
    found = [_same(picture, shape, its, exact) for picture, its in zip(pictures, words, strict=True)]
    changed = [sample for sample, same in zip(ids, found, strict=True) if same is False]
    if changed:
        raise ChangedItemsError(
            f"{len(changed)} of {len(found)} pictures are not what was sketched under their ids: {listed(changed)}; "
            "sketch them anew with replace=True (--replace), or give the pictures that were sketched.",
            changed,
        )
    unknown = found.count(None)
    if not unknown:
        return ""
    those = f"the {unknown} pictures" if unknown == len(found) else f"{unknown} of {len(found)} pictures"
    return f"whether {those} are those that were sketched cannot be told"


def _same(picture: Picture, shape: Sequence[int], words: Words, exact: bool) -> bool | None:
    """Whether a picture is what was sketched of a sample; None where that is not known.

    A picture of another size is cut and resized as `ImageDataset` does it; if it then looks otherwise, it may have been
    cut in another way.
    """
    from retrac_scale.sketching.content import ITEM, digest_of, looks_like
    from retrac_scale.task.items import Item

    if len(shape) != 3 or shape[0] not in (1, 3):
        return None
    channels, height, width = shape
    whole = picture.shape[:2] == (height, width)
    if whole and exact and words[ITEM]:
        return digest_of(Item(pixels(picture, channels, None), {}, None, None, False)) == int(words[ITEM])
    like = looks_like(pixels(picture, channels, None if whole or height != width else height), words)
    return like if like or whole else None
