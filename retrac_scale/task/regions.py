"""A part of each picture: the pixels that a loss is taken over, and what they are in the model's space."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrac_scale.task.asking import Asked
from retrac_scale.task.items import Item, Within, dataset_ids

REGION = " region"
"""Beside a sample's conditioning; no argument of a forward has a space in its name."""


@dataclass(frozen=True, eq=False)
class AllBut:
    """The rest of a picture: what a region leaves out.

    Attributes:
        region: a mask or box, or one for each sample.
    """

    region: Any


class Regions(Asked):
    """A dataset whose samples are asked about in a part of them: map-style, for `sketch` and `Samples`.

    The measured function of a sample becomes the mean over its entries of what it was, each multiplied with how much of
    it lies in the region: the weighted mean over the region times the region's share of the picture. So regions that
    make up a picture have gradients that add up to the picture's.

    Args:
        dataset: map-style, as for `sketch`.
        region: masks of pixels in 0 .. 1, an array `[h, w]` for all samples, `[n, h, w]` or, of videos, `[n, f, h, w]`
            for each; a box `(x0, y0, x1, y1)`, of videos also `(x0, y0, x1, y1, f0, f1)`, pixels and frames from the
            first to before the last, or a list of one for each sample; `AllBut` of any of these; or {name: any of
            these}: then every sample is asked about once for each name, and has the id "id: name".

    Attributes:
        region: in words, for the fingerprint of a store.

    Raises:
        ValueError: a region is empty, no mask or box, or they are not as many as the samples.
    """

    def __init__(self, dataset: Any, region: Any) -> None:
        given = dict(region) if isinstance(region, Mapping) else {"": region}
        if not given:
            raise ValueError("region={} names no region; give a mask, a box, or {name: mask or box}.")
        dataset_ids(dataset)  # says what is wrong with a dataset
        for name, one in given.items():
            _check(one, len(dataset), f"region {name!r}" if isinstance(region, Mapping) else "region")
        plain = {name: _plain(one) for name, one in given.items()}
        super().__init__(dataset, plain if isinstance(region, Mapping) else plain[""])
        words = {str(name): _described(one) for name, one in plain.items()}
        self.region = words if isinstance(region, Mapping) else words[""]

    def asked(self, item: Any, way: Any, row: int) -> Within:
        """See `Asked`."""
        return Within(item, _of_sample(way, row))


def pixel_mask(number: Any, item: Item, cell: tuple[int, int] | None, frames_first: bool) -> Tensor:
    """An item's region as a mask of its pixels, float32 `[h, w]`, or `[f, h, w]` where frames differ.

    Args:
        number: names the item in errors.
        item: pixels or latents, and the region.
        cell: how many frames and rows or columns of pixels a VAE makes one of; None where there is none.
        frames_first: whether a video is `[f, c, h, w]`.

    Raises:
        ValueError: the region is of another size, reaches outside, or is smaller than one of the model's cells.
    """
    shape = tuple(item.sample.shape)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"dataset item {number} has shape {shape}; regions are of pictures [c, h, w] and videos [c, f, h, w]."
        )
    size = [*((shape[0 if frames_first else 1],) if len(shape) == 4 else ()), *shape[-2:]]
    time, space = cell or (1, _scale(item.region, size) if item.encoded else 1)
    if item.encoded:
        size = [1 + time * (frames - 1) for frames in size[:-2]] + [space * side for side in size[-2:]]
    mask = mask_of(number, item.region, tuple(size))
    covered = float(mask.sum()) / (space * space * (time if mask.ndim == 3 else 1))
    if covered < 1 - 1e-4:
        what = "a pixel" if space == 1 else f"one of the model's cells of {space} x {space} pixels"
        raise ValueError(f"the region of dataset item {number} covers {covered:.2g} of {what}; make it larger.")
    return mask


def cell_weights(mask: Tensor, shape: Sequence[int], frames_first: bool) -> Tensor:
    """How much of each of the model's cells lies in a mask: float32, `[1, ...]`, of one channel.

    Args:
        mask: of pixels, `[h, w]` or `[f, h, w]`.
        shape: of what the model takes, `[c, h, w]` or `[c, f, h, w]`.
        frames_first: whether it is `[f, c, h, w]`.
    """
    rows, columns = (_shares(*sizes) for sizes in zip(mask.shape[-2:], shape[-2:], strict=True))
    weights = rows @ mask @ columns.T
    if mask.ndim == 2:
        return weights.expand(*(1,) * (len(shape) - 2), -1, -1)
    weights = torch.einsum("gf,fhw->ghw", _shares_of_frames(len(mask), shape[0 if frames_first else 1]), weights)
    return weights.unsqueeze(1 if frames_first else 0)


