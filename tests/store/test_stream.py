"""Rows streamed into a store: whatever the batches, the same rows; what is not whole is not seen."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import zarr

import retrac_scale as rs
from retrac_scale.store import objects
from retrac_scale.store.stream import _NewPart  # what a killed process would have left of it

N, T, K = 1000, 2, 8
RNG = np.random.default_rng(0)
ROWS = {name: RNG.standard_normal((N, T, K)).astype(np.float32) for name in ("a", "b")}
LOSSES = {name: RNG.random((N, T)).astype(np.float32) for name in ROWS}
IDS = np.array([f"{i:04}" for i in RNG.permutation(N)])
LAYOUT = rs.Layout(64)


def stream(out: Path, batches: list[slice], **options: Any) -> rs.StoreWriter:
    with rs.StoreWriter(out, layout=LAYOUT, **options) as writer:
        for rows in batches:
            add(writer, rows)
    return writer


def add(writer: rs.StoreWriter, rows: slice) -> None:
    part = {name: x[rows] for name, x in ROWS.items()}
    losses = {name: x[rows] for name, x in LOSSES.items()}
    writer.append(IDS[rows], part, losses=losses, timesteps=[3, 9], columns={"year": np.arange(N)[rows]})


def assert_holds(store: rs.SketchStore, rows: slice) -> None:
    part = {name: x[rows] for name, x in ROWS.items()}
    whole = rs.write_store(None, part, losses={name: x[rows] for name, x in LOSSES.items()}, ids=IDS[rows])
    np.testing.assert_array_equal(store.ids, whole.ids)
    np.testing.assert_array_equal(store.columns["year"], np.arange(N)[rows])
    for name in ROWS:
        for read in ("sketches", "norms", "losses"):
            np.testing.assert_array_equal(getattr(store, read)(name), getattr(whole, read)(name))
        assert (store.timesteps(name) == [3, 9]).all()


@pytest.mark.parametrize("sizes", [[1000], [1, 63, 64, 65, 7, 800], [100] * 10])
def test_whatever_the_batches_the_rows_are_those_of_one_array(sizes: list[int], tmp_path: Path) -> None:
    edges = np.cumsum([0, *sizes]).tolist()
    writer = stream(tmp_path / "s", [slice(*pair) for pair in itertools.pairwise(edges)], weights={"a": 2, "b": 1})
    store = rs.open_store(tmp_path / "s")
    assert (writer.samples, store.weights, len(store.parts)) == (N, {"a": 2, "b": 1}, 1)
    assert_holds(store, slice(N))
    verdict = rs.verify_store(tmp_path / "s")
    assert (verdict.findings, verdict.blocks) == ([], 2 * -(-N // 64))


def test_rows_are_appended_to_a_store_and_what_is_there_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrac_scale.store.stream.LIST_CHUNK", 300)  # samples of a part
    with pytest.raises(TypeError):
        stream(tmp_path / "s", [slice(0, 250), slice(250, 500), slice(500, 600), slice("x", 0)])
    assert rs.open_store(tmp_path / "s").shape[0] == 500
    stream(tmp_path / "s", [slice(0, 700), slice(700, N)])
    store = rs.open_store(tmp_path / "s")
    assert_holds(store, slice(N))
    assert rs.verify_store(tmp_path / "s").findings == []
    queries = rs.take(store, IDS[[3, 950]])
    assert rs.build_index(store, rs.TracIn(), None).query(queries, 1).ids.ravel().tolist() == IDS[[3, 950]].tolist()


def test_a_part_that_was_begun_is_not_seen_and_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    for start in (0, 400):
        writer = rs.StoreWriter(tmp_path / "s", layout=LAYOUT)
        add(writer, slice(start, start + 200))
        part = writer._part
        assert isinstance(part, _NewPart)
        writer._held.close()  # killed
        if start:
            assert rs.open_store(tmp_path / "s").shape[0] == 400
        stream(tmp_path / "s", [slice(start, start + 400)])
        assert_holds(rs.open_store(tmp_path / "s"), slice(start + 400))
        assert rs.verify_store(tmp_path / "s").findings == []


@pytest.mark.parametrize("there", ["damaged", "begun"])
def test_a_writer_that_is_refused_removes_nothing(there: str, tmp_path: Path) -> None:
    for start in (0, 400):
        stream(tmp_path / "s", [slice(start, start + 200)])
    begun = rs.StoreWriter(tmp_path / "s")
    add(begun, slice(600, 700))
    begun._held.close()  # killed
    (described,) = (file for file in tmp_path.glob("s/parts/*/zarr.json") if "digest" in file.read_text())
    if there == "damaged":
        described.unlink()
    files = sorted(tmp_path.rglob("*"))
    refusals = {
        "damaged": (rs.store.DamagedStoreError, "zarr.json is missing; run `retrac-scale verify`"),
        "begun": (ValueError, "has dtype int8"),
    }
    with pytest.raises(refusals[there][0], match=refusals[there][1]):
        rs.StoreWriter(tmp_path / "s", dtype="float32")
    assert sorted(tmp_path.rglob("*")) == files


def test_a_part_whose_description_was_not_even_begun_is_none(tmp_path: Path) -> None:
    stream(tmp_path / "s", [slice(0, 200)])
    part = tmp_path / "s/parts/0001-01234567"
    part.mkdir(parents=True)
    (part / "zarr.json.0a.partial").write_text("{")
    assert rs.open_store(tmp_path / "s").shape[0] == 200
    assert [finding.kind for finding in rs.verify_store(tmp_path / "s").findings] == ["stray"]
    stream(tmp_path / "s", [slice(0, 300)])
    assert not part.exists()
    assert_holds(rs.open_store(tmp_path / "s"), slice(300))


def test_the_description_comes_last_and_all_that_it_vouches_for_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream(tmp_path / "s", [slice(0, 100)])
    forced: set[str] = set()
    force, replace = objects.force, os.replace

    def noted(path: Any) -> None:
        forced.add(str(path))
        force(path)

    monkeypatch.setattr(objects, "force", noted)

    def named(partial: str, file: str) -> None:
        if "digest" in Path(partial).read_text(errors="replace") and file.endswith("zarr.json") and "parts/" in file:
            folder = Path(file).parent
            there = {str(place) for place in [folder, *folder.rglob("*")] if ".partial" not in place.name}
            assert {str(Path(place)) for place in forced} >= there - {file}
            seen.append(file)
        replace(partial, file)

    seen: list[str] = []
    monkeypatch.setattr(os, "replace", named)
    stream(tmp_path / "s", [slice(100, 300)])
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"a": ROWS["a"][:9] + 1, "b": ROWS["b"][:9]}}, "begun with other arrays: samples 0 .. 8"),
        ({"losses": {name: x[:9] + 1 for name, x in LOSSES.items()}}, "samples 0 .. 8 of checkpoint 'a' .* losses"),
        ({"timesteps": [3, 10]}, "samples 0 .. 8 of checkpoint 'a' differ in their timesteps"),
        ({"columns": {"year": np.arange(9) // 8 * 8}}, f"another value in column 'year' of sample '{IDS[1]}'"),
        ({"rows": {"a": ROWS["a"][:9]}}, "weights are given for|unlike those of"),
        ({"rows": {name: x[:9, :, :5] for name, x in ROWS.items()}}, r"fingerprint.projection.dim is 8 there and 5"),
        ({"timesteps": None}, "quantities is"),
        ({"columns": {"year": np.arange(9) / 2}}, r"columns.year is 'int64' there and 'float64' here"),
        ({"ids": ["x"] * 9}, "id 'x' is given twice"),
    ],
)
def test_rows_that_do_not_belong_to_the_store_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    stream(tmp_path / "s", [slice(0, 100)])
    given: dict[str, Any] = {
        "ids": IDS[:9],
        "rows": {name: x[:9] for name, x in ROWS.items()},
        "losses": None if "rows" in change else {name: x[:9] for name, x in LOSSES.items()},
        "timesteps": [3, 9],
        "columns": {"year": np.arange(9)},
    } | change
    if "rows" in change:
        given["losses"] = {name: x[:9] for name, x in LOSSES.items() if name in change["rows"]}
    with pytest.raises(ValueError, match=message), rs.StoreWriter(tmp_path / "s") as writer:
        writer.append(given.pop("ids"), given.pop("rows"), **given)
    assert rs.open_store(tmp_path / "s").shape[0] == 100
    assert rs.verify_store(tmp_path / "s").findings == []


@pytest.mark.parametrize("year", [np.array([1990, np.nan]), np.array(["1990", "a year\0"], object)])
def test_columns_of_numbers_that_are_missing_and_of_texts_are_compared(year: Any, tmp_path: Path) -> None:
    def append(values: Any) -> None:
        with rs.StoreWriter(tmp_path / "s") as writer:
            writer.append([7, 8], {"c": np.ones((2, 1, 4))}, columns={"year": values})

    append(year)
    append(year)
    with pytest.raises(ValueError, match="another value in column 'year' of sample 7; give the same"):
        append(year[::-1])
    assert rs.open_store(tmp_path / "s").shape[0] == 2


def test_a_sample_that_was_deleted_is_refused_by_name_and_not_passed_over(tmp_path: Path) -> None:
    stream(tmp_path / "s", [slice(0, 100)])
    with rs.StoreWriter(tmp_path / "s") as writer:
        rs.open_store(tmp_path / "s").delete(IDS[[5]])
        add(writer, slice(0, 5))
        with pytest.raises(ValueError, match=f"sample '{IDS[5]}' was deleted from .* leave it out, or give it another"):
            add(writer, slice(0, 200))
        add(writer, slice(100, 200))
    assert rs.open_store(tmp_path / "s").ids[rs.open_store(tmp_path / "s").deleted].tolist() == [IDS[5]]
    assert_holds(rs.open_store(tmp_path / "s"), slice(200))


def test_an_id_that_came_before_is_refused_at_once_and_the_others_stand(tmp_path: Path) -> None:
    with rs.StoreWriter(tmp_path / "s", layout=LAYOUT) as writer:
        add(writer, slice(0, 100))
        with pytest.raises(ValueError, match=f"id '{IDS[99]}' is given twice, by two calls"):
            add(writer, slice(99, 200))
        add(writer, slice(100, 200))
    assert_holds(rs.open_store(tmp_path / "s"), slice(200))


@pytest.mark.parametrize("what", ["gradient", "gradient norm", "loss"])
@pytest.mark.parametrize("value", [np.nan, 1e300])  # of which float32 makes infinity
def test_a_value_that_is_not_finite_is_refused_at_once_and_the_others_stand(
    what: str, value: float, tmp_path: Path
) -> None:
    def append(first: int, one: float = 1) -> None:
        planes = {name: np.ones((4, 2)) for name in ("gradient", "gradient norm", "loss")}
        planes[what][2, 1] = one
        sketches = {"c": np.repeat(planes["gradient"][:, :, None], 4, 2)}
        norms, losses = ({"c": planes[name]} for name in ("gradient norm", "loss"))
        writer.append(np.arange(first, first + 4), sketches, norms=norms, losses=losses, timesteps=[3, 9])

    with rs.StoreWriter(tmp_path / "s", layout=rs.Layout(4)) as writer:
        append(0)
        with pytest.raises(ValueError, match=f"the {what} is NaN or infinite at checkpoint 'c', sample 6, timestep 9"):
            append(4, value)
        append(8)
    assert rs.open_store(tmp_path / "s").ids.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert rs.verify_store(tmp_path / "s").is_whole


def test_rows_whose_squares_overflow_are_taken_in_without_a_warning(tmp_path: Path) -> None:
    rows = {"c": np.full((4, 1, 8), 1e30, np.float32)}
    with rs.StoreWriter(tmp_path / "s") as writer:
        writer.append(range(4), rows)
    np.testing.assert_allclose(rs.open_store(tmp_path / "s").sketches("c"), rows["c"], rtol=1e-6)


def test_one_writer_at_a_time_and_no_other_kind_of_store(tmp_path: Path) -> None:
    with rs.StoreWriter(tmp_path / "s") as writer:
        with pytest.raises(ValueError, match="somebody else is writing to"):
            rs.StoreWriter(tmp_path / "s")
        add(writer, slice(0, 10))
    with pytest.raises(ValueError, match="has dtype int8, not float32; leave dtype= out"):
        rs.StoreWriter(tmp_path / "s", dtype="float32")
    with pytest.raises(ValueError, match="takes its arrays at once"):
        rs.StoreWriter(None)


@pytest.mark.parametrize("kind", ["dask", "zarr", "float64"])
def test_arrays_are_read_a_block_at_a_time(kind: str, tmp_path: Path) -> None:
    n, k = 4096, 512
    rows = RNG.standard_normal((n, 1, k)).astype(np.float64 if kind == "float64" else np.float32)
    given: Any = rows
    if kind == "dask":
        given = dask.array.from_array(rows, chunks=(700, 1, k))
    elif kind == "zarr":
        given = zarr.create_array(tmp_path / "z", shape=rows.shape, chunks=(256, 1, k), dtype="float32")
        given[:] = rows
    rs.write_store(tmp_path / "first", {"c": given[:200]})  # what is compiled and imported once
    tracemalloc.start()
    store = rs.write_store(tmp_path / "s", {"c": given}, layout=rs.Layout(128))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * k * 4 / 2  # far from a copy of the rows in float32
    whole = rs.write_store(None, {"c": rows})
    np.testing.assert_array_equal(store.sketches("c"), whole.sketches("c"))
    np.testing.assert_array_equal(store.norms("c"), whole.norms("c"))
