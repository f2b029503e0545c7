"""What a dataset brings, and what an item of it holds: a sample, its conditioning, its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

LATENTS = "latents"
SAMPLE_KEYS = (LATENTS, "image", "images", "pixel_values", "sample", "input", "video")
PROMPT_KEYS = ("prompt", "text", "caption")
LABEL_KEYS = ("label", "labels")


def dataset_ids(dataset: Any) -> Any:
    """The ids that a dataset brings, None when it brings none; ValueError unless it is map-style and not empty."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError("the dataset must be map-style: it needs __len__ and __getitem__.")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty.")
    return brought(dataset, "ids")


def brought(dataset: Any, name: str) -> Any:
    """The `ids`, `columns` or `frozen` of a dataset, those of its own samples if it is a torch `Subset`; else None."""
    if not isinstance(dataset, Subset):
        return getattr(dataset, name, None)
    whole, rows = brought(dataset.dataset, name), list(dataset.indices)
    if whole is None or name == "frozen":
        return whole
    if name == "columns":
        return {key: np.asarray(values)[rows] for key, values in whole.items()}
    return np.asarray(whole)[rows]


@dataclass(frozen=True)
class Item:
    """A dataset item taken apart.

    Attributes:
        sample: pixels or, if `encoded`, latents.
        conditioning: further arguments of the model's forward; nested ones under dotted names.
        prompt: to be encoded, None when there is none.
        encoded: whether the sample came under the key "latents".
    """

    sample: Tensor
    conditioning: dict[str, Tensor]
    prompt: str | None
    encoded: bool


def take_apart(number: Any, item: Any) -> Item:
    """Read an item: a tensor, (tensor, label, prompt or dict), or a dict with the sample under one of `SAMPLE_KEYS`.

    Raises:
        ValueError: there is no sample in it, or it is not a finite floating point tensor; names the item.
    """
    key, extra = "", None
    if isinstance(item, Mapping):
        key = next((key for key in SAMPLE_KEYS if key in item), "")
        if not key:
            raise ValueError(f"dataset item {number} has keys {list(item)}; name the image one of {SAMPLE_KEYS}.")
        sample, extra = item[key], {name: value for name, value in item.items() if name not in (key, "id")}
    elif isinstance(item, (tuple, list)):
        sample, extra = item[0], item[1] if len(item) > 1 else None
    else:
        sample = item
    if not isinstance(sample, Tensor):
        raise ValueError(f"dataset item {number} gives a {type(sample).__name__} for the image; give a torch tensor.")
    if not sample.is_floating_point():
        raise ValueError(
            f"dataset item {number} has dtype {sample.dtype}; give floating point in the range that the model was "
            "trained on, usually -1 .. 1."
        )
    if not torch.isfinite(sample).all():
        raise ValueError(f"dataset item {number} has NaN or infinite entries; repair it or leave it out.")
    if isinstance(extra, str):
        extra = {"prompt": extra}
    elif extra is not None and not isinstance(extra, Mapping):
        extra = {"class_labels": extra}
    flat = dict(_flat("", extra or {}))
    prompts = [flat.pop(name) for name in PROMPT_KEYS if name in flat]
    conditioning = {
        "class_labels" if name in LABEL_KEYS else name: _as_tensor(number, name, value) for name, value in flat.items()
    }
    return Item(sample, conditioning, prompts[0] if prompts else None, key == LATENTS)


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
