"""Other images, captions or labels under the same ids never give old numbers: refused by name, or computed anew."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import retrac_scale as rs
from retrac_scale.datasets import ImageFiles
from retrac_scale.datasets.base import middle_square
from retrac_scale.report import Pictures, write_report
from retrac_scale.sketching import content
from retrac_scale.sketching.content import ITEM, ChangedItemsError
from retrac_scale.store import verify_store
from tests.conftest import tiny_unet
from tests.small_denoiser import SCHEDULER

N, STEPS = 9, (20, 70)
STEP_LAYOUT = rs.Layout(4)


class Told(nn.Module):
    """A denoiser that is told a class and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.classes, self.words = nn.Embedding(10, 8), nn.Linear(3, 8)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, class_labels: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor]:
        told = self.classes(class_labels) + self.words(encoder_hidden_states) + timesteps[:, None] / 100
        return (self.last(torch.tanh(self.first(noisy) + told[..., None, None])),)


MODEL = Told().eval()


class Items:
    """Images on 8-bit levels with a class and a vector, which can be changed one by one."""

    def __init__(self, n: int = N) -> None:
        rng = np.random.default_rng(3)
        self.pixels = rng.integers(0, 256, (80, 8, 8), dtype=np.uint8)[:n]
        self.labels, self.words = np.arange(n) % 10, rng.standard_normal((80, 3)).astype(np.float32)[:n]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        self.read.append(row)
        image = torch.from_numpy(self.pixels[row].astype(np.float32))[None] / 127.5 - 1
        return {
            "image": image,
            "label": int(self.labels[row]),
            "encoder_hidden_states": torch.from_numpy(self.words[row]),
        }

    def image(self, row: int) -> None:
        self.pixels[row] = 255 - self.pixels[row]

    def label(self, row: int) -> None:
        self.labels[row] = (self.labels[row] + 1) % 10

    def prompt(self, row: int) -> None:
        self.words[row] += 1


CHANGES: dict[str, Callable[[Items, int], None]] = {"image": Items.image, "label": Items.label, "prompt": Items.prompt}


def sketch(
    dataset: Any, out: Any = None, steps: Any = STEPS, model: nn.Module = MODEL, **options: Any
) -> rs.SketchStore:
    task = rs.DiffusionTask(model, SCHEDULER, measure=options.pop("measure", "mse"))
    plan = {"timesteps": rs.Explicit(steps), "projection": rs.CountSketch(64), "layout": STEP_LAYOUT}
    given: dict[str, Any] = {**plan, "dtype": "float32", "batch_size": 3, "progress": False, **options}
    return rs.sketch(task, dataset, out, checkpoints={"last": model.state_dict()}, **given)


def true_norm(item: dict[str, Any], timestep: int) -> float:
    """Of the gradient of one pair under common noise, by autograd in float64."""
    model, clean = copy.deepcopy(MODEL).double(), item["image"].double()[None]
    noise = rs.draw_noise(clean.shape[1:], None, [timestep], 0).double()
    signal = SCHEDULER.alphas_cumprod[timestep].double()
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    told = torch.tensor([item["label"]]), item["encoder_hidden_states"].double()[None]
    loss = (model(noisy, torch.tensor([timestep]), *told)[0] - noise).square().mean()
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]).norm())


