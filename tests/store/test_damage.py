"""Damage: every flipped bit, cut or deleted object is named by verify, and none is ever read as data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import retrac_scale as rs
from retrac_scale.store import DamagedStoreError, Layout, objects, repair_store, tombstones, verify_store

N, T, K = 10, 2, 16
LAYOUTS = {"chunks": Layout(4), "shards": Layout(4, 2)}


def build(path: Path, layout: str = "chunks") -> rs.SketchStore:
    """A store of two checkpoints with all quantities and two columns."""
    rng = np.random.default_rng(0)
    sketches = {name: rng.standard_normal((N, T, K)) for name in ("a", "b")}
    return rs.write_store(
        path,
        sketches,
        losses={name: rng.random((N, T)) for name in sketches},
        timesteps=[3, 9],
        columns={"label": np.arange(N) % 3, "path": [f"{i}.png" for i in range(N)]},
        layout=LAYOUTS[layout],
    )


def everything(store: rs.SketchStore) -> list[Any]:
    """All that a store can be asked for."""
    values: list[Any] = [store.ids, store.weights, store.columns, store.alive, store.fingerprint]
    for name in store.checkpoints:
        values += [store.sketches(name), store.norms(name), store.losses(name), store.timesteps(name)]
    return values


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def flip(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


def cut(file: Path, rng: np.random.Generator) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(len(content))])


def delete(file: Path, rng: np.random.Generator) -> None:
    file.unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("harm", [flip, cut, delete])
def test_verify_names_the_object_and_no_read_returns_another_number(
    tmp_path: Path, layout: str, harm: Callable[[Path, np.random.Generator], None]
) -> None:
    """12 places for each harm and layout; `benchmarks.damage` tries thousands."""
    sound = tmp_path / "sound"
    expected = everything(build(sound, layout))
    assert verify_store(sound).is_whole
    rng = np.random.default_rng(1)
    for file in rng.permutation(np.array(files(sound)))[:12]:
        store = tmp_path / "store"
        shutil.copytree(sound, store)
        key = file.relative_to(sound)
        harm(store / key, rng)
        assert (store / key).exists() == (harm is not delete)
        verdict = verify_store(store)
        assert not verdict.is_whole, key
        assert str(key) in {finding.key for finding in verdict.findings}, key
        try:
            found = everything(rs.open_store(store))
        except (DamagedStoreError, rs.IncompleteStoreError, FileNotFoundError, ValueError):
            pass
        else:
            np.testing.assert_equal(found, expected)  # what was harmed serves no read
        shutil.rmtree(store)


def chunk(path: Path, checkpoint: str, quantity: str, block: int) -> Path:
    return path / checkpoint / quantity / "c" / str(block) / ("0/0" if quantity == "sketch" else "0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_chunk_in_the_wrong_place_is_damage(tmp_path: Path, layout: str) -> None:
    store = build(tmp_path / "s", layout)
    shutil.copy(chunk(tmp_path / "s", "a", "sketch", 0), chunk(tmp_path / "s", "a", "sketch", 1))
    with pytest.raises(DamagedStoreError, match=r"not .*committed"):
        store.sketches("a", slice(4, 6))
    (tmp_path / "s/b/commit/c.0.0").write_bytes((tmp_path / "s/a/commit/c.0.0").read_bytes())
    with pytest.raises(DamagedStoreError, match="belongs to another block or store"):
        store.norms("b")
    assert [finding.key for finding in verify_store(tmp_path / "s").of("damaged")] == [
        "a/sketch/c/1/0/0",
        "b/commit/c.0.0",
    ]


def test_verify_tells_checkpoint_and_samples_and_repair_drops_the_block(tmp_path: Path) -> None:
    expected = build(tmp_path / "s").sketches("b")
    flip(chunk(tmp_path / "s", "b", "norm", 2), np.random.default_rng(0))
    (tmp_path / "s" / "a" / "sketch" / "zarr.json").unlink()
    (tmp_path / "s" / "a" / "sketch" / "c" / "1" / "0" / "0.0123.partial").write_bytes(b"left by a killed process")
    verdict = verify_store(tmp_path / "s")
    assert [str(finding).split(": ")[:2] for finding in verdict.of("damaged")] == [
        ["checkpoint b, samples 8 .. 9", "b/norm/c/2/0"]
    ]
    assert [finding.key for finding in verdict.of("metadata")] == ["a/sketch/zarr.json"]
    assert len(verdict.of("stray")) == 1
    assert repair_store(tmp_path / "s") == []
    verdict = verify_store(tmp_path / "s")
    assert [finding.kind for finding in verdict.findings] == ["unwritten"]
    store = rs.open_store(tmp_path / "s")
    assert store.committed("b").tolist() == [True, True, False]
    np.testing.assert_array_equal(store.sketches("b", slice(0, 8)), expected[:8])
    with pytest.raises(rs.IncompleteStoreError, match=r"checkpoint 'b', samples 8 \.\. 9"):
        store.norms("b")


def test_repair_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    """An index and a note within the folder of the store, and the sound chunks of a block of which one is lost."""
    build(tmp_path / "s")
    rs.build_index(rs.open_store(tmp_path / "s"), rs.ReTrac(), tmp_path / "s" / "index")
    (tmp_path / "s" / "README").write_text("of the user")
    (tmp_path / "s" / "a" / "loss" / "c" / "0" / "0.7f.partial").write_bytes(b"left")
    chunk(tmp_path / "s", "b", "loss", 1).unlink()
    expected = chunk(tmp_path / "s", "b", "sketch", 1).read_bytes()
    assert "README" in {finding.key for finding in verify_store(tmp_path / "s").of("foreign")}
    assert repair_store(tmp_path / "s") == []
    assert (tmp_path / "s" / "README").read_text() == "of the user"
    assert rs.open_index(tmp_path / "s" / "index").shape == (2, 10, 16)
    assert chunk(tmp_path / "s", "b", "sketch", 1).read_bytes() == expected
    assert [finding.kind for finding in verify_store(tmp_path / "s").of("stray", "unwritten")] == ["unwritten"]


def test_a_store_of_arrays_is_written_on_after_an_interruption_or_a_repair(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sketches = {name: rng.standard_normal((10, 2, 8), dtype=np.float32) for name in "ab"}
    layout = rs.Layout(4)
    expected = rs.write_store(tmp_path / "s", sketches, layout=layout)
    with pytest.raises(ValueError, match="already holds a store"):
        rs.write_store(tmp_path / "s", sketches, layout=layout)
    flip(chunk(tmp_path / "s", "b", "norm", 2), rng)
    repair_store(tmp_path / "s")
    with pytest.raises(ValueError, match=r"begun with other arrays: samples 0 \.\. 3 of checkpoint 'a' differ"):
        rs.write_store(tmp_path / "s", {**sketches, "a": sketches["a"] + 1}, layout=layout)
    again = rs.write_store(tmp_path / "s", sketches, layout=layout)
    assert again.is_complete
    for name in "ab":
        np.testing.assert_array_equal(again.sketches(name), expected.sketches(name))
        np.testing.assert_array_equal(
            again.norms(name), np.linalg.norm(sketches[name].astype(float), axis=2).astype("f4")
        )


@pytest.mark.parametrize("what", ["sketches", "norms", "losses", "timesteps"])
def test_a_store_of_arrays_that_was_begun_takes_none_of_other_arrays(what: str, tmp_path: Path) -> None:
    store = build(tmp_path / "s")
    given: dict[str, Any] = {
        what: {name: getattr(store, what)(name) for name in "ab"}
        for what in ("sketches", "norms", "losses", "timesteps")
    }
    options: dict[str, Any] = {"layout": Layout(4), "columns": store.columns, "dtype": "float32"}
    rs.write_store(tmp_path / "t", **given, **options)
    for name in "ab":
        chunk(tmp_path / "t", name, "norm", 0).unlink()
    repair_store(tmp_path / "t")
    other = {**given, what: {name: values + 1 for name, values in given[what].items()}}
    with pytest.raises(ValueError, match=rf"samples 4 \.\. 7 of checkpoint 'a' differ in their {what}; choose another"):
        rs.write_store(tmp_path / "t", **other, **options)
    assert not rs.open_store(tmp_path / "t").committed("a")[0]
    again = rs.write_store(tmp_path / "t", **given, **options)
    for one, expected in given.items():
        np.testing.assert_array_equal(getattr(again, one)("b"), expected["b"])


def test_what_only_a_backup_can_restore_is_told_and_nothing_is_dropped(tmp_path: Path) -> None:
    build(tmp_path / "s")
    flip(tmp_path / "s" / "id" / "c" / "0", np.random.default_rng(0))
    flip(chunk(tmp_path / "s", "a", "sketch", 0), np.random.default_rng(0))
    assert [finding.key for finding in repair_store(tmp_path / "s")] == ["id/c/0"]
    assert chunk(tmp_path / "s", "a", "sketch", 0).exists()


def test_chunks_of_nothing_but_fill_values_are_written_and_read(tmp_path: Path) -> None:
    store = rs.write_store(tmp_path / "s", {"c": np.zeros((3, 1, 4))})
    assert (store.sketches("c") == 0).all()
    assert verify_store(tmp_path / "s").is_whole
    chunk(tmp_path / "s", "c", "norm", 0).unlink()
    with pytest.raises(DamagedStoreError, match="missing"):
        store.norms("c")


def test_a_zarr_reader_sees_the_commit_records_and_tombstones(tmp_path: Path) -> None:
    store = build(tmp_path / "s")
    store.delete([3])
    group: Any = store.root
    assert group["a/commit"].attrs["entries"] == ["seal", "sketch", "scale", "norm", "loss", "timestep"]
    records = group["a/commit"][:]
    for block in range(3):
        file = chunk(tmp_path / "s", "a", "sketch", block).read_bytes()
        assert records[block, 1].tobytes() == file[-4:]
    assert group["deleted"][:].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_marks_of_deleted_samples_that_are_put_back_are_named(tmp_path: Path) -> None:
    store = build(tmp_path / "s")
    marks = tmp_path / "s" / "deleted" / "c" / "0"
    before = marks.read_bytes()
    store.delete([3])
    after, told = marks.read_bytes(), (tmp_path / "s" / tombstones.KEY).read_bytes()
    marks.write_bytes(before)
    with pytest.raises(DamagedStoreError, match=r"deleted/c/0 is not what the last deletion wrote: restore it and"):
        _ = store.deleted
    assert "deleted/c/0" in str(verify_store(tmp_path / "s").of("metadata"))
    marks.write_bytes(after)
    (tmp_path / "s" / tombstones.KEY).write_bytes(b"{")
    with pytest.raises(DamagedStoreError, match="deleted/digests is damaged"):
        _ = store.deleted
    (tmp_path / "s" / tombstones.KEY).write_bytes(told)
    assert store.delete([4]) == 2
    assert verify_store(tmp_path / "s").is_whole


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_deletion_that_was_cut_short_happened_or_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    store = build(tmp_path / "s")
    store.delete([2])
    with monkeypatch.context() as patched:
        whole = objects.write_all
        calls: list[None] = []

        def cut(*arguments: Any) -> None:
            if len(calls) == written:
                raise KeyboardInterrupt
            whole(*arguments)
            calls.append(None)

        patched.setattr(objects, "write_all", cut)
        with pytest.raises(KeyboardInterrupt):
            store.delete([3])
    assert store.ids[store.deleted].tolist() == ([2] if written < 2 else [2, 3])
    assert store.delete([3]) == 2
    assert verify_store(tmp_path / "s").is_whole
