"""Growth: samples, checkpoints, timesteps and measures are added; nothing that is there is rewritten."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrac_scale as rs
from retrac_scale.store import DamagedStoreError, Layout, verify_store
from retrac_scale.store.part import Part
from tests.conftest import Labelled, random_images, tiny_unet
from tests.sketching.test_sketching import run

IMAGES = random_images(9)
STATES = {name: tiny_unet(seed).state_dict() for seed, name in enumerate("ab")}


def sketch(out: Any, n: int = 6, checkpoints: str = "a", timesteps: Any = (5, 40), **options: Any) -> rs.SketchStore:
    dataset = Labelled(IMAGES[:n], ids=[f"image-{i}" for i in range(n)])
    dataset.columns = {"label": np.arange(n) % 10}  # type: ignore[attr-defined]
    return run(
        tiny_unet(),
        dataset,
        rs.Explicit(timesteps),
        rs.CountSketch(32),
        out=out,
        checkpoints={name: STATES[name] for name in checkpoints},
        batch_size=1,
        layout=Layout(4),
        **options,
    )


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


GROWTHS: dict[str, dict[str, Any]] = {
    "samples": {"n": 9},
    "checkpoints": {"checkpoints": "ab"},
    "samples and checkpoints": {"n": 9, "checkpoints": "ab"},
}


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_grown_store_equals_one_sketched_at_once_and_keeps_every_file(tmp_path: Path, growth: str) -> None:
    small = sketch(tmp_path / "s")
    before = contents(tmp_path / "s")
    grown = sketch(tmp_path / "s", **GROWTHS[growth], grow=True)
    assert before.items() <= contents(tmp_path / "s").items()
    once = sketch(None, **GROWTHS[growth])
    assert grown.ids.tolist() == once.ids.tolist()
    assert grown.weights == once.weights
    assert grown.columns["label"].tolist() == once.columns["label"].tolist()
    assert grown.shape == once.shape
    assert grown.is_complete
    for name in once.checkpoints:
        np.testing.assert_array_equal(grown.sketches(name), once.sketches(name))
        np.testing.assert_array_equal(grown.norms(name, slice(8, 2, -2)), once.norms(name, slice(8, 2, -2)))
        np.testing.assert_array_equal(grown.losses(name, slice(5, 9)), once.losses(name, slice(5, 9)))
    assert verify_store(tmp_path / "s").is_whole
    assert small.refresh().shape == grown.shape
    assert small.refresh().revision == grown.revision != small.revision
    after = contents(tmp_path / "s")
    sketch(tmp_path / "s", **GROWTHS[growth], grow=True)
    assert contents(tmp_path / "s") == after


def test_every_slice_of_a_store_grown_by_samples_is_that_of_the_whole(tmp_path: Path) -> None:
    sketch(tmp_path / "s", n=5)
    sketch(tmp_path / "s", n=7, grow=True)
    grown = sketch(tmp_path / "s", n=9, grow=True)
    whole = sketch(None, n=9).sketches("a")
    for start, stop in itertools.combinations_with_replacement(range(10), 2):
        np.testing.assert_array_equal(grown.sketches("a", slice(start, stop)), whole[start:stop])


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> rs.SketchStore:
    """By samples, then by timesteps: blocks of 4, 2 and 3 samples, each in two parts."""
    folder = tmp_path_factory.mktemp("grown")
    sketch(folder / "s")
    sketch(folder / "s", n=9, grow=True)
    return sketch(folder / "s", n=9, timesteps=(70,), grow=True)


@settings(max_examples=40, deadline=None)
@given(places=st.lists(st.integers(0, 8), max_size=12))
def test_samples_come_in_the_order_of_the_places_given_each_block_read_once(
    grown: rs.SketchStore, places: list[int]
) -> None:
    norms = {block.start: grown.norms("a", block) for block in grown.blocks}
    sketches, contents = grown.sketches("a"), grown.contents("a")
    with mock.patch.object(Part, "read", autospec=True, side_effect=Part.read) as read:
        found = grown.norms("a", np.array(places, np.uint8))
    np.testing.assert_array_equal(found, np.concatenate(list(norms.values()))[places])
    np.testing.assert_array_equal(grown.sketches("a", np.array(places, np.int64)), sketches[places])
    np.testing.assert_array_equal(grown.contents("a", np.array(places, np.int64)), contents[places])
    touched = [block for block in grown.blocks if set(places) & set(range(block.start, block.stop))]
    assert read.call_count == 2 * len(touched)


@pytest.mark.parametrize("places", [[9], [-1], [True], [0.0], [[0]]], ids=str)
def test_places_that_are_none_are_refused(grown: rs.SketchStore, places: Any) -> None:
    with pytest.raises(IndexError, match="by a slice or by places from 0 to 8"):
        grown.norms("a", places)


def test_a_checkpoint_is_added_without_the_earlier_ones(tmp_path: Path) -> None:
    sketch(tmp_path / "s")
    grown = sketch(tmp_path / "s", checkpoints="b", grow=True)
    assert grown.checkpoints == ["a", "b"]
    np.testing.assert_array_equal(grown.sketches("b"), sketch(None, checkpoints="b").sketches("b"))


def test_timesteps_are_added_beside_those_that_are_there(tmp_path: Path) -> None:
    sketch(tmp_path / "s")
    grown = sketch(tmp_path / "s", timesteps=(70,), grow=True)
    assert grown.timesteps("a").tolist() == [[5, 40, 70]] * 6
    once = sketch(None, timesteps=(5, 40, 70))
    np.testing.assert_array_equal(grown.sketches("a"), once.sketches("a"))
    rows, scale = grown.stored("a", 1)
    np.testing.assert_array_equal(rows * scale[..., None], once.sketches("a", slice(4, 6)))


def test_another_measure_is_another_store_in_the_same_place(tmp_path: Path) -> None:
    sketch(tmp_path / "s")
    absolute = sketch(tmp_path / "s", measure="l1", grow=True)
    assert absolute.measurements == ["mse", "l1"]
    np.testing.assert_array_equal(absolute.losses("a"), sketch(None, measure="l1").losses("a"))
    np.testing.assert_array_equal(rs.open_store(tmp_path / "s").losses("a"), sketch(None).losses("a"))
    opened = rs.open_store(tmp_path / "s", measure="l1")
    assert opened.fingerprint["measure"] == "l1"


def test_an_interrupted_growth_is_incomplete_and_goes_on(tmp_path: Path) -> None:
    sketch(tmp_path / "s")
    grown = sketch(tmp_path / "s", n=9, grow=True)
    added = grown.parts[1].only_part
    (tmp_path / "s" / "parts" / added.name / "a" / "commit" / "c.0.0").unlink()
    partial = rs.open_store(tmp_path / "s")
    assert partial.committed("a").tolist() == [True, True, False]
    with pytest.raises(rs.IncompleteStoreError, match=r"samples 6 \.\. 8"):
        partial.sketches("a")
    assert sketch(tmp_path / "s", n=9, grow=True).is_complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 9}, r"shape is \[6, 2, 32\] there and \[9, 2, 32\] here"),
        ({"n": 4, "grow": True}, "sample image-4 was added together with others"),
        ({"dtype": "int8", "grow": True}, "dtype is 'float32' there and 'int8' here"),
    ],
)
def test_what_contradicts_the_store_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sketch(tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        sketch(tmp_path / "s", **change)


def test_another_checkpoint_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sketch(tmp_path / "s")
    monkeypatch.setitem(STATES, "a", STATES["b"])
    with pytest.raises(ValueError, match=r"checkpoints\.a is "):
        sketch(tmp_path / "s", n=9, grow=True)


def test_deleted_samples_stay_deleted_when_the_store_grows(tmp_path: Path) -> None:
    store = sketch(tmp_path / "s")
    before = store.revision
    assert store.delete(["image-1", "image-4"]) == 2
    assert store.alive.tolist() == [True, False, True, True, False, True]
    assert store.revision != before
    with pytest.raises(ValueError, match="no sample 'nobody'; nothing was deleted"):
        store.delete(["image-0", "nobody"])
    grown = sketch(tmp_path / "s", n=9, checkpoints="ab", measure="l1", grow=True)
    assert grown.ids[grown.deleted].tolist() == ["image-1", "image-4"]
    grown.delete(["image-7"])
    assert rs.open_store(tmp_path / "s").deleted.sum() == 2
    assert rs.open_store(tmp_path / "s", measure="l1").deleted.sum() == 3


def test_columns_of_some_samples_are_decoded_from_their_chunks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrac_scale.store.part.LIST_CHUNK", 4)
    years = 1990 + np.arange(12) % 5
    artists = np.array([f"artist {'x' * i}" for i in range(12)])
    for rows in (slice(0, 7), slice(7, 8), slice(8, 12)):
        with rs.StoreWriter(tmp_path / "s") as writer:
            columns = {"year": years[rows], "artist": artists[rows]}
            writer.append(np.arange(12)[rows], {"a": np.ones((len(years[rows]), 1, 8))}, columns=columns)
    store = rs.open_store(tmp_path / "s")
    assert len(store.parts) == 3
    of_sound_chunks: list[list[int]] = [[], [3], [7, 0, 9, 11]]
    of_all = [7, 0, 9, 4, 4, 11]
    for places in (*of_sound_chunks, of_all):
        found = store.columns_of(np.array(places, np.int64))
        assert found["year"].tolist() == years[places].tolist()
        assert found["artist"].tolist() == artists[places].tolist()
    chunk = tmp_path / "s" / "artist" / "c" / "1"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    for places in of_sound_chunks:
        store.columns_of(np.array(places, np.int64))
    with pytest.raises(DamagedStoreError, match="artist/c/1 is damaged"):
        store.columns_of(np.array(of_all))
