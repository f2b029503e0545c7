"""A dataset's latents and embeddings, encoded once into Zarr."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm

from retrac_scale.arrays import Ids
from retrac_scale.columns import check_ids
from retrac_scale.sketching.content import ITEM, STAMP, changed_items, look_through, read_again, refuse, stamps_of
from retrac_scale.store import DamagedStoreError, objects
from retrac_scale.store.mapping import fetch_chunk, is_plain
from retrac_scale.store.part import NewChunk
from retrac_scale.store.reader import Words
from retrac_scale.store.schema import CONTENT_WORDS, Url, new_array, zarr_location
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import LATENTS, brought, dataset_ids

logger = logging.getLogger(__name__)

BLOCK = 64
"""Samples that are encoded, written and counted at a time."""
WORDS = "item words"
"""The array of what was encoded, beside those named like arguments; groups of earlier releases have none."""
TYPE = "type"
"""The attribute of an array that tells what it holds, where its own type does not."""


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
        self._types = {name: _type_of(array) for name, array in self._arrays.items()}
        self._block: tuple[int, dict[str, Any]] = (-1, {})

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        row = range(len(self))[row]
        number, values = self._block  # samples are asked for in order: a chunk is read once, not once a sample
        if number != row // BLOCK:
            values = {name: self._read(name, row // BLOCK) for name in self._arrays}
            self._block = row // BLOCK, values
        return {name: torch.as_tensor(np.array(x[row % BLOCK])).to(self._types[name]) for name, x in values.items()}

    def _read(self, name: str, block: int) -> npt.NDArray[Any]:
        array, values = self._arrays[name], None
        with contextlib.suppress(DamagedStoreError):
            values = fetch_chunk(array, _place(array, block))
        zeros = values is not None and name == LATENTS and not is_plain(array) and not values.any()
        if values is None or zeros or np.isnan(values).any():
            raise DamagedStoreError(
                f"{self.url}/{_key(array, block)} is missing or not what was written; remove it where it is "
                "damaged, and repeat encode(...), which encodes its samples again."
            )
        return values


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
        ValueError: a bad item, or one that is encoded to NaN, or to other arguments, shapes or types than the first;
            or `out` holds samples that the dataset lacks, or what another pipeline encoded.
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
    arrays: dict[str, Any] = {name: group[name] for name in (*names, WORDS) if name in group}
    done, count = arrays[LATENTS].attrs, _count(group)
    seen = np.zeros((len(ids), CONTENT_WORDS), np.uint64)
    seen[:, STAMP] = stamps_of(dataset)
    todo = {*range(count // BLOCK, -(-len(ids) // BLOCK))} if count < len(ids) else set[int]()
    todo |= _absent(group, arrays, count)
    if WORDS not in arrays:
        logger.warning("%s was encoded by an earlier release: whether its items are the same cannot be told.", out)
    elif count:
        there = np.asarray(arrays[WORDS][:count])
        seen[:count], _ = look_through(task, dataset, ids[:count], there, every=check_all or replace)
        changed = changed_items(task, dataset, ids[:count], seen[:count], there)
        if changed and not replace:
            refuse(out, "encode them anew with replace=True (--replace)", changed, seen)
        outdated = np.isin(ids[:count], np.asarray(changed)) | (there[:, ITEM] == 0)
        todo |= {*(np.flatnonzero(outdated) // BLOCK).tolist()}
    for block in tqdm(sorted(todo), desc="encode", unit="block", disable=not progress):
        rows = range(block * BLOCK, min((block + 1) * BLOCK, len(ids)))
        read = [read_again(task, ids[row], dataset[row], seen[row]) for row in rows]
        values = _stacked(arrays, ids, rows, [task.encoded(item) for item, _ in read])
        _write(group, arrays, block, values, np.stack([words for _, words in read]))
        count = done["rows"] = max(count, rows.stop)
    return EncodedDataset(out, group, ids, brought(dataset, "columns"))


def _opened(task: DiffusionTask, dataset: Any, out: Url, ids: Ids) -> tuple[zarr.Group, list[int]]:
    """The group at `out`, begun where it is new, long enough; and the dataset's rows in its order.

    Raises:
        ValueError: something else is there.
    """
    encoder: Any = task.encoder.digests if task.encoder else {}
    group = zarr.open_group(zarr_location(out), mode="a")
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
    if _count(group) == 0:  # where nothing stands, the first item may have been repaired since
        first, conditioning = task.check_item(ids[order[0]], dataset[order[0]])
        example = {LATENTS: first, **conditioning}
        for name, value in example.items():
            _new(group, name, len(ids), _plain(value), str(value.dtype).removeprefix("torch."))
        _new(group, WORDS, len(ids), np.zeros(CONTENT_WORDS, np.uint64))
        group.attrs.update({"names": list(example)})
    if len(order) > len(there):
        for _, array in group.arrays():
            array.resize((len(ids), *array.shape[1:]))
        group.attrs.update({"ids": json.dumps(ids[order].tolist())})
    return group, order


def _count(group: zarr.Group) -> int:
    """How many samples are encoded."""
    if "names" not in group.attrs:
        return 0
    latents: Any = group[LATENTS]  # whose file is small: the group's holds all ids
    count: Any = latents.attrs.get("rows", group.attrs.get("rows_done", 0))
    return int(count)


def _new(group: zarr.Group, name: str, n: int, example: npt.NDArray[Any], kind: str = "") -> None:
    """Make an array of samples like one, whose type in torch is told where NumPy has none such."""
    shape, fill = example.shape, np.nan if example.dtype.kind == "f" else 0
    dims = ["sample", *(f"axis {axis}" for axis in range(1, 1 + len(shape)))]
    told = {"attributes": {TYPE: kind}} if kind == "bfloat16" else {}
    options: dict[str, Any] = {"dtype": example.dtype, "dims": dims, "fill_value": fill, **told}
    new_array(group, name, shape=(n, *shape), chunks=(BLOCK, *shape), **options)


def _plain(value: Tensor) -> npt.NDArray[Any]:
    """A tensor as NumPy has it; bfloat16, which NumPy lacks, as float32, which holds all of its numbers."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _type_of(array: zarr.Array[Any]) -> torch.dtype:
    """The type of what an array holds, as the model takes it."""
    kind: Any = array.attrs.get(TYPE)
    return getattr(torch, kind) if kind else torch.from_numpy(np.empty(0, array.dtype)).dtype


