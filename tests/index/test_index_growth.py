"""An index follows its store: new samples are added, deleted ones marked, and readers keep what they have open."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.columns import Texts
from retrac_scale.index import seals
from retrac_scale.index.seals import verify_index

N, NEW, K = 300, 90, 16
RNG = np.random.default_rng(0)
SKETCHES = {name: RNG.standard_normal((N + NEW, 2, K)) for name in ("a", "b")}
IDS = np.array([f"picture {i:03}" for i in RNG.permutation(N + NEW)])
COLUMNS: dict[str, Any] = {
    "label": np.arange(N + NEW) % 5,
    "artist": np.array([f"artist {i % 7 if i < N else i}" for i in range(N + NEW)]),
}
QUERIES = rs.write_store(None, {name: RNG.standard_normal((3, 2, K)) for name in ("a", "b")}, timesteps=[3, 9])
SMALL = rs.Layout(64)


def some(rows: slice) -> dict[str, Any]:
    return {"columns": {name: values[rows] for name, values in COLUMNS.items()}, "timesteps": [3, 9]}


def store_of(out: Path, rows: slice) -> rs.SketchStore:
    sketches = {name: x[rows] for name, x in SKETCHES.items()}
    return rs.write_store(out, sketches, ids=IDS[rows], weights=[0.5, -2], layout=SMALL, **some(rows))


def append(out: Path, rows: slice) -> rs.SketchStore:
    with rs.StoreWriter(out) as writer:
        writer.append(IDS[rows], {name: x[rows] for name, x in SKETCHES.items()}, **some(rows))
    return rs.open_store(out)


def files(folder: Path) -> dict[str, float]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def scales(index: rs.Index) -> Any:
    return np.concatenate([index.chunk(number).scale for number in range(len(index.chunks))], axis=1)


def assert_same_answers(one: rs.Index, other: rs.Index) -> None:
    """Bit for bit: lists, filters and explanations; to rounding: groups, whose sums run over other chunks, and all that
    a ridge stands in, which is added up in another order."""
    exact = one.estimator.damping is None or not one.ridges
    np.testing.assert_array_equal(one.ids, other.ids)
    assert one.shape == other.shape
    for name, values in other.columns.items():
        np.testing.assert_array_equal(one.columns[name], values)
    for options in ({}, {"where": "label == 3 or artist in ['artist 2', 'artist 301']"}, {"where": other.ids[5:40]}):
        found, expected = (index.query(QUERIES, 25, side="both", **options) for index in (one, other))
        np.testing.assert_array_equal(found.ids, expected.ids)
        rounding = 0 if exact else 1e-6 * np.abs(expected.scores).max()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=rounding)
    found, expected = (index.query(QUERIES, 5, group_by="artist", where="label > 0") for index in (one, other))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    np.testing.assert_allclose(one.scores(QUERIES).compute(), other.scores(QUERIES).compute(), rtol=1e-5, atol=1e-4)
    query = rs.take(QUERIES, [1])
    if one.estimator.damping is not None:
        return
    for sample in (other.ids[0], other.ids[-1], other.ids[70]):
        first, second = one.explain(query, sample), other.explain(query, sample)
        assert first.score == second.score
        np.testing.assert_array_equal(first.contributions, second.contributions)


@pytest.mark.parametrize("estimator", [rs.TracIn(), rs.ReTrac(pairing="matched"), rs.ReTracRidge(), rs.RenormIF(0.02)])
def test_an_index_that_grew_answers_as_one_built_whole(estimator: Any, tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", slice(0, N))
    store.delete(IDS[[3, 70]])
    rs.build_index(store, estimator, tmp_path / "i")
    before = files(tmp_path / "i")
    for rows in (slice(N, N + 50), slice(N + 50, N + NEW)):
        store = append(tmp_path / "s", rows)
    store.delete(IDS[[0, 5, 128, N + 2]])
    grown = rs.build_index(store, estimator, tmp_path / "i")
    after = files(tmp_path / "i")
    changed = {name for name in before if after.get(name) != before[name]}
    assert {name for name in changed if not name.startswith("ridge")} <= {"zarr.json"}
    store.delete(IDS[[N + 60]])
    grown = rs.build_index(store, estimator, tmp_path / "i")
    assert grown.shape[1] == N + NEW - 7
    assert_same_answers(grown, rs.build_index(store, estimator, None))
    assert_same_answers(rs.open_index(tmp_path / "i"), rs.build_index(store, estimator, tmp_path / "whole"))
    assert len(grown.segments) == 2
    assert verify_index(tmp_path / "i") == []
    assert main(["info", str(tmp_path / "i")]) == 0


def test_readers_keep_the_old_index_until_the_new_one_is_complete_and_are_told_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "s", slice(0, N))
    rs.build_index(store, rs.RelatIF(), tmp_path / "i")
    old, slow = rs.open_index(tmp_path / "i"), rs.open_index(tmp_path / "i")
    expected = scales(old)
    append(tmp_path / "s", slice(N, N + NEW))
    seen: list[int] = []

    def seal(*arguments: Any) -> Any:  # all of the new one is written, and nothing says so yet
        opened = rs.open_index(tmp_path / "i")
        np.testing.assert_array_equal(scales(opened), expected)
        seen.append(opened.shape[1])
        return sealing(*arguments)

    sealing = seals.seal
    with monkeypatch.context() as patch:
        patch.setattr(seals, "seal", seal)
        new = rs.build_index(rs.open_store(tmp_path / "s"), rs.RelatIF(), tmp_path / "i")
    assert seen == [N]
    np.testing.assert_array_equal(scales(old), expected)
    with pytest.raises(rs.StaleIndexError, match="was built again after it was opened; open it anew"):
        slow.chunk(0)
    assert (old.is_current, new.is_current) == (False, True)
    assert_same_answers(new, rs.build_index(rs.open_store(tmp_path / "s"), rs.RelatIF(), None))
    assert verify_index(tmp_path / "i") == []  # the old one is gone


def test_the_mark_of_the_index_that_is_open_is_left_alone_while_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "s", slice(0, 10))
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    store.delete(IDS[[3]])
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    before = files(tmp_path / "i" / "deleted")
    store = append(tmp_path / "s", slice(10, 14))  # so few that the bits of the marks are the same

    def seal(*arguments: Any) -> Any:
        now = files(tmp_path / "i" / "deleted")
        assert {name: now.get(name) for name in before} == before
        return sealing(*arguments)

    sealing = seals.seal
    monkeypatch.setattr(seals, "seal", seal)
    assert rs.build_index(store, rs.TracIn(), tmp_path / "i").ids.tolist() == np.delete(IDS[:14], 3).tolist()


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "s", slice(0, N))
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    store = append(tmp_path / "s", slice(N, N + 50))
    with monkeypatch.context() as patch:
        patch.setattr("retrac_scale.index.seals.seal", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rs.build_index(store, rs.TracIn(), tmp_path / "i")
    assert rs.open_index(tmp_path / "i").shape[1] == N
    store = append(tmp_path / "s", slice(N + 50, N + NEW))
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    assert len(list((tmp_path / "i" / "segments").glob("0*"))) == 1
    assert verify_index(tmp_path / "i") == []


@pytest.mark.parametrize("change", ["written anew", "mostly deleted", "another weight of the ridge"])
def test_an_index_is_built_whole_where_it_cannot_grow(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    estimator = rs.RelatIF() if "ridge" in change else rs.TracIn()
    store = store_of(tmp_path / "s", slice(0, N))
    rs.build_index(store, estimator, tmp_path / "i")
    if change == "written anew":
        shutil.rmtree(tmp_path / "s")
        store = store_of(tmp_path / "s", slice(1, N))
    elif change == "mostly deleted":
        store.delete(IDS[:200])
    else:
        store = append(tmp_path / "s", slice(N, N + 50))
    index = rs.build_index(store, estimator, tmp_path / "i")
    assert len(index.segments) == 1
    assert_same_answers(index, rs.build_index(store, estimator, None))
    assert ("its rows depend on all samples, by the ridge of RelatIF" in caplog.text) == ("ridge" in change)


def test_two_builds_at_once_make_one_index(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", slice(0, N))
    made: list[Any] = []

    def build() -> None:
        made.append(rs.build_index(store, rs.TracIn(), tmp_path / "i"))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3
    for index in made:
        assert index.query(QUERIES, 3).ids.shape == (3, 3)
    assert verify_index(tmp_path / "i") == []


def test_a_mapped_file_that_is_cut_short_in_its_place_is_told_and_not_died_of(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", slice(0, N))
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    index, other = rs.open_index(tmp_path / "i"), rs.open_index(tmp_path / "i")
    expected = index.query(QUERIES, 5)
    other.query(QUERIES, 5)
    file = tmp_path / "i" / "row" / "c" / "1" / "2" / "0"
    content = file.read_bytes()
    file.unlink()  # removed, the file lives on in the map
    np.testing.assert_array_equal(other.query(QUERIES, 5).ids, expected.ids)
    file.write_bytes(content)
    index = rs.open_index(tmp_path / "i")
    index.query(QUERIES, 5)
    with open(file, "r+b") as opened:
        opened.truncate(100)
    with pytest.raises(rs.DamagedStoreError, match="was cut short in its place"):
        index.query(QUERIES, 5)


def test_an_index_that_is_gone_is_told_by_a_column_too(tmp_path: Path) -> None:
    rs.build_index(store_of(tmp_path / "s", slice(0, N)), rs.TracIn(), tmp_path / "i")
    index = rs.open_index(tmp_path / "i")
    shutil.rmtree(tmp_path / "i")
    with pytest.raises(rs.DamagedStoreError, match="is missing"):
        index.query(QUERIES, 5, group_by="artist")


def test_workers_add_what_is_new_to_the_same_files(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", slice(0, N))
    for place in ("here", "there"):
        rs.build_index(store, rs.TracIn(), tmp_path / place)
    store = append(tmp_path / "s", slice(N, N + NEW))
    store.delete(IDS[[9]])
    with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as client:
        here = rs.build_index(store, rs.TracIn(), tmp_path / "here")
        there = rs.build_index(store, rs.TracIn(), tmp_path / "there", client=client)
        assert here.meta == there.meta
        one, two = here.query(QUERIES, 9), there.query(QUERIES, 9, client=client)
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.scores, two.scores)


def test_the_texts_of_a_column_are_read_once_for_all_its_parts(tmp_path: Path) -> None:
    index = rs.build_index(store_of(tmp_path / "s", slice(0, N)), rs.TracIn(), None)
    column = index.column("artist")
    assert isinstance(column, Texts)
    assert column.some(slice(3, 9)).values is column.values
    np.testing.assert_array_equal(column.some(slice(3, 9)).whole(), COLUMNS["artist"][3:9])


def test_metadata_that_cannot_be_read_is_told_as_damage(tmp_path: Path) -> None:
    rs.build_index(store_of(tmp_path / "s", slice(0, N)), rs.TracIn(), tmp_path / "i")
    file = tmp_path / "i" / "column" / "artist" / "zarr.json"
    content = file.read_text()
    for damaged in (content.replace("attributes", "attribute"), content[:30], ""):
        file.write_text(damaged)
        with pytest.raises(rs.DamagedStoreError, match=r"column/artist/zarr\.json is not what was written"):
            rs.open_index(tmp_path / "i").query(QUERIES, 3, where="artist == 'artist 1'")
