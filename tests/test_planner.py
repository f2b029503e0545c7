"""The planner: sizes to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import retrac_scale as rs
from retrac_scale import demo, planner
from retrac_scale.store import create_store, write_block
from retrac_scale.store.schema import CONTENT_WORDS, SKETCHED


def array_bytes(path: Path) -> tuple[int, int]:
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json"]
    return sum(file.stat().st_size for file in files), len(files)


def write(path: Path, sketches: Any, planes: Any, fingerprint: Any, **options: Any) -> None:
    """A store with all that `sketch` keeps."""
    weights = dict.fromkeys(sketches, 1.0)
    shape = next(iter(sketches.values())).shape
    store = create_store(path, shape=shape, weights=weights, fingerprint=fingerprint, quantities=SKETCHED, **options)
    for name, values in sketches.items():
        for number, block in enumerate(store.blocks):
            ones = np.ones_like(planes[name][block], np.float32)
            contents = np.ones((len(ones), CONTENT_WORDS), np.uint64)
            told: dict[str, Any] = {"losses": ones, "timesteps": ones.astype(np.int64), "contents": contents}
            write_block(store, name, number, values[block], ones, **told)


def metadata_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("zarr.json"))


@pytest.mark.parametrize(("n", "t", "c", "k"), [(7, 3, 2, 5), (130, 1, 1, 64), (len(demo.load_scans()), 1, 1, 4096)])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_the_size_of_a_store_is_predicted_to_the_byte(
    tmp_path: Path, n: int, t: int, c: int, k: int, dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    sketches = {f"checkpoint-{i}": rng.standard_normal((n, t, k), dtype=np.float32) for i in range(c)}
    planes = {name: np.ones((n, t)) for name in sketches}
    fingerprint = {"projection": {"kind": "given", "dim": k}}
    write(tmp_path / "s", sketches, planes, fingerprint, dtype=dtype, ids=np.arange(n))
    predicted = planner.store_size(n, t, c, k, dtype=dtype, fingerprint=fingerprint)
    assert predicted.metadata_bytes == metadata_bytes(tmp_path / "s")
    assert (predicted.array_bytes, predicted.files) == array_bytes(tmp_path / "s")


def test_ids_and_columns_are_part_of_the_size(tmp_path: Path) -> None:
    n, t, c, k = 90, 1, 2, 16
    ids = [f"image {number}" for number in range(n)]
    columns = {"shows": [f"digit {number % 10}" for number in range(n)], "price": np.linspace(0, 1, n)}
    sketches = {f"checkpoint-{i}": np.ones((n, t, k), np.float32) for i in range(c)}
    planes = {name: np.ones((n, t)) for name in sketches}
    fingerprint = {"projection": {"kind": "given", "dim": k}}
    write(tmp_path / "s", sketches, planes, fingerprint, dtype="int8", ids=np.array(ids), columns=columns)
    predicted = planner.store_size(n, t, c, k, fingerprint=fingerprint, ids=ids, columns=columns)
    assert predicted.metadata_bytes == metadata_bytes(tmp_path / "s")
    assert (predicted.array_bytes, predicted.files) == array_bytes(tmp_path / "s")


@pytest.mark.parametrize(("n", "c", "k"), [(1000, 1, 16), (130, 3, 5), (7, 2, 64)])
def test_the_size_of_an_index_is_predicted_to_the_byte(tmp_path: Path, n: int, c: int, k: int) -> None:
    rng = np.random.default_rng(0)
    store = rs.write_store(None, {f"checkpoint-{i}": rng.standard_normal((n, 2, k)) for i in range(c)})
    rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    assert planner.index_bytes(n, c, k) == array_bytes(tmp_path / "i")[0]


@pytest.mark.parametrize(("n", "t", "k"), [(1000, 4, 16), (70, 3, 5)])
def test_an_index_with_matched_pairing_holds_every_timesteps_entries(tmp_path: Path, n: int, t: int, k: int) -> None:
    sketches = {"c": np.random.default_rng(0).standard_normal((n, t, k))}
    store = rs.write_store(None, sketches, timesteps=list(range(t)))
    rs.build_index(store, rs.ReTracRidge(), tmp_path / "i")
    assert planner.index_bytes(n, 1, k, t, ridge=True) == array_bytes(tmp_path / "i")[0]


def test_workers_for_a_deadline_share_the_blocks() -> None:
    assert planner.workers_needed(100.0, 30.0) == 4
    with pytest.raises(ValueError, match="must be in the future"):
        planner.workers_needed(1.0, 0.0)
