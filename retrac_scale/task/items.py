"""What a dataset brings, and what an item of it holds: a sample, its conditioning, its prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from retrac_scale.columns import as_column

LATENTS = "latents"
SAMPLE_KEYS = (LATENTS, "image", "images", "pixel_values", "sample", "input", "video")
PROMPT_KEYS = ("prompt", "text", "caption")
LABEL_KEYS = ("label", "labels")
OF_ALL = ("frozen", "region", "concept")
"""What a dataset brings for all of its samples at once."""
LARGEST_PIXEL = 8.0
"""More than whitened pictures hold, and less than most of 0 .. 255."""
OFF_LEVEL = 0.05
"""Of levels of 8 bits, by which rounding does not miss one."""
CLASS_LABELS = "class_labels"
"""What diffusers' models call the argument that takes a label."""


@dataclass(frozen=True, eq=False)
class Within:
    """A dataset item, of which a part is asked about: a mask of pixels, a box, or `AllBut` of one."""

    item: Any
    region: Any


@dataclass(frozen=True, eq=False)
class About:
    """A dataset item that is asked about for a `Concept`."""

    item: Any
    concept: Any


def dataset_ids(dataset: Any) -> Any:
    """The ids that a dataset brings, None when it brings none; ValueError unless it is map-style and not empty."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError("the dataset must be map-style: it needs __len__ and __getitem__.")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty.")
    return brought(dataset, "ids")


def brought(dataset: Any, name: str) -> Any:
    """The `ids`, `columns`, ... of a dataset, None where it brings none; of a torch `Subset` those of its samples.

    A torch `ConcatDataset` that brings none itself has those of its parts, one after the other, where all bring them;
    what some bring in vain is warned of.

    Raises:
        ValueError: parts of a `ConcatDataset` bring different things of which all samples have one; names it.
    """
    if not isinstance(dataset, Subset):
        own = getattr(dataset, name, None)
        return _together(name, dataset.datasets) if own is None and isinstance(dataset, ConcatDataset) else own
    whole, rows = brought(dataset.dataset, name), list(dataset.indices)
    if whole is None or name in OF_ALL:
        return whole
    if name == "columns":
        return {key: as_column(values)[rows] for key, values in whole.items()}
    return np.asarray(whole)[rows]


def _together(name: str, parts: Sequence[Any]) -> Any:
    """What the parts of a `ConcatDataset` bring for it; see `brought`."""
    each = [brought(part, name) for part in parts]
    given = [one for one in each if one is not None]
    if name in OF_ALL:
        if any(one != given[0] for one in given):
            raise ValueError(f"the parts of the ConcatDataset differ in their {name}; sketch them one by one.")
        return given[0] if given else None
    if name == "columns":
        names = dict.fromkeys(column for one in given for column in one)
        of_all = [column for column in names if all(one and column in one for one in each)]
        if lost := [column for column in names if column not in of_all]:
            _warn_of_lacking(f"columns {lost}")
        return {column: np.concatenate([as_column(one[column]) for one in each]) for column in of_all}
    if name == "stamps":  # 0 where none is known
        given = [np.zeros(len(part), np.uint64) if one is None else one for one, part in zip(each, parts, strict=True)]
    if name == "ids" and all(np.array_equal(one, np.arange(len(one))) for one in given):
        return None  # numbered by themselves, so that the whole is numbered through
    if given and len(given) < len(each):
        _warn_of_lacking(name)
    return np.concatenate([np.asarray(one) for one in given]) if len(given) == len(each) else None


def _warn_of_lacking(what: str) -> None:
    """Warn that some parts of a `ConcatDataset` have what others lack; Python says it once."""
    warnings.warn(
        f"some parts of the ConcatDataset bring no {what}, so that those of the others are left out; give all parts "
        "such, or set them on the whole.",
        stacklevel=2,
    )


@dataclass(frozen=True)
class Item:
    """A dataset item taken apart.

    Attributes:
        sample: pixels or, if `encoded`, latents.
        conditioning: further arguments of the model's forward; nested ones under dotted names.
        label: a class label that came in a tuple or under one of `LABEL_KEYS`, None when there is none.
        prompt: to be encoded, None when there is none.
        encoded: whether the sample came under the key "latents".
        region: the part that is asked about, as `Within` has it or a mask of pixels; None for all of it.
        concept: that it is asked about for, None for the loss.
        against: the same item as it is told what the concept is compared with, or `Unadapted`.
    """

    sample: Tensor
    conditioning: dict[str, Tensor]
    label: Tensor | None
    prompt: str | None
    encoded: bool
    region: Any = None
    concept: Any = None
    against: Any = None


def take_apart(number: Any, item: Any) -> Item:
    """Read an item: a tensor, (tensor, label, prompt or dict), or a dict with the sample under one of `SAMPLE_KEYS`.

    Any of them may come `Within` a region, or `About` a concept.

    Raises:
        ValueError: there is no sample in it, or it is not a finite floating point tensor, or a picture in 0 .. 255, or
            it says something twice or in a place that nothing is read from; names the item.
    """
    if isinstance(item, Within):
        return replace(take_apart(number, item.item), region=item.region)
    if isinstance(item, About):
        return replace(take_apart(number, item.item), concept=item.concept)
    key, sample, extra = _parts(number, item)
    _check_sample(number, sample)
    if _is_picture(key, sample) and sample.numel() and sample.max() > LARGEST_PIXEL:
        raise ValueError(
            f"dataset item {number} has pixels up to {sample.max():.4g}; give them in the range that the model was "
            f"trained on, usually -1 .. 1: images / 127.5 - 1 of 0 .. 255. What is no picture goes under {LATENTS!r}."
        )
    if isinstance(extra, str):
        extra = {PROMPT_KEYS[0]: extra}
    elif extra is not None and not isinstance(extra, Mapping):
        extra = {LABEL_KEYS[0]: extra}
    flat = dict(_flat("", extra or {}))
    prompt = _only(number, flat, PROMPT_KEYS)
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"dataset item {number} gives a {type(prompt).__name__} for its prompt; give one string.")
    label = _only(number, flat, LABEL_KEYS)
    if label is not None and CLASS_LABELS in flat:
        raise ValueError(f"dataset item {number} brings both a label and {CLASS_LABELS!r}; give one of them.")
    conditioning = {name: _as_tensor(number, name, value) for name, value in flat.items()}
    label = None if label is None else _as_tensor(number, "label", label)
    return Item(sample, conditioning, label, prompt, key == LATENTS)


def with_sample(number: Any, item: Any, change: Callable[[str, Any], Tensor]) -> Any:
    """An item, as `take_apart` reads it, with another sample in its place: what `change` makes of its key and it."""
    if isinstance(item, (Within, About)):
        return replace(item, item=with_sample(number, item.item, change))
    key, sample, _ = _parts(number, item)
    changed = change(key, sample)
    if isinstance(item, Mapping):
        return {**item, key: changed}
    return (changed, *item[1:]) if isinstance(item, (tuple, list)) else changed


def _parts(number: Any, item: Any) -> tuple[str, Any, Any]:
    """The key of the sample, if it has one, the sample, and what comes with it."""
    if isinstance(item, Mapping):
        key = next((key for key in SAMPLE_KEYS if key in item), "")
        if not key:
            raise ValueError(f"dataset item {number} has keys {list(item)}; name the image one of {SAMPLE_KEYS}.")
        return key, item[key], {name: value for name, value in item.items() if name not in (key, "id")}
    if not isinstance(item, (tuple, list)):
        return "", item, None
    if not 1 <= len(item) <= 2:
        raise ValueError(
            f"dataset item {number} is a {type(item).__name__} of {len(item)}; give (image, label), or a dict that "
            "names what else the model takes."
        )
    return "", item[0], item[1] if len(item) > 1 else None


def _check_sample(number: Any, sample: Any) -> None:
    """Raise ValueError unless it is a finite tensor of floating point."""
    if not isinstance(sample, Tensor):
        raise ValueError(f"dataset item {number} gives a {type(sample).__name__} for the image; give a torch tensor.")
    if not sample.is_floating_point():
        raise ValueError(
            f"dataset item {number} has dtype {sample.dtype}; give floating point in the range that the model was "
            "trained on, usually -1 .. 1."
        )
    if not torch.isfinite(sample).all():
        raise ValueError(f"dataset item {number} has NaN or infinite entries; repair it or leave it out.")


def _is_picture(key: str, sample: Tensor) -> bool:
    """Whether a sample has the shape of pixels, and is not said to be anything else."""
    return key != LATENTS and sample.ndim == 3 and sample.shape[0] in (1, 3)


def seems_unit(item: Item) -> bool | None:
    """Whether a picture's range seems to be 0 .. 1 and not -1 .. 1; None where that cannot be told.

    A bright picture of 8 bits is known by the levels that it has in -1 .. 1.
    """
    sample = item.sample.float()
    if not _is_picture(LATENTS if item.encoded else "", sample) or not sample.numel() or sample.min() == sample.max():
        return None
    levels = (sample + 1) * 127.5
    return bool(sample.min() >= 0 and (levels - levels.round()).abs().max() > OFF_LEVEL)


def warn_of_unit_range() -> None:
    """Warn that pictures seem to be in 0 .. 1; Python says it once."""
    warnings.warn(
        "no picture has a pixel below 0: they seem to be in 0 .. 1, where most models are trained on -1 .. 1. Give "
        "2 * images - 1; or, if this model was trained on 0 .. 1, say warnings.filterwarnings('ignore', 'no picture "
        "has a pixel below 0').",
        stacklevel=2,
    )


def check_label(number: Any, label: Tensor, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a label that cannot be looked up in a model's table of classes, by its configuration."""
    classes = config.get("num_class_embeds")
    looked_up = config.get("class_embed_type") is None and (classes or config.get("num_embeds_ada_norm"))
    if looked_up and (label.is_floating_point() or label.ndim):
        raise ValueError(f"dataset item {number} has label {label.tolist()}; give the number of a class, one integer.")
    if looked_up and classes and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise ValueError(f"dataset item {number} has label {label.tolist()}, but the model knows {classes} classes.")


def _only(number: Any, flat: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """Take out what stands under one of several keys, None when none of them is there."""
    given = [key for key in keys if key in flat]
    if len(given) > 1:
        raise ValueError(f"dataset item {number} brings both {given[0]!r} and {given[1]!r}; give one of them.")
    if given and flat[given[0]] is None:
        raise ValueError(f"dataset item {number} gives None for {given[0]!r}; fill it in, or leave the key out.")
    return flat.pop(given[0]) if given else None


def _as_tensor(number: Any, name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"dataset item {number} gives a {type(value).__name__} for {name!r}, where the model takes numbers; "
            "leave it out of the items, or make it one of the dataset's columns."
        ) from None


def _flat(prefix: str, values: Mapping[str, Any]) -> Any:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value
