"""A dataset's latents and embeddings, encoded once into Zarr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from tqdm.auto import tqdm

from retrac_scale.store.schema import Url, check_ids
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import LATENTS, brought, dataset_ids

BLOCK = 64
"""Samples that are encoded, written and counted at a time."""


class EncodedDataset:
    """Map-style: items are dicts with "latents" and the embeddings, as `encode` wrote them.

    Attributes:
        ids: of the samples, `[n]`.
        columns: of the dataset that was encoded, None when it has none.
        frozen: digests of VAE and text encoders, for the fingerprint of a store.
    """

    def __init__(self, url: Url, group: zarr.Group, ids: Any, columns: Mapping[str, Any] | None) -> None:
        self.url, self.ids, self.columns = url, ids, columns
        names: Any = group.attrs["names"]
        self.frozen: Any = group.attrs["encoder"]
        self._arrays: dict[str, Any] = {name: group[name] for name in names}
        self._block: tuple[int, dict[str, Any]] = (-1, {})

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        row = range(len(self))[row]
        number, values = self._block  # samples are asked for in order: a chunk is read once, not once a sample
        if number != row // BLOCK:
            start = row // BLOCK * BLOCK
            values = {name: np.asarray(array[start : start + BLOCK]) for name, array in self._arrays.items()}
            self._block = row // BLOCK, values
        return {name: torch.as_tensor(np.array(value[row % BLOCK])) for name, value in values.items()}


def encode(task: DiffusionTask, dataset: Any, out: Url, *, progress: bool = True) -> EncodedDataset:
    """Pass every sample through the task's VAE and text encoder once, and keep the results.

    Run again, it encodes what is missing and returns at once when nothing is. Sketch the dataset that it returns in
    place of the one that was encoded.

    Args:
        task: from `DiffusionTask.from_pretrained`.
        dataset: map-style, with pixels and prompts.
        out: a path or fsspec URL for a Zarr group with one array per argument of the denoiser.
        progress: show a bar.

    Raises:
        ValueError: a bad item, or `out` holds other samples.
    """
    ids = check_ids(dataset_ids(dataset), len(dataset))
    described: dict[str, Any] = {
        "ids": json.dumps(ids.tolist()),
        "encoder": task.encoder.digests if task.encoder else {},
    }
    group = zarr.open_group(out, mode="a")
    if "encoder" not in group.attrs:
        if group.attrs or group.nmembers():
            raise ValueError(f"{out} holds something that is no encoded dataset; give another path.")
        group.attrs.update(described)
    if "names" not in group.attrs:
        first, conditioning = task.check_item(ids[0], dataset[0])
        example = {LATENTS: first, **conditioning}
        for name, value in example.items():
            shape = tuple(value.shape)
            dtype = value.numpy().dtype
            group.create_array(name, shape=(len(ids), *shape), chunks=(BLOCK, *shape), dtype=dtype, overwrite=True)
        group.attrs.update(described | {"names": list(example)})
    for key, expected in described.items():
        if group.attrs[key] != expected:
            raise ValueError(f"{out} was encoded from other samples or by another pipeline ({key}); give another path.")
    names: Any = group.attrs["names"]
    arrays: dict[str, Any] = {name: group[name] for name in names}
    done = arrays[LATENTS].attrs  # whose file is small: the group's holds all ids
    blocks = range(done.get("rows", group.attrs.get("rows_done", 0)), len(ids), BLOCK)
    for start in tqdm(blocks, desc="encode", unit="block", disable=not progress):
        rows = range(start, min(start + BLOCK, len(ids)))
        items = [task.check_item(ids[row], dataset[row]) for row in rows]
        for name, array in arrays.items():
            values = [latents if name == LATENTS else conditioning[name] for latents, conditioning in items]
            array[rows.start : rows.stop] = torch.stack(values).numpy()
        done["rows"] = rows.stop
    return EncodedDataset(out, group, ids, brought(dataset, "columns"))
