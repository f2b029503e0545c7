"""Encoded samples on the disk: what is missing or damaged is never data, and what earlier releases wrote is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import retrac_scale as rs
from retrac_scale.sketching import encoded as encoding
from retrac_scale.sketching.encoded import BLOCK, WORDS, EncodedDataset
from tests.sketching.test_content import MODEL, Items
from tests.small_denoiser import SCHEDULER

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