def _scale(region: Any, size: Sequence[int]) -> int:
    """How many pixels in each direction are one latent, where nothing but the size of a mask tells."""
    while isinstance(region, AllBut):
        region = region.region
    return max(1, region.shape[-1] // size[-1]) if isinstance(region, np.ndarray) else 1


def _shares(pixels: int, cells: int) -> Tensor:
    """Means over the pixels that cells cover, each by how much of it they do, `[cells, pixels]`."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    return _means(edges, pixels)


def _shares_of_frames(frames: int, latents: int) -> Tensor:
    """The same for frames: a causal VAE has a latent of its own for the first one.

    It takes 1 + r x m frames for even r; as many as cannot be cut into equal groups of an even number.
    """
    ratio, rest = divmod(frames - 1, max(latents - 1, 1))
    if latents > 1 and rest == 0 and (ratio == 1 or ratio % 2 == 0):
        return _means(torch.cat([torch.zeros(1), 1 + ratio * torch.arange(latents)]).double(), frames)
    return _shares(frames, latents)


def _means(edges: Tensor, pixels: int) -> Tensor:
    places = torch.arange(pixels)
    overlap = torch.minimum(edges[1:, None], places + 1.0) - torch.maximum(edges[:-1, None], places)
    overlap = overlap.clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def mask_of(number: Any, region: Any, size: tuple[int, ...]) -> Tensor:
    """A region of a dataset item as a mask, float32, of pixels `[h, w]` or `[f, h, w]`; ValueError if it is none."""
    if isinstance(region, AllBut):
        return 1 - mask_of(number, region.region, size)
    told = " x ".join(map(str, (*size[-2:][::-1], *size[:-2])))
    if isinstance(region, np.ndarray):
        if region.shape not in (size, size[-2:]):
            raise ValueError(
                f"the mask of dataset item {number} has shape {region.shape}, and the picture {size}; give one of the "
                "picture's rows and columns."
            )
        return torch.from_numpy(region.astype(np.float32))
    ends = (*size[-2:][::-1], *(size[:-2] or (1,)))
    if any(last > end for last, end in zip((*region[2:4], *region[5:]), ends, strict=False)):
        raise ValueError(
            f"the box {_box(region)} reaches outside of dataset item {number}, which has {told} pixels"
            f"{' and frames' if len(size) == 3 else ''}; give x0, y0, x1, y1 within it."
        )
    x0, y0, x1, y1, *frames = region
    mask = torch.zeros(size if frames and len(size) == 3 else size[-2:])
    if frames and len(size) == 3:
        mask[frames[0] : frames[1], y0:y1, x0:x1] = 1
    else:
        mask[y0:y1, x0:x1] = 1
    return mask


def _is_box(region: Any) -> bool:
    return isinstance(region, (tuple, list)) and all(isinstance(x, Integral) for x in region) and len(region) > 0


def _array(region: Any) -> Any:
    """Masks as NumPy has them; None for what is no array."""
    if isinstance(region, Tensor):
        return region.detach().cpu().numpy()
    return region if isinstance(region, np.ndarray) else None


def _check(region: Any, count: int, what: str) -> None:
    """Raise ValueError for a region, of all samples or one for each, that can be none whatever the pictures' size."""
    if isinstance(region, AllBut):
        return _check(region.region, count, what)
    array = _array(region)
    if array is None and not _is_box(region):
        if not isinstance(region, (tuple, list)):
            raise ValueError(
                f"{what} is {region!r}; give a mask, an array [h, w] in 0 .. 1, or a box (x0, y0, x1, y1)."
            )
        if len(region) != count:
            raise ValueError(
                f"{what} has {len(region)} entries for {count} samples; give one for each, or one for all."
            )
        for row, one in enumerate(region):
            _check_one(one, f"{what}, entry {row},")
    elif array is not None and array.ndim > 2:
        if len(array) != count:
            raise ValueError(
                f"{what} has {len(array)} masks for {count} samples; give one for each, [n, h, w], or one for all, "
                "[h, w]."
            )
        for row, one in enumerate(array):
            _check_one(one, f"{what}, mask {row},")
    else:
        _check_one(region, what)
    return None


def _check_one(region: Any, what: str) -> None:
    if isinstance(region, AllBut):
        return _check_one(region.region, what)
    array = _array(region)
    if array is not None:
        if array.ndim not in (2, 3) or array.dtype.kind not in "bfui":
            raise ValueError(f"{what} has shape {array.shape} and dtype {array.dtype}; give numbers in 0 .. 1, [h, w].")
        if not (np.isfinite(array).all() and array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise ValueError(f"{what} has entries outside of 0 .. 1; divide a picture of 8 bits by 255.")
        if not array.any():
            raise ValueError(f"{what} is empty: its mask is zero everywhere.")
        return None
    if not _is_box(region) or len(region) not in (4, 6):
        raise ValueError(f"{what} is {region!r}; give a box as (x0, y0, x1, y1), of videos (x0, y0, x1, y1, f0, f1).")
    if min(region) < 0:
        raise ValueError(f"{what} is the box {_box(region)}, which reaches outside; pixels begin at 0.")
    if not all(first < last for first, last in ((region[0], region[2]), (region[1], region[3]), region[4:] or (0, 1))):
        raise ValueError(f"{what} is the box {_box(region)}, which is empty; the first of a pair must be the smaller.")
    return None


def _plain(region: Any) -> Any:
    """A checked region with NumPy's arrays for masks, tuples for boxes, lists for several."""
    if isinstance(region, AllBut):
        return AllBut(_plain(region.region))
    if (array := _array(region)) is not None:
        return array
    return tuple(map(int, region)) if _is_box(region) else [_plain(one) for one in region]


def _of_sample(region: Any, row: int) -> Any:
    """The region of one sample; what is one for all is the same for each."""
    if isinstance(region, AllBut):
        return AllBut(_of_sample(region.region, row))
    each = isinstance(region, list) or (isinstance(region, np.ndarray) and region.ndim > 2)
    return region[row] if each else region


def _described(region: Any) -> str:
    if isinstance(region, AllBut):
        return f"all but {_described(region.region)}"
    if isinstance(region, np.ndarray) and region.ndim == 2:
        content = np.ascontiguousarray(region, np.float32).tobytes()
        return f"mask {hashlib.blake2b(content, digest_size=8).hexdigest()}"
    return f"box {_box(region)}" if isinstance(region, tuple) else "one for each sample"


def _box(region: Sequence[int]) -> str:
    return ",".join(map(str, region))