def true_norms(dataset: Items) -> Any:
    return np.array([[true_norm(dataset[row], step) for step in STEPS] for row in range(len(dataset))])


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_item_is_refused_by_its_id_and_sketched_anew_on_request(what: str, tmp_path: Path) -> None:
    dataset = Items()
    before = sketch(dataset, tmp_path / "s")
    np.testing.assert_allclose(before.norms("last"), true_norms(dataset), rtol=1e-5)
    old = before.sketches("last")
    index = rs.build_index(before, rs.TracIn(), None)
    CHANGES[what](dataset, 5)
    with pytest.raises(ChangedItemsError, match=r"1 of 9 that were compared differ, 5; .*replace=True") as refused:
        sketch(dataset, tmp_path / "s")
    assert refused.value.ids == pickle.loads(pickle.dumps(refused.value)).ids == [5]
    np.testing.assert_array_equal(rs.open_store(tmp_path / "s").sketches("last"), old)
    dataset.read.clear()
    now = sketch(dataset, tmp_path / "s", replace=True)
    assert sorted(dataset.read) == sorted(
        [*range(N), 5, 4, 5]
    )  # all, the changed one twice, and the first of its block
    np.testing.assert_allclose(now.norms("last"), true_norms(dataset), rtol=1e-5)
    others = np.arange(N) != 5
    np.testing.assert_array_equal(now.sketches("last")[others], old[others])
    assert now.ids.tolist() == list(range(N))
    with pytest.raises(rs.StaleIndexError):
        index.query(rs.take(now, [0]))
    assert verify_store(tmp_path / "s").is_whole
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    sketch(dataset, tmp_path / "s", replace=True)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == written


def test_an_interrupted_run_does_not_go_on_with_other_items(tmp_path: Path) -> None:
    dataset = Items()
    sketch(dataset, tmp_path / "s")
    for name in ("commit/c.1.0", "commit/c.2.0"):
        (tmp_path / "s" / "last" / name).unlink()
    dataset.image(5)  # of a block that is to be computed yet
    np.testing.assert_allclose(sketch(dataset, tmp_path / "s").norms("last"), true_norms(dataset), rtol=1e-5)
    (tmp_path / "s" / "last" / "commit/c.2.0").unlink()
    dataset.image(0)
    with pytest.raises(ChangedItemsError, match="differ, 0;"):
        sketch(dataset, tmp_path / "s")
    now = sketch(dataset, tmp_path / "s", replace=True)
    np.testing.assert_allclose(now.norms("last"), true_norms(dataset), rtol=1e-5)


