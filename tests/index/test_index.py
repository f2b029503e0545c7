"""Building, opening, mapping and refusing indexes."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from distributed import Client

import retrac_scale as rs
from retrac_scale.estimators import fitting
from retrac_scale.index.build import write_index
from retrac_scale.store import DamagedStoreError, objects


def stores(folder: Path | None, n: int = 300, **options: Any) -> tuple[rs.SketchStore, rs.SketchStore]:
    rng = np.random.default_rng(0)
    sketches = {name: rng.standard_normal((n, 2, 16)) for name in ("a", "b")}
    asked = {name: rng.standard_normal((3, 2, 16)) for name in ("a", "b")}
    out, queries = (None, None) if folder is None else (folder / "s", folder / "q")
    columns = {"label": np.arange(n) % 5, "artist": np.array([f"artist {i % 7}" for i in range(n)])}
    return (
        rs.write_store(out, sketches, weights=[0.5, -2], columns=columns, timesteps=[3, 9], **options),
        rs.write_store(queries, asked, timesteps=[3, 9]),
    )


def test_an_index_is_kept_reopened_and_never_mistaken(tmp_path: Path) -> None:
    store, queries = stores(tmp_path)
    built = rs.build_index(store, rs.TracIn(), tmp_path / "i")
    file = tmp_path / "i" / "row" / "c" / "0" / "0" / "0"
    written = file.stat().st_mtime_ns
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    assert file.stat().st_mtime_ns == written
    np.testing.assert_array_equal(rs.open_index(tmp_path / "i").query(queries).ids, built.query(queries).ids)
    with pytest.raises(ValueError, match=r"a different index: estimator\.kind is 'TracIn' there and 'ReTrac' here"):
        rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    with pytest.raises(ValueError, match="no index"):
        rs.open_index(tmp_path / "s")
    with pytest.raises(ValueError, match="is no index"):
        rs.build_index(store, rs.TracIn(), tmp_path / "s")
    with pytest.raises(ValueError, match="must be 'int8', 'float16' or 'float32'"):
        rs.build_index(store, rs.TracIn(), None, dtype="bfloat16")  # type: ignore[arg-type]
    zarr.open_group(tmp_path / "i", mode="r+").attrs["retrac_scale"] = {**built.meta, "complete": False}
    with pytest.raises(ValueError, match="was not finished"):
        rs.open_index(tmp_path / "i")


@pytest.mark.parametrize(("estimator", "passes"), [(rs.TRAK(), 2), (rs.ReTrac(), 1)])
def test_a_bar_counts_the_rows_of_the_ridge_and_of_the_index(
    estimator: Any, passes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fitting, "RUN_ROWS", 100)
    sketches = np.random.default_rng(0).standard_normal((2, 250, 1, 8))
    store = rs.write_store(None, dict(zip("ab", sketches, strict=True)))
    counted: list[int] = []
    write_index(store, estimator, done=counted.append)
    assert sum(counted) == passes * 2 * 250
    assert {100, 50} <= set(counted) or passes == 1
    rs.build_index(store, estimator, progress="index of mine")
    assert capsys.readouterr().err == ""  # it took no moment
    monkeypatch.setattr("retrac_scale.api.index.MOMENT_S", 0)
    rs.build_index(store, estimator, progress="index of mine")
    told = capsys.readouterr().err
    assert "index of mine: 100%" in told
    assert f"{passes * 500}/{passes * 500}" in told


def test_rows_times_scales_are_the_weighted_rows_of_the_estimator(tmp_path: Path) -> None:
    store, _ = stores(tmp_path, dtype="float32")
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i", dtype="float32")
    for c, (name, weight) in enumerate(store.weights.items()):
        expected = weight * rs.ReTrac().rows(store, name)
        chunks = [index.chunk(number) for number in range(len(index.chunks))]
        assert all(chunk.kept for chunk in chunks)
        rows = np.concatenate([chunk.rows[c] * chunk.scale[c][:, None] for chunk in chunks])
        norms = np.concatenate([chunk.norm[c] for chunk in chunks])
        np.testing.assert_allclose(rows, expected, rtol=1e-6)
        assert (norms >= np.linalg.norm(rows.astype(np.float64), axis=1)).all()


@pytest.mark.slow
def test_an_index_of_more_files_than_a_process_may_map_keeps_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, queries = stores(tmp_path)
    monkeypatch.setattr("retrac_scale.index.build.CHUNK_BYTES", 1)
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    expected = index.query(queries, 20)
    files_of_a_chunk = 3 * len(index.checkpoints) + 1
    monkeypatch.setattr("retrac_scale.index.reader.KEPT_MAPS", 2 * files_of_a_chunk)
    index = rs.open_index(tmp_path / "i")
    for _ in range(2):
        found = index.query(queries, 20)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert [index.chunk(number).kept for number in range(len(index.chunks))].count(True) == 2


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_memory_disk_and_remote_indexes_answer_alike(tmp_path: Path, dtype: Any) -> None:
    store, queries = stores(tmp_path)
    answers = [
        rs.build_index(store, rs.ReTrac(), out, dtype=dtype).query(queries, 20)
        for out in (None, tmp_path / "i", f"memory://index-{dtype}")
    ]
    for other in answers[1:]:
        np.testing.assert_array_equal(other.ids, answers[0].ids)
        np.testing.assert_array_equal(other.scores, answers[0].scores)


def test_deleted_samples_are_left_out_of_an_index(tmp_path: Path) -> None:
    store, queries = stores(tmp_path)
    store.delete([0, 17, 299])
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    assert index.shape[1] == 297
    assert index.ids.tolist() == [i for i in range(300) if i not in (0, 17, 299)]
    np.testing.assert_array_equal(index.columns["label"], index.ids % 5)
    assert not set(index.query(queries, 297).ids[0].tolist()) & {0, 17, 299}
    store.delete(np.arange(300))
    with pytest.raises(ValueError, match="there is nothing to index"):
        rs.build_index(store, rs.ReTrac(), None)


def test_memory_of_building_does_not_grow_with_deletions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrac_scale.estimators.fitting.PIECE_BYTES", 2**16)
    rows = np.random.default_rng(0).standard_normal((8192, 1, 512), dtype=np.float32)
    store = rs.write_store(tmp_path / "s", {"a": rows}, dtype="float32")
    store.delete(np.flatnonzero(np.arange(8192) % 64))
    tracemalloc.start()
    index = rs.build_index(store, rs.TracIn(), tmp_path / "i", dtype="float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21, f"{peak} bytes to build an index of 256 kB out of a store of 16 MB"
    stored = np.concatenate([index.chunk(number).rows[0] for number in range(len(index.chunks))])
    np.testing.assert_array_equal(stored, rows[::64, 0])


def test_a_store_that_changed_is_refused_with_the_reason(tmp_path: Path) -> None:
    store, queries = stores(tmp_path)
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    assert index.query(queries, 1).ids.shape == (3, 1)
    store.delete([5])
    for opened in (index, rs.open_index(tmp_path / "i")):
        with pytest.raises(rs.StaleIndexError, match="added, deleted or written anew; build the index again"):
            opened.query(queries)
    again = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    assert 5 not in again.query(queries, 299).ids
    np.testing.assert_array_equal(rs.open_index(tmp_path / "i").ids, again.ids)
    with pytest.raises(rs.StaleIndexError):
        index.query(queries)
    with pytest.raises(ValueError, match=r"estimator\.kind is 'ReTrac' there and 'TracIn' here; choose another path"):
        rs.build_index(store, rs.TracIn(), tmp_path / "i")


def test_a_stale_index_of_another_store_is_not_replaced(tmp_path: Path) -> None:
    store, _ = stores(tmp_path)
    rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    moved = shutil.move(tmp_path / "s", tmp_path / "elsewhere")
    rs.open_store(moved).delete([5])
    with pytest.raises(ValueError, match=r"store is .* there and .* here; choose another path"):
        rs.build_index(rs.open_store(moved), rs.ReTrac(), tmp_path / "i")
    assert rs.open_index(tmp_path / "i").shape[1] == 300


def test_a_stale_index_of_a_store_in_memory_asks_for_another_path(tmp_path: Path) -> None:
    store, queries = stores(None)
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    store.delete([5])
    with pytest.raises(rs.StaleIndexError, match="build the index again at another path"):
        index.query(queries)
    with pytest.raises(ValueError, match=r"revision is .*; choose another path"):
        rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    assert rs.build_index(store, rs.ReTrac(), tmp_path / "j").query(queries, 1).ids.shape == (3, 1)


@pytest.mark.parametrize("change", ["deleted", "uncommitted"])
def test_a_store_that_changes_after_a_long_rest_is_refused_too(tmp_path: Path, change: str) -> None:
    store, queries = stores(tmp_path)
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    for path in (tmp_path / "s").rglob("*"):
        os.utime(path, (1e9, 1e9))
    os.utime(tmp_path / "s", (1e9, 1e9))
    np.testing.assert_array_equal(index.query(queries).ids, index.query(queries).ids)
    if change == "deleted":
        store.delete([5])
    else:
        (tmp_path / "s" / "a" / "commit" / "c.1.0").unlink()
    with pytest.raises(rs.StaleIndexError, match="build the index again"):
        index.query(queries)


def test_a_store_that_is_gone_or_another_is_refused_with_the_reason(tmp_path: Path) -> None:
    store, queries = stores(tmp_path)
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(rs.StaleIndexError, match="cannot be used: there is no sketch store at"):
        index.query(queries)
    rs.write_store(tmp_path / "s", {"a": np.ones((300, 2, 8)), "b": np.ones((300, 2, 8))})
    with pytest.raises(rs.StaleIndexError, match=r"projection\.dim is 16 there and 8 here"):
        index.query(queries)


def test_a_damaged_or_missing_chunk_is_never_scored(tmp_path: Path) -> None:
    store, queries = stores(tmp_path)
    rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    file = tmp_path / "i" / "row" / "c" / "1" / "2" / "0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStoreError, match=r"fails its checksum; .* build an index again"):
        rs.open_index(tmp_path / "i").query(queries)
    remote = rs.build_index(store, rs.ReTrac(), "memory://damaged")
    fsspec.filesystem("memory").rm("/damaged/row/c/1/2/0")
    with pytest.raises(DamagedStoreError, match=r"row/c/1/2/0 is missing; .* build an index again"):
        remote.query(queries)


@pytest.mark.parametrize(
    ("name", "harm"),
    [("row/c/1/2/0", "flip"), ("scale/c/0/1", "cut"), ("id/c/3", "remove"), ("column/artist/code/c/0", "flip"),
     ("norm/zarr.json", "remove")],
)  # fmt: skip
def test_a_damaged_index_is_built_again(tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    store, queries = stores(tmp_path)
    expected = rs.build_index(store, rs.ReTrac(), tmp_path / "i").query(queries)
    file = tmp_path / "i" / name
    content = file.read_bytes()
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:9] if harm == "cut" else bytes([content[0] ^ 1]) + content[1:])
    found = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    assert "is damaged and built again" in caplog.text
    assert file.read_bytes() == content
    np.testing.assert_array_equal(found.query(queries).ids, expected.ids)
    np.testing.assert_array_equal(rs.open_index(tmp_path / "i").query(queries).scores, expected.scores)


def test_an_index_is_on_the_disk_before_it_is_called_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = stores(tmp_path)
    forced: dict[str, bool] = {}
    root = tmp_path / "i" / "zarr.json"
    monkeypatch.setattr(
        objects,
        "force",
        lambda path: forced.setdefault(str(path), root.exists() and "complete" in root.read_text()),
    )
    rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    places = {tmp_path / "i", *(tmp_path / "i").rglob("*")} - {root}
    assert {str(place): False for place in places}.items() <= forced.items()


@pytest.mark.parametrize("url", ["disk", "memory://swapped"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("row/c/0/1/0", "row/c/0/2/0"),
        ("row/c/0/1/0", "row/c/1/1/0"),
        ("scale/c/0/1", "scale/c/0/2"),
        ("norm/c/0/1", "norm/c/1/1"),
        ("scale/c/0/1", "norm/c/0/1"),
        ("id/c/1", "id/c/2"),
        ("id/zarr.json", "scale/zarr.json"),
        ("column/artist/code/c/0", "column/label/c/0"),
    ],
)
def test_chunks_that_changed_places_are_never_scored_and_built_again(
    url: str, one: str, other: str, tmp_path: Path
) -> None:
    store, queries = stores(tmp_path)
    place = str(tmp_path / "i") if url == "disk" else url
    files, folder = fsspec.core.url_to_fs(place)
    if url != "disk":
        files.store.clear()
    index = rs.build_index(store, rs.ReTrac(), place)
    expected = index.query(queries, where="artist == 'artist 3'")
    contents = [files.cat(f"{folder}/{key}") for key in (one, other)]
    for key, content in zip((other, one), contents, strict=True):
        files.pipe(f"{folder}/{key}", content)
    with pytest.raises(
        DamagedStoreError, match=r"not the chunk that|not what was written|instead of .* bytes|bytes in"
    ):
        rs.open_index(place).query(queries, where="artist == 'artist 3'")
    if url == "disk":
        again = rs.build_index(store, rs.ReTrac(), place).query(queries, where="artist == 'artist 3'")
        np.testing.assert_array_equal(again.scores, expected.scores)


@pytest.mark.parametrize("harm", ["cut", "weight"])
def test_a_damaged_description_of_an_index_is_named_and_built_again(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, queries = stores(tmp_path)
    expected = rs.build_index(store, rs.ReTrac(), tmp_path / "i").query(queries)
    file = tmp_path / "i" / "zarr.json"
    content = file.read_text()
    file.write_text(content[:99] if harm == "cut" else content.replace('"a": 0.5', '"a": 0.6'))
    with pytest.raises(DamagedStoreError, match=r"zarr\.json is damaged"):
        rs.open_index(tmp_path / "i")
    np.testing.assert_array_equal(rs.build_index(store, rs.ReTrac(), tmp_path / "i").query(queries).ids, expected.ids)
    assert file.read_text() == content
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match="holds something damaged that is no index"):
        rs.build_index(store, rs.ReTrac(), tmp_path / "other")


def test_an_index_without_a_seal_is_read_and_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, queries = stores(tmp_path)
    built = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    earlier = {key: value for key, value in built.meta.items() if key not in ("seals", "digest")}
    zarr.open_group(tmp_path / "i", mode="r+").attrs["retrac_scale"] = earlier
    np.testing.assert_array_equal(rs.open_index(tmp_path / "i").query(queries).ids, built.query(queries).ids)
    assert rs.build_index(store, rs.ReTrac(), tmp_path / "i").meta == built.meta
    assert "of an earlier release, which did not seal it" in caplog.text


@pytest.mark.parametrize("options", [{}, {"group_by": "artist"}])
def test_chunks_that_cannot_match_are_not_read(tmp_path: Path, options: dict[str, Any]) -> None:
    store, queries = stores(tmp_path)
    index = rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    few = index.query(queries, 5, where="id < 64 or id >= 192", **options)
    (tmp_path / "i" / "row" / "c" / "1" / "2" / "0").unlink()  # samples 128 .. 191
    index = rs.open_index(tmp_path / "i")
    np.testing.assert_array_equal(index.query(queries, 5, where="id < 64 or id >= 192", **options).ids, few.ids)
    with pytest.raises(DamagedStoreError, match="is missing"):
        index.query(queries, 5, where="id < 129", **options)


def test_workers_build_the_same_files_and_give_the_same_answers(tmp_path: Path) -> None:
    store, queries = stores(tmp_path)
    here = rs.build_index(store, rs.ReTrac(), tmp_path / "here")
    with Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as client:
        there = rs.build_index(store, rs.ReTrac(), tmp_path / "there", client=client)
        for file in (tmp_path / "here").rglob("*"):
            if file.is_file():
                assert file.read_bytes() == (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes()
        one, two = here.query(queries, 9, side="both"), there.query(queries, 9, side="both", client=client)
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.scores, two.scores)
        groups = [index.query(queries, 3, group_by="artist", client=c) for index, c in ((here, None), (there, client))]
        np.testing.assert_array_equal(groups[0].ids, groups[1].ids)
        np.testing.assert_array_equal(groups[0].scores, groups[1].scores)
        np.testing.assert_array_equal(
            rs.self_influence(store, rs.ReTrac(), client=client), rs.self_influence(store, rs.ReTrac())
        )
        with pytest.raises(ValueError, match="workers cannot reach"):
            rs.build_index(store, rs.ReTrac(), None, client=client)


def test_int8_in_store_queries_and_index_keeps_to_the_bounds_of_the_three_roundings() -> None:
    """An entry is off by at most 1/254 of its row's largest, at each of them, also where timesteps cancel."""
    rng, k = np.random.default_rng(0), 32
    half = rng.standard_normal((60, 1, k))
    rows = np.concatenate([half, -half + 0.01 * rng.standard_normal(half.shape), 0.02 * half], 1).astype(np.float32)
    asked = rng.standard_normal((5, 3, k)).astype(np.float32)
    store, queries = rs.write_store(None, {"a": rows}, dtype="int8"), rs.write_store(None, {"a": asked}, dtype="int8")
    found = rs.build_index(store, rs.TracIn(), None, dtype="int8").scores(queries).compute()
    r, q = rows.astype(np.float64).mean(1), asked.astype(np.float64).mean(1)
    in_store, in_queries = (np.abs(each).max(2).mean(1) / 254 for each in (rows, asked))
    in_index = (np.abs(r).max(1) + in_store) / 254
    of_row, of_query = in_store + in_index, in_queries[:, None]
    bound = np.abs(q).sum(1)[:, None] * of_row + of_query * (np.abs(r).sum(1) + k * of_row)
    off = np.abs(found - q @ r.T)
    assert (off <= 1.001 * bound).all()
    assert (off > 1.001 * np.abs(q).sum(1)[:, None] * in_index).any()  # the index's own bound is not all
