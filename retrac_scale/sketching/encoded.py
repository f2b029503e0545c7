"""A dataset's latents and embeddings, encoded once into Zarr."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm

from retrac_scale.arrays import Ids
from retrac_scale.columns import check_ids
from retrac_scale.sketching.content import ITEM, STAMP, changed_items, look_through, read_again, refuse, stamps_of
from retrac_scale.store.reader import Words
from retrac_scale.store.schema import CONTENT_WORDS, Url
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import LATENTS, brought, dataset_ids

logger = logging.getLogger(__name__)

BLOCK = 64
"""Samples that are encoded, written and counted at a time."""
WORDS = "item words"
"""The array of what was encoded, beside those named like arguments; groups of earlier releases have none."""


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


def encode(
    task: DiffusionTask,
    dataset: Any,
    out: Url,
    *,
    replace: bool = False,
    check_all: bool = False,
    progress: bool = True,
) -> EncodedDataset:
    """Pass every sample through the task's VAE and text encoder once, and keep the results.

    Run again, it compares the samples with those that were encoded, and encodes what is missing; samples that came
    since stand behind the others. Sketch the dataset that it returns in place of the one that was encoded.

    Args:
        task: from `DiffusionTask.from_pretrained`.
        dataset: map-style, with pixels and prompts.
        out: a path or fsspec URL for a Zarr group with one array per argument of the denoiser.
        replace: encode samples anew that are others than those that were encoded; without it they are refused.
        check_all: compare all samples, as for `sketch`.
        progress: show a bar.

    Raises:
        ChangedItemsError: images or prompts are others than those that were encoded under the same ids.
        ValueError: a bad item, or `out` holds samples that the dataset lacks, or what another pipeline encoded.
    """
    if brought(dataset, "region") or brought(dataset, "concept"):
        raise ValueError(
            "encode takes plain samples; encode the dataset, and take Regions or Concepts of what it gives."
        )
    ids = check_ids(dataset_ids(dataset), len(dataset))
    group, order = _opened(task, dataset, out, ids)
    if order != list(range(len(ids))):
        dataset, ids = Subset(dataset, order), ids[order]
    names: Any = group.attrs["names"]
    arrays: dict[str, Any] = {name: group[name] for name in names}
    done = arrays[LATENTS].attrs  # whose file is small: the group's holds all ids
    count: Any = done.get("rows", group.attrs.get("rows_done", 0))
    known: Any = group.get(WORDS)
    seen = np.zeros((len(ids), CONTENT_WORDS), np.uint64)
    seen[:, STAMP] = stamps_of(dataset)
    again: list[int] = []
    if known is None:
        logger.warning("%s was encoded by an earlier release: whether its items are the same cannot be told.", out)
    elif count:
        there = np.asarray(known[:count])
        seen[:count], _ = look_through(task, dataset, ids[:count], there, every=check_all or replace)
        changed = changed_items(task, dataset, ids[:count], seen[:count], there)
        if changed and not replace:
            refuse(out, "encode them anew with replace=True (--replace)", changed, seen)
        outdated = np.isin(ids[:count], np.asarray(changed)) | (there[:, ITEM] == 0)
        again = (np.unique(np.flatnonzero(outdated) // BLOCK) * BLOCK).tolist()
    starts = [*again, *range(count, len(ids), BLOCK)]
    for start in tqdm(starts, desc="encode", unit="block", disable=not progress):
        rows = range(start, min(start + BLOCK, len(ids)))
        read = [read_again(task, ids[row], dataset[row], seen[row]) for row in rows]
        _write_rows(arrays, known, rows, [task.encoded(item) for item, _ in read], [words for _, words in read])
        count = done["rows"] = max(count, rows.stop)
    return EncodedDataset(out, group, ids, brought(dataset, "columns"))


def _opened(task: DiffusionTask, dataset: Any, out: Url, ids: Ids) -> tuple[zarr.Group, list[int]]:
    """The group at `out`, begun where it is new, long enough; and the dataset's rows in its order.

    Raises:
        ValueError: something else is there.
    """
    encoder: Any = task.encoder.digests if task.encoder else {}
    group = zarr.open_group(out, mode="a")
    if "encoder" not in group.attrs:
        if group.attrs or group.nmembers():
            raise ValueError(f"{out} holds something that is no encoded dataset; give another path.")
        group.attrs.update({"ids": json.dumps(ids.tolist()), "encoder": encoder})
    known: Any = group.attrs["encoder"]
    if known != encoder:
        others = sorted(name for name in known.keys() | encoder.keys() if known.get(name) != encoder.get(name))
        raise ValueError(f"{out} was encoded by another {', '.join(others)}; give another path.")
    row_of = {sample: row for row, sample in enumerate(ids.tolist())}
    there = json.loads(str(group.attrs["ids"]))
    if gone := [sample for sample in there if sample not in row_of]:
        raise ValueError(f"{out} was encoded from other samples, such as {gone[0]!r}; give another path.")
    order = [row_of.pop(sample) for sample in there] + list(row_of.values())
    if "names" not in group.attrs:
        first, conditioning = task.check_item(ids[0], dataset[0])
        example = {LATENTS: first, **conditioning}
        for name, value in example.items():
            shape = tuple(value.shape)
            dtype = value.numpy().dtype
            group.create_array(name, shape=(len(ids), *shape), chunks=(BLOCK, *shape), dtype=dtype, overwrite=True)
        shape, chunks = (len(ids), CONTENT_WORDS), (BLOCK, CONTENT_WORDS)
        group.create_array(WORDS, shape=shape, chunks=chunks, dtype="uint64", overwrite=True)
        group.attrs.update({"names": list(example)})
    if len(order) > len(there):
        for _, array in group.arrays():
            array.resize((len(ids), *array.shape[1:]))
        group.attrs.update({"ids": json.dumps(ids[order].tolist())})
    return group, order


def _write_rows(arrays: dict[str, Any], known: Any, rows: range, items: list[Any], words: list[Words]) -> None:
    """Rows of a block, which count as not encoded until all of them stand."""
    if known is not None:
        known[rows.start : rows.stop] = 0
    for name, array in arrays.items():
        values = [latents if name == LATENTS else conditioning[name] for latents, conditioning in items]
        array[rows.start : rows.stop] = torch.stack(values).numpy()
    if known is not None:
        known[rows.start : rows.stop] = np.stack(words)