def _place(array: zarr.Array[Any], block: int) -> tuple[int, ...]:
    return (block, *[0] * (array.ndim - 1))


def _key(array: zarr.Array[Any], block: int) -> str:
    """The object that holds a block of an array."""
    return f"{array.basename}/{array.metadata.encode_chunk_key(_place(array, block))}"


def _tells(array: zarr.Array[Any]) -> bool:
    """Whether an array has all of its chunks: earlier releases left out those of zeros, which no latents are."""
    return is_plain(array) or array.basename == LATENTS


def _absent(group: zarr.Group, arrays: Mapping[str, zarr.Array[Any]], count: int) -> set[int]:
    """Blocks of so many samples of which an object is missing."""
    there, told = {*objects.all_keys(group)}, [array for array in arrays.values() if _tells(array)]
    return {block for block in range(-(-count // BLOCK)) if any(_key(array, block) not in there for array in told)}


def _stacked(
    arrays: Mapping[str, zarr.Array[Any]],
    ids: Ids,
    rows: range,
    items: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
) -> dict[str, npt.NDArray[Any]]:
    """What the items of some rows were encoded to, by array.

    Raises:
        ValueError: one is NaN, or brings other arguments than the first of all, or of another shape or type.
    """
    names = arrays.keys() - {LATENTS, WORDS}
    values: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (LATENTS, *names)}
    for sample, (latents, conditioning) in zip(ids[rows.start : rows.stop], items, strict=True):
        if conditioning.keys() != names:
            raise ValueError(
                f"sample {sample} brings {sorted(conditioning)} and sample {ids[0]} {sorted(names)}; give all samples "
                "the same conditioning."
            )
        for name, value in {LATENTS: latents, **conditioning}.items():
            values[name].append(_fitting(arrays[name], sample, value, ids[0]))
    return {name: np.stack(several) for name, several in values.items()}


def _fitting(array: zarr.Array[Any], sample: Any, value: Tensor, first: Any) -> npt.NDArray[Any]:
    """What a sample was encoded to, in the type of the array, which the first sample's is; ValueError if not so."""
    name, kind, held = array.basename, value.dtype, _type_of(array)
    if tuple(value.shape) != array.shape[1:]:
        raise ValueError(
            f"dataset item {sample} is encoded to {name} of shape {tuple(value.shape)}, the first one to "
            f"{array.shape[1:]}; give items of one shape."
        )
    if np.isnan(_plain(value)).any():
        raise ValueError(f"dataset item {sample} is encoded to NaN ({name}); leave it out.")
    fitting = value.to(held)
    if kind != held and not (torch.can_cast(kind, held) and torch.equal(fitting.to(kind), value)):
        raise ValueError(
            f"sample {sample} brings {name!r} as {kind}, and sample {first} brought it as {held}, which does not hold "
            "it; give all samples the same type, and another path where some are encoded already."
        )
    return _plain(fitting)


def _write(
    group: zarr.Group,
    arrays: Mapping[str, zarr.Array[Any]],
    block: int,
    values: Mapping[str, npt.NDArray[Any]],
    words: Words,
) -> None:
    """Write a block to the disk, whose rows count as not encoded until all of them stand."""
    for some in ({WORDS: np.zeros_like(words)}, values, {WORDS: words}):
        held = {name: rows for name, rows in some.items() if name in arrays}
        objects.write_all(
            group, {_key(arrays[name], block): NewChunk(arrays[name], block, [x]) for name, x in held.items()}
        )
