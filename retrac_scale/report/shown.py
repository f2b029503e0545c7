"""Whether the pictures on a page are those that were sketched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.content import ChangedItemsError, listed, looks_like, stored_contents
from retrac_scale.datasets.base import pixels
from retrac_scale.store import SketchStore
from retrac_scale.store.reader import Words

Picture = npt.NDArray[np.uint8]


class Sketched:
    """What the samples of a store looked like when they were sketched.

    Args:
        store: from `sketch`; of others nothing is known.
        ids: of the samples that may be shown, `[n]`.
    """

    def __init__(self, store: SketchStore, ids: npt.NDArray[Any]) -> None:
        self.expected = "scheduler" in store.fingerprint
        self._shape: list[int] = store.plan.get("sample", [])
        self._words = dict(zip(ids.tolist(), stored_contents(store, ids), strict=True)) if self.expected else {}

    def shows(self, sample: Any, picture: Picture) -> bool | None:
        """Whether a picture is what was sketched of a sample; None where that is not known.

        A picture of another size is cut and resized as `ImageDataset` does it; if it then looks otherwise, it may have
        been cut in another way.
        """
        words: Words | None = self._words.get(sample)
        if words is None or len(self._shape) != 3 or self._shape[0] not in (1, 3):
            return None
        channels, height, width = self._shape
        whole = picture.shape[:2] == (height, width)
        like = looks_like(pixels(picture, channels, None if whole or height != width else height), words)
        return like if like or whole else None


def check_shown(sketched: Sketched, shown: Iterable[tuple[Any, Picture]]) -> str:
    """A sentence where it is not known of some pictures whether they are what was sketched; empty otherwise.

    Args:
        sketched: the store's samples.
        shown: ids and pictures.

    Raises:
        ChangedItemsError: pictures are not what was sketched.
    """
    found = [(sample, sketched.shows(sample, picture)) for sample, picture in shown]
    changed = [sample for sample, same in found if same is False]
    if changed:
        raise ChangedItemsError(
            f"{len(changed)} of {len(found)} pictures are not what was sketched under their ids: {listed(changed)}; "
            "sketch them anew with replace=True (--replace), or give the pictures that were sketched.",
            changed,
        )
    unknown = sum(same is None for _, same in found)
    if not unknown or not sketched.expected:
        return ""
    return f"of {unknown} of {len(found)} it cannot be told whether they are the pictures that were sketched"
