"""A picture in views: as it is, moved, smaller or larger, lighter or darker, each asked about with its region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from retrac_scale.columns import check_ids
from retrac_scale.task.asking import Asked
from retrac_scale.task.items import LATENTS, SAMPLE_KEYS, About, Within, dataset_ids
from retrac_scale.task.regions import mask_of


@dataclass(frozen=True)
class View:
    """How a picture is seen.

    Attributes:
        right: how far it is moved, in widths.
        down: in heights.
        size: what it is enlarged by, about its middle.
        light: what its brightness, -1 being black, is multiplied with.
    """

    right: float = 0.0
    down: float = 0.0
    size: float = 1.0
    light: float = 1.0

    def of(self, images: Tensor) -> Tensor:
        """Images in -1 .. 1, `[n, c, h, w]`; what comes in from outside is as the edge was."""
        placed = self.placed(images, "border")
        return placed if self.light == 1 else ((placed + 1) * self.light - 1).clamp(-1, 1)

    def placed(self, images: Tensor, outside: str) -> Tensor:
        """The same in their own light; `outside` is "border", or "zeros" for masks."""
        if (self.right, self.down, self.size) == (0, 0, 1):
            return images
        back = [[1 / self.size, 0, -2 * self.right / self.size], [0, 1 / self.size, -2 * self.down / self.size]]
        turned = torch.tensor(back, dtype=images.dtype).expand(len(images), 2, 3)
        grid = F.affine_grid(turned, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)


STEP = 1 / 16
VIEWS = {
    "as it is": View(),
    "moved right": View(right=STEP),
    "moved left": View(right=-STEP),
    "moved down": View(down=STEP),
    "moved up": View(down=-STEP),
    "smaller": View(size=0.9),
    "larger": View(size=1.1),
    "lighter": View(light=1.1),
    "darker": View(light=0.9),
}
"""A training picture need not lie where a query has its like, nor have its size or light."""


class Views(Asked):
    """A dataset whose pictures are seen in each of `VIEWS`, regions moving along.

    Asked about, as `Samples(views=True)` does, they find what may have been changed on its way into a query. Sketched
    as training samples, of which `query(..., group_by="sample", reduce="max")` counts the best view, they find it more
    often, in nine times the store. A view that would take more than half of a region out of the picture is the picture
    as it is.

    Args:
        dataset: map-style, of pictures `[c, h, w]` in -1 .. 1; may be `Regions` or `Concepts`.

    Attributes:
        ids: "id: view", all views of a sample one after the other.
        whose: ids of the samples that they are views of, `[n views]`; also a column, "sample".

    Raises:
        ValueError: the dataset has a column of that name.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, VIEWS)
        self.whose = np.repeat(check_ids(dataset_ids(dataset), len(dataset)), len(VIEWS))
        if "sample" in (given := self.columns or {}):
            raise ValueError("a column 'sample' is to tell whose view each picture is; rename the dataset's own.")
        self.columns = {**given, "sample": self.whose}

    def asked(self, item: Any, way: Any, row: int) -> Any:
        """See `Asked`."""
        return item if way == View() else _seen(item, way, row)


def _seen(item: Any, view: View, row: int) -> Any:
    if isinstance(item, About):
        return replace(item, item=_seen(item.item, view, row))
    if isinstance(item, Within):
        picture = _picture(item.item, row)
        mask = mask_of(row, item.region, tuple(picture.shape[-2:]))
        moved = view.placed(mask[None, None], "zeros")[0, 0]
        return item if 2 * moved.sum() < mask.sum() else Within(_seen(item.item, view, row), moved.numpy())
    picture = view.of(_picture(item, row)[None])[0]
    if isinstance(item, Mapping):
        key = next(key for key in SAMPLE_KEYS if key in item)
        return {**item, key: picture}
    return (picture, *item[1:]) if isinstance(item, (tuple, list)) else picture


def _picture(item: Any, row: int) -> Tensor:
    """The pixels of an item; ValueError where it has none that can be seen otherwise."""
    if isinstance(item, (Within, About)):
        return _picture(item.item, row)
    if isinstance(item, Mapping):
        key = next((key for key in SAMPLE_KEYS if key in item), LATENTS)
        picture = None if key == LATENTS else item[key]
    else:
        picture = item[0] if isinstance(item, (tuple, list)) else item
    if not isinstance(picture, Tensor) or picture.ndim != 3:
        raise ValueError(f"dataset item {row} is no picture [c, h, w] of pixels, and views are of such.")
    return picture