def test_no_old_row_is_left_in_other_measures_timesteps_or_samples(tmp_path: Path) -> None:
    dataset, more = Items(), Items(12)
    both: dict[str, Any] = {"measure": ("mse", "l1")}
    sketch(dataset, tmp_path / "s", **both)
    sketch(dataset, tmp_path / "s", steps=(50,), grow=True)
    sketch(more, tmp_path / "s", grow=True)
    sketch(more, tmp_path / "s", steps=(50,), grow=True)
    more.label(2)
    more.image(10)
    with pytest.raises(ChangedItemsError, match="differ, 2, 10;"):
        sketch(more, tmp_path / "s", steps=(50,), grow=True)
    sketch(more, tmp_path / "s", grow=True, replace=True)
    with pytest.raises(rs.IncompleteStoreError):
        rs.open_store(tmp_path / "s").sketches("last")
    with pytest.raises(rs.IncompleteStoreError):
        rs.open_store(tmp_path / "s", measure="l1").sketches("last")
    grown = sketch(more, tmp_path / "s", steps=(50,), grow=True)
    fresh = sketch(more, timesteps=[rs.Explicit(STEPS), rs.Explicit((50,))])
    np.testing.assert_allclose(grown.sketches("last"), fresh.sketches("last"), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(grown.contents("last"), fresh.contents("last"))


def test_a_call_that_is_refused_for_its_items_adds_nothing(tmp_path: Path) -> None:
    dataset = Items()
    sketch(dataset, tmp_path / "s")
    dataset.image(1)
    with pytest.raises(ChangedItemsError):
        sketch(dataset, tmp_path / "s", steps=(50,), grow=True)
    assert rs.open_store(tmp_path / "s").shape == (N, 2, 64)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_rows_that_stay_are_the_same_where_their_block_is_written_anew(dtype: Any, tmp_path: Path) -> None:
    dataset = Items()
    old = sketch(dataset, tmp_path / "s", dtype=dtype).stored("last", 1)
    dataset.image(5)
    new = sketch(dataset, tmp_path / "s", dtype=dtype, replace=True).stored("last", 1)
    for before, now in zip(old, new, strict=True):
        np.testing.assert_allclose(np.delete(now, 1, 0), np.delete(before, 1, 0), rtol=2e-7)


@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_an_item_that_differs_between_two_readings_is_named_as_that(batch_size: Any, tmp_path: Path) -> None:
    class Flipped(Items):
        def __getitem__(self, row: int) -> dict[str, Any]:
            item = super().__getitem__(row)
            return item if self.read.count(row) % 2 else {**item, "image": item["image"].flip(-1)}

    with pytest.raises(ChangedItemsError, match=r"item 0 differs between two readings: turn off random augmentation"):
        sketch(Flipped(), tmp_path / "s", batch_size=batch_size)
    assert not rs.open_store(tmp_path / "s").committed("last").any() if (tmp_path / "s").exists() else True
    dataset = Items()
    sketch(dataset, tmp_path / "t")
    flipped = Flipped()
    flipped.read = [0]  # the first reading of it is another than what was sketched
    with pytest.raises(ChangedItemsError, match="differs between two readings"):
        sketch(flipped, tmp_path / "t")


def test_another_type_of_numbers_or_label_that_the_model_is_not_told_is_no_change(tmp_path: Path) -> None:
    first, model = Items(2), tiny_unet()
    images = torch.stack([first[row]["image"] for row in range(2)])
    sketch(images, tmp_path / "s", model=model)
    sketch(images.double(), tmp_path / "s", model=model)
    sketch([{"pixel_values": image, "label": 3} for image in images], tmp_path / "s", model=model)


def test_of_a_large_data_set_changed_files_are_found_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "FULL_CHECK_SAMPLES", 2)  # every fourth item is read
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / f"{row}.png" for row in range(N)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, noisy: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (self.only(noisy),)

    model, read = Plain(), []

    class Counted(ImageFiles):
        def raw(self, row: int) -> Any:
            read.append(row)
            return super().raw(row)

    def again(**options: Any) -> rs.SketchStore:
        read.clear()
        return sketch(Counted(tmp_path / "in", 1), tmp_path / "s", model=model, **options)

    again()
    again()
    assert read == [0, 4, 8]
    os.utime(files[3], ns=(1, 1))  # touched, and the same
    again()
    assert read == [0, 3, 4, 8]
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(files[5])
    with pytest.raises(ChangedItemsError, match=r"5\.png"):
        again()
    # the same size and time: an item among those not looked at is found by a full check alone
    before = files[5].stat()
    again(replace=True)
    kept = Image.open(files[5]).copy()
    files[5].write_bytes(files[5].read_bytes()[:-1] + b"\0")
    os.utime(files[5], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert np.array_equal(np.asarray(Image.open(files[5])), np.asarray(kept))  # what follows the picture is no change
    again(check_all=True)
    assert sorted(set(read)) == list(range(N))


def test_a_store_of_an_earlier_release_stays_usable_and_says_what_it_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Items()
    with monkeypatch.context() as earlier:
        earlier.setattr("retrac_scale.sketching.sketch.SKETCHED", ("loss", "timestep"))
        store = sketch(dataset, tmp_path / "s")
        assert not store.has("content")
    dataset.image(3)
    with caplog.at_level(logging.WARNING):
        again = sketch(dataset, tmp_path / "s")
    assert sum("cannot be told" in line for line in caplog.messages) == 1
    np.testing.assert_array_equal(again.sketches("last"), store.sketches("last"))
    more = Items(12)
    grown = sketch(more, tmp_path / "s", grow=True)
    more.image(11)
    with pytest.raises(ChangedItemsError, match="differ, 11;"):
        sketch(more, tmp_path / "s", grow=True)
    assert rs.take(grown, [1, 10]).shape[0] == 2


def test_words_of_samples_taken_are_those_of_the_store() -> None:
    store = sketch(Items())
    taken = rs.take(store, [7, 2])
    np.testing.assert_array_equal(taken.contents("last"), store.contents("last")[[7, 2]])
    assert len(np.unique(store.contents("last")[:, ITEM])) == N


@pytest.mark.parametrize("what", CHANGES)
def test_rerank_refuses_items_that_are_not_those_that_were_sketched(what: str) -> None:
    dataset, asked = Items(), Items(2)
    store = sketch(dataset)
    index = rs.build_index(store, rs.ReTrac(), None)
    task, states = rs.DiffusionTask(MODEL, SCHEDULER), {"last": MODEL.state_dict()}
    queries, train = (rs.Samples(some, task, states, rs.Explicit(STEPS)) for some in (asked, dataset))
    index.query(queries, 2, rerank=N, train=train)
    CHANGES[what](dataset, 6)
    with pytest.raises(ChangedItemsError, match="sample 6 is another item here"):
        index.query(queries, 2, rerank=N, train=train)


def test_a_page_is_refused_whose_pictures_are_not_those_that_were_sketched(tmp_path: Path) -> None:
    dataset, asked = Items(), Items(3)
    asked.pixels = asked.pixels[::-1].copy()
    large = np.random.default_rng(5).integers(0, 256, (N, 40, 32), dtype=np.uint8)
    dataset.pixels = np.stack([np.asarray(middle_square(Image.fromarray(one), 8)) for one in large])
    store = sketch(dataset, tmp_path / "s")
    queries = sketch(asked, like=store)
    index = rs.build_index(store, rs.TracIn(), None)
    answers = {"TracIn": index.query(queries, N)}

    def page(images: Any, of_queries: Any) -> str:
        pictures = Pictures(images, store.ids, of_queries)
        made = write_report(tmp_path / "p.html", answers, pictures, indexes={"TracIn": index}, queries=queries)
        return made.read_text()

    assert "cannot be told" not in page(dataset.pixels, asked.pixels)
    coloured = np.repeat(dataset.pixels[..., None], 3, -1)
    page(coloured, asked.pixels / 255)
    page(np.clip(dataset.pixels.astype(int) - 1, 0, 255).astype(np.uint8), asked.pixels)  # rounded otherwise
    assert "cannot be told" not in page(large, asked.pixels)
    changed = Items()
    changed.pixels = dataset.pixels.copy()
    changed.image(4)
    with pytest.raises(ChangedItemsError, match=r"1 of 9 pictures are not what was sketched under their ids: 4"):
        page(changed.pixels, asked.pixels)
    with pytest.raises(ChangedItemsError, match="1 of 3 pictures"):
        page(dataset.pixels, np.concatenate([asked.pixels[:2], asked.pixels[2:, ::-1]]))
    cut = np.pad(dataset.pixels, ((0, 0), (3, 3), (3, 3)))
    assert "whether the 9 pictures are those that were sketched cannot be told" in page(cut, asked.pixels)


def test_latents_on_the_disk_are_compared_with_the_images_that_they_were_made_of(tmp_path: Path) -> None:
    task = rs.DiffusionTask(MODEL, SCHEDULER)
    dataset = Items(70)
    encoded = rs.encode(task, dataset, tmp_path / "e.zarr", progress=False)
    assert torch.equal(encoded[65]["latents"], dataset[65]["image"])
    dataset.image(3)
    dataset.prompt(66)
    with pytest.raises(ChangedItemsError, match="2 of 70 that were compared differ, 3, 66; encode them anew"):
        rs.encode(task, dataset, tmp_path / "e.zarr", progress=False)
    again = rs.encode(task, dataset, tmp_path / "e.zarr", replace=True, progress=False)
    for row in range(70):
        item = dataset[row]
        assert torch.equal(again[row]["latents"], item["image"])
        assert torch.equal(again[row]["encoder_hidden_states"], item["encoder_hidden_states"])
        assert int(again[row]["class_labels"]) == item["label"]
    store = sketch(encoded, tmp_path / "s")
    np.testing.assert_allclose(store.norms("last")[[3, 66]], true_norms(dataset)[[3, 66]], rtol=1e-5)
