"""The store: readable by plain zarr and xarray, whole or refused, encoded within its bound."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st

import retrac_scale as rs
from retrac_scale.columns import check_ids
from retrac_scale.store import create_store, write_block
from retrac_scale.store.encoding import encode
from retrac_scale.store.schema import is_remote, whereabouts


def random_store(out: Any = None, **options: Any) -> rs.SketchStore:
    rng = np.random.default_rng(0)
    sketches = {name: rng.standard_normal((5, 2, 16)) for name in ("a", "b")}
    return rs.write_store(out, sketches, **{"timesteps": [3, 9], **options})


def test_zarr_and_xarray_open_it_with_named_dimensions(tmp_path: Path) -> None:
    random_store(tmp_path / "s", losses={name: np.ones((5, 2)) for name in "ab"}, ids=list("vwxyz"))
    group = zarr.open_group(tmp_path / "s", mode="r")
    assert sorted(group) == ["a", "b", "deleted", "id"]
    dataset = xarray.open_zarr(tmp_path / "s", group="a", consolidated=False)
    assert dataset["sketch"].dims == ("sample", "timestep", "k")
    for name in ("scale", "norm", "loss", "timestep"):
        assert dataset[name].dims == ("sample", "timestep")
    assert xarray.open_zarr(tmp_path / "s", consolidated=False)["id"].values.tolist() == list("vwxyz")
    raw = dataset["sketch"].values * dataset["scale"].values[..., None]
    np.testing.assert_allclose(raw, rs.open_store(tmp_path / "s").sketches("a"))


@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["int8", "float16", "bfloat16", "float32"]),
    magnitude=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_stored_rows_are_within_the_step_of_their_type(seed: int, dtype: Any, magnitude: float) -> None:
    rows = np.random.default_rng(seed).standard_normal((4, 2, 9)).astype(np.float32) * np.float32(magnitude)
    rows[1] = 0
    store = rs.write_store(None, {"c": rows}, dtype=dtype)
    step = {"int8": 0.501 / 127, "float16": 2**-11 * 1.01, "bfloat16": 2**-8 * 1.01, "float32": 0.0}[dtype]
    bound = step * np.abs(rows).max(2, keepdims=True)
    assert (np.abs(store.sketches("c") - rows) <= bound).all()
    np.testing.assert_allclose(store.norms("c"), np.linalg.norm(rows.astype(np.float64), axis=2), rtol=1e-5)


def by_definition(rows: Any, dtype: str) -> tuple[Any, Any]:
    """Format version 1's rows and scales, one NumPy operation on all of them after another."""
    scale = np.abs(rows).max(-1) / np.float32(127 if dtype == "int8" else 1)
    unit = rows / np.where(scale > 0, scale, np.float32(1))[..., None]
    if dtype != "bfloat16":
        return (np.rint(unit) if dtype == "int8" else unit).astype(dtype), scale
    bits = unit.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), scale


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_stored_bits_are_those_of_the_format_whatever_the_tiles_and_magnitudes(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((130, 3, 4096), dtype=np.float32)  # several tiles, the last not full
    rows *= np.exp(rng.uniform(-60, 60, rows.shape)).astype(np.float32)
    rows *= np.float32(10) ** rng.integers(-20, 10, (130, 3, 1)).astype(np.float32)
    rows[7] = 0
    rows[7, 1] = -0.0
    rows[7, 2] = 1e-45  # its scale is 0 as well
    rows[8] = np.arange(-2048, 2048) / 2  # ties
    for some in (rows, rows[::2], np.asfortranarray(rows)):
        stored, scale = encode(some, dtype)
        expected, scales = by_definition(np.ascontiguousarray(some), dtype)
        assert stored.dtype == expected.dtype
        assert stored.tobytes() == expected.tobytes()
        assert scale.tobytes() == scales.tobytes()


def test_files_are_on_the_disk_before_they_are_named_and_a_block_before_its_commit_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(
        tmp_path / "s",
        shape=(4, 1, 8),
        ids=np.arange(4),
        weights={"c": 1.0},
        fingerprint={},
        dtype="int8",
        quantities=(),
    )
    done: list[tuple[str, str]] = []

    def fsync(descriptor: int) -> None:
        done.append(("forced", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(source: str, target: str) -> None:
        assert ("forced", source) in done
        done.append(("named", target))
        rename(source, target)

    rename = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_block(store, "c", 0, np.ones((4, 1, 8), np.float32), np.ones((4, 1), np.float32))
    commit = done.index(("named", f"{tmp_path}/s/c/commit/c.0.0"))
    for file in ("sketch/c/0/0/0", "scale/c/0/0", "norm/c/0/0"):
        place = tmp_path / "s" / "c" / file
        named = done.index(("named", str(place)))
        for folder in place.parents[: len(place.relative_to(tmp_path).parts)]:
            assert ("forced", str(folder)) in done[named:commit]
    assert ("forced", f"{tmp_path}/s/c/commit") in done[commit:]


def test_weights_ids_and_timesteps_are_kept(tmp_path: Path) -> None:
    random_store(tmp_path / "s", weights=[0.5, 2.0], ids=[7, 3, 5, 1, 9])
    store = rs.open_store(str(tmp_path / "s"))
    assert store.weights == {"a": 0.5, "b": 2.0}
    assert store.ids.tolist() == [7, 3, 5, 1, 9]
    assert store.timesteps("b").tolist() == [[3, 9]] * 5
    with pytest.raises(ValueError, match="written without loss"):
        store.losses("a")
    with pytest.raises(KeyError, match="no checkpoint 'c'"):
        store.sketches("c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [1, 2, 2, 3, 4]}, r"id .*2.* is given twice, at positions \[1, 2\]"),
        ({"ids": [1, 2]}, "give one id per sample"),
        ({"columns": {"class": [1] * 5}}, r"cannot be called 'class'; .* where="),
        ({"columns": {"in": [1] * 5}}, "cannot be called 'in'"),
        ({"weights": [1.0]}, "got 1 weights for 2 checkpoints"),
        ({"norms": {"a": np.ones((5, 2))}}, r"norms are given for \['a'\]"),
        ({"norms": {"a": np.ones((5, 2)), "b": np.ones((5, 3))}}, r"norms of checkpoint 'b' have shape \(5, 3\)"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"norms": {"a": np.ones((5, 2)), "b": -np.ones((5, 2))}}, r"norms of checkpoint 'b' are negative, such as -1"),
        ({"timesteps": [0.3, 0.9]}, "timesteps of checkpoint 'a' have dtype float64; give integers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_store(**change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_type_are_taken_as_they_are_and_without_their_graph(dtype: torch.dtype) -> None:
    sketches = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    norms: Any = sketches.norm(dim=2)
    steps: Any = torch.tensor([3, 9])
    store = rs.write_store(
        None, {"c": sketches}, norms={"c": norms}, losses={"c": norms}, timesteps=steps, dtype="float32"
    )
    np.testing.assert_array_equal(store.sketches("c"), sketches.detach().float())
    np.testing.assert_array_equal(store.norms("c"), norms.detach().float())
    np.testing.assert_array_equal(store.losses("c"), norms.detach().float())
    assert store.timesteps("c").tolist() == [[3, 9]] * 3


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sketch_that_is_not_finite_is_named(dtype: Any, value: float) -> None:
    sketches = np.ones((3, 2, 4))
    sketches[2, 1, 0] = value
    with pytest.raises(ValueError, match="checkpoint 'c', sample 12, timestep 8"):
        rs.write_store(
            None, {"c": sketches}, norms={"c": np.ones((3, 2))}, ids=[10, 11, 12], timesteps=[4, 8], dtype=dtype
        )


def test_existing_paths_and_foreign_things_are_refused(tmp_path: Path) -> None:
    random_store(tmp_path / "s")
    with pytest.raises(ValueError, match="already holds a store"):
        random_store(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="there is no sketch store at"):
        rs.open_store(tmp_path / "nothing")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(ValueError, match="is a zarr group but no sketch store"):
        rs.open_store(tmp_path / "other")
    with pytest.raises(ValueError, match="holds something that is no sketch store"):
        random_store(tmp_path / "other")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    root = random_store(tmp_path / "s").root
    root.attrs["retrac_scale"] = {**root.attrs["retrac_scale"], "format": 99}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="format version 99"):
        rs.open_store(tmp_path / "s")


def test_a_damaged_chunk_is_never_read_as_data(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s")
    chunk = tmp_path / "s" / "a" / "sketch" / "c" / "0" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        store.sketches("a")


def test_a_row_that_is_not_finite_behind_many_good_ones_leaves_no_file(tmp_path: Path) -> None:
    n, k = 24, 2**18  # several pieces of the chunk stand on the disk when the last row is reached
    store = create_store(
        tmp_path / "s",
        shape=(n, 1, k),
        ids=np.arange(n),
        weights={"a": 1.0},
        fingerprint={},
        dtype="int8",
        quantities=(),
    )
    before = sorted(tmp_path.rglob("*"))
    rows = np.ones((n, 1, k), np.float32)
    rows[-1, 0, -1] = np.nan
    last = store.blocks[-1]
    with pytest.raises(ValueError, match=f"sample {n - 1}"):
        write_block(store, "a", len(store.blocks) - 1, rows[last], np.ones((last.stop - last.start, 1), np.float32))
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]
    assert not store.committed("a").any()


@given(units=st.lists(st.integers(1, 2**17), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_int8_rows_of_denormals_never_wrap_round(units: list[int], seed: int) -> None:
    largest = np.array([189, *units], np.float32)[:, None] * np.float32(2.0**-149)  # 189 / 127 is stored as 1
    rows = np.random.default_rng(seed).uniform(-1, 1, (len(largest), 8)).astype(np.float32) * largest
    rows[:, :2] = np.hstack([largest, -largest])
    stored, scale = encode(rows, "int8")
    kept = scale > 0
    assert (np.abs(rows[~kept]) < 4.6e-41).all()
    assert (stored[~kept] == 0).all()
    assert (stored[kept, 0] == 127).all()
    assert (stored[kept, 1] == -127).all()


def test_strings_of_pandas_are_ids_and_columns_but_other_objects_are_not() -> None:
    names = np.array(["b", "añ", "c"], object)
    store = rs.write_store(None, {"c": np.ones((3, 1, 4))}, ids=names, columns={"artist": names})
    assert store.ids.tolist() == store.columns["artist"].tolist() == names.tolist()
    for values in (np.array(["b", None, "c"], object), np.array(["b", 1.5, "c"], object)):
        with pytest.raises(ValueError, match="must be integers or strings, got dtype object"):
            check_ids(values, 3)
        with pytest.raises(ValueError, match="column 'artist' has dtype object"):
            rs.write_store(None, {"c": np.ones((3, 1, 4))}, columns={"artist": values})


@pytest.mark.parametrize(
    "ids", [np.array([3, 2**63 + 5], np.uint64), [3, 2**63 + 5], [2**63 + 5, 2**63], [2**70, 3], [-(2**63) - 1, 3]]
)
def test_ids_beyond_int64_are_refused_and_never_wrap(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"sample id -?\d{19,22} is beyond int64; give such ids as strings"):
        check_ids(ids, 2)
    assert check_ids(np.array([3, 2**63 - 1], np.uint64), 2).tolist() == [3, 2**63 - 1]


def test_a_path_begins_at_home_or_here_wherever_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    random_store("~/s.zarr")
    store = random_store("here.zarr")
    assert (tmp_path / "home/s.zarr/zarr.json").exists()
    assert not (tmp_path / "~").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.sketches("a").shape == rs.open_store("~/s.zarr").sketches("a").shape
    assert whereabouts("../here.zarr") == str(tmp_path / "here.zarr")
    assert whereabouts("s3://bucket/s.zarr") == "s3://bucket/s.zarr"


def test_chained_urls_are_those_of_fsspec(tmp_path: Path) -> None:
    random_store(tmp_path / "s.zarr", ids=list("vwxyz"))
    archive = shutil.make_archive(str(tmp_path / "s"), "zip", tmp_path / "s.zarr")
    found = rs.open_store(f"zip::file://{archive}")
    assert found.ids.tolist() == list("vwxyz")
    np.testing.assert_array_equal(found.sketches("a"), rs.open_store(tmp_path / "s.zarr").sketches("a"))
    assert is_remote("simplecache::s3://bucket/s.zarr")


def test_a_colon_in_a_name_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_store("a::b.zarr", ids=list("vwxyz"))
    assert [path.name for path in tmp_path.iterdir()] == ["a::b.zarr"]
    assert rs.open_store("a::b.zarr").ids.tolist() == list("vwxyz")
