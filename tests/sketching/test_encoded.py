"""Encoded samples on the disk: what is missing or damaged is never data, and what earlier releases wrote is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

import retrac_scale as rs
from retrac_scale.sketching import encoded as encoding
from retrac_scale.sketching.encoded import BLOCK, WORDS, EncodedDataset
from tests.sketching.test_content import MODEL, Items
from tests.small_denoiser import SCHEDULER, SmallDenoiser

N = BLOCK + 6
ARRAYS = ("latents", "encoder_hidden_states", "class_labels")


def encode(dataset: Items, out: Any) -> EncodedDataset:
    return rs.encode(rs.DiffusionTask(MODEL, SCHEDULER), dataset, out, progress=False)


def assert_holds(encoded: EncodedDataset, dataset: Items) -> None:
    assert len(encoded) == len(dataset)
    for row in range(len(dataset)):
        found, item = encoded[row], dataset[row]
        assert torch.equal(found["latents"], item["image"])
        assert torch.equal(found["encoder_hidden_states"], item["encoder_hidden_states"])
        assert int(found["class_labels"]) == item["label"]


def chunk(out: Path, name: str, block: int) -> Path:
    place = out / name / "c" / str(block)
    return next((file for file in place.rglob("*") if file.is_file()), place)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("harm", ["missing", "flipped"])
def test_what_is_missing_or_damaged_is_refused_and_encoded_again(name: str, harm: str, tmp_path: Path) -> None:
    dataset = Items(N)
    encoded = encode(dataset, tmp_path)
    file = chunk(tmp_path, name, 1)
    content = file.read_bytes()
    file.unlink()
    if harm == "flipped":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(rs.DamagedStoreError, match=rf"{name}/c/1[/0]* is missing or not what was written"):
        encoded[BLOCK]
    file.unlink(missing_ok=True)
    assert_holds(encode(dataset, tmp_path), dataset)
    assert file.read_bytes() == content


def test_blocks_are_on_the_disk_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: set[str] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        forced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    class Watched(Items):
        def __getitem__(self, row: int) -> dict[str, Any]:
            if row == BLOCK and Path(tmp_path / "latents/zarr.json").exists():
                rows = zarr.open_array(tmp_path / "latents").attrs.get("rows")
                files = [chunk(tmp_path, name, 0) for name in (*ARRAYS, WORDS)] if rows else []
                seen.append(all(any(one.startswith(f"{file}.") for one in forced) for file in files))
            return super().__getitem__(row)

    seen: list[bool] = []
    monkeypatch.setattr(os, "fsync", noted)
    encode(Watched(N), tmp_path)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("grown", [N, N + 9])
def test_what_an_earlier_release_encoded_is_read_and_goes_on(
    grown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Items(N)
    dataset.labels[:] = 0  # a chunk of zeros was left out

    def new(group: zarr.Group, name: str, **options: Any) -> None:
        kept = {key: value for key, value in options.items() if key in ("shape", "chunks", "dtype")}
        group.create_array(name, overwrite=True, **kept)

    def write(group: zarr.Group, arrays: Any, block: int, values: Any, words: Any) -> None:
        for name, rows in {**values, WORDS: words}.items():
            arrays[name][block * BLOCK : block * BLOCK + len(rows)] = rows

    with monkeypatch.context() as earlier:
        earlier.setattr(encoding, "new_array", new)
        earlier.setattr(encoding, "_write", write)
        encode(dataset, tmp_path)
    assert not (tmp_path / "class_labels/c").exists()
    more = Items(grown)
    more.labels[:N] = 0
    encoded = encode(more, tmp_path)
    assert_holds(encoded, more)
    chunk(tmp_path, "latents", 0).unlink()
    with pytest.raises(rs.DamagedStoreError, match="is missing or not what was written"):
        encoded[0]


def test_a_path_that_begins_at_home_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    encode(Items(3), "~/e.zarr")
    assert (tmp_path / "home/e.zarr/latents").exists()
    assert not (tmp_path / "~").exists()


def test_an_item_that_is_encoded_to_nan_is_named(tmp_path: Path) -> None:
    dataset = Items(5)
    dataset.words[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"dataset item 3 is encoded to NaN \(encoder_hidden_states\)"):
        encode(dataset, tmp_path)


class Extra(SmallDenoiser):
    """A denoiser that may be told three numbers."""

    def forward(self, noisy: Tensor, timesteps: Tensor, return_dict: bool = True, extra: Tensor | None = None) -> Any:
        told = 0 if extra is None else extra.to(noisy.dtype).sum(1)[:, None, None, None]
        return super().forward(noisy + told, timesteps)


class Telling:
    """Images, and what is told of each."""

    def __init__(self, told: list[dict[str, Tensor]], kind: torch.dtype = torch.float32) -> None:
        self.told, self.kind = told, kind

    def __len__(self) -> int:
        return len(self.told)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"image": torch.full((1, 6, 6), row / 7).to(self.kind), **self.told[row]}


def extra(*values: Sequence[float]) -> list[dict[str, Tensor]]:
    return [{"extra": torch.tensor(value)} for value in values]


def sketched(task: rs.DiffusionTask, dataset: Any) -> Any:
    plan: dict[str, Any] = {"timesteps": rs.Explicit([5]), "projection": rs.CountSketch(32), "progress": False}
    return rs.sketch(task, dataset, None, checkpoints={"last": task.model.state_dict()}, **plan).sketches("last")


def assert_sketched_alike(dataset: Telling, out: Path) -> EncodedDataset:
    task = rs.DiffusionTask(Extra().to(dataset.kind), SCHEDULER)
    encoded = rs.encode(task, dataset, out, progress=False)
    np.testing.assert_array_equal(sketched(task, dataset), sketched(task, encoded))
    return encoded


WHOLE, BROKEN = [1, 0, 0], [0.5, 0.25, 0.75]


def test_numbers_of_another_type_are_held_where_none_is_lost_and_refused_otherwise(tmp_path: Path) -> None:
    encoded = assert_sketched_alike(Telling(extra(BROKEN, WHOLE)), tmp_path / "a")
    assert encoded[1]["extra"].tolist() == WHOLE
    task, why = rs.DiffusionTask(Extra(), SCHEDULER), "brings 'extra' as torch.{}, and sample 0 brought it as torch.{},"
    with pytest.raises(ValueError, match=f"sample 1 {why.format('float32', 'int64')}.* give all samples the same type"):
        rs.encode(task, Telling(extra(WHOLE, BROKEN)), tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match=f"sample 1 {why.format('int64', 'float32')}"):
        rs.encode(task, Telling(extra(BROKEN, [2**24 + 1, 0, 0])), tmp_path / "c", progress=False)
    repaired = assert_sketched_alike(Telling(extra([1.0, 0, 0], BROKEN)), tmp_path / "b")
    assert repaired[1]["extra"].tolist() == BROKEN


def test_samples_that_are_told_other_things_than_the_first_are_refused_as_without_encode(tmp_path: Path) -> None:
    task = rs.DiffusionTask(Extra(), SCHEDULER)
    for told, why in (
        ([{}, *extra(BROKEN)], r"sample 1 brings \['extra'\] and sample 0 \[\]"),
        ([*extra(BROKEN), {}], r"sample 1 brings \[\] and sample 0 \['extra'\]"),
    ):
        why += "; give all samples the same conditioning"
        with pytest.raises(ValueError, match=why):
            rs.encode(task, Telling(told), tmp_path, progress=False)
        with pytest.raises(rs.FailedTasksError, match=why):
            sketched(task, Telling(told))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_given_the_numbers_of_its_type(kind: torch.dtype, tmp_path: Path) -> None:
    encoded = assert_sketched_alike(Telling(extra(BROKEN, [0.1, 0.2, 0.3]), kind), tmp_path)
    assert {value.dtype for value in encoded[1].values()} == {kind}


def test_numbers_that_the_type_of_what_is_encoded_already_would_round_are_refused(tmp_path: Path) -> None:
    half, told = Telling(extra(BROKEN), torch.bfloat16), extra(BROKEN, [0.1, 0.2, 0.3])
    rs.encode(rs.DiffusionTask(Extra().to(half.kind), SCHEDULER), half, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"sample 1 brings .* as torch.float32, and sample 0 brought it as torch.bflo"):
        rs.encode(rs.DiffusionTask(Extra(), SCHEDULER), Telling(told), tmp_path, progress=False)
