"""Ids, columns and what is given with images: by their places, exact, and none of them missing."""

from __future__ import annotations

import datetime
import decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from retrac_scale.columns import check_columns
from retrac_scale.datasets import Arrays, ImageFiles, Parquet

NAN = float("nan")
PICTURES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize("index", [[5, 6, 7], [2, 1, 0], list("abc")])
def test_a_series_is_taken_by_place(index: list[Any]) -> None:
    labels = pd.Series([10, 11, 12], index=index)
    dataset = Arrays(PICTURES, columns={"label": labels}, given={"label": labels})
    items: list[Any] = [dataset[row] for row in range(3)]
    assert [item["label"] for item in items] == dataset.columns["label"].tolist() == [10, 11, 12]


def test_integers_beyond_int64_stay_apart() -> None:
    hashes = [2**63 + 1, 2**63, 5]
    assert check_columns({"x": hashes}, 3)["x"].tolist() == hashes
    for values, beyond in (([2**64, 5], 2**64), ([2**63, -1], 2**63), ([-(2**63) - 1, 1], -(2**63) - 1)):
        with pytest.raises(
            ValueError, match=f"column 'x': value {beyond} is beyond int64; give such values as strings"
        ):
            check_columns({"x": values}, 2)


MISSING: list[Any] = [
    ["a", NAN, "b"],
    ["a", pd.NA, "b"],
    [1, pd.NaT, 2],
    [True, NAN, False],
    np.array(["a", NAN, "b"], object),
    pd.Series(["a", None, "b"], index=[5, 6, 7]),
    pd.array([1, None, 2], dtype="Int64"),
    pd.Series([True, None, False], dtype="boolean"),
    pd.Categorical(["a", None, "b"]),
]


@pytest.mark.parametrize("values", MISSING)
def test_a_missing_value_is_refused_with_its_row(values: Any) -> None:
    named = {"x": values}
    for build in (partial(Arrays, columns=named), partial(Arrays, given=named)):
        with pytest.raises(ValueError, match="the array has no value of 'x' in row 1; fill it in"):
            build(PICTURES)
    with pytest.raises(ValueError, match=r"column 'x'.* in row 1"):  # of a dataset of one's own
        check_columns({"x": values}, 3)


def test_nan_among_numbers_is_a_number() -> None:
    for values in ([1, NAN, 2.5], np.array([1, NAN, 2.5]), pd.Series([1, NAN, 2.5])):
        np.testing.assert_array_equal(Arrays(PICTURES, columns={"x": values}).columns["x"], [1, NAN, 2.5])


@pytest.mark.parametrize("odd", [datetime.date(2020, 1, 2), pd.Timestamp(0), datetime.time(3), decimal.Decimal(1)])
def test_what_no_column_holds_is_named_with_advice(odd: Any) -> None:
    advice = "give booleans" if isinstance(odd, decimal.Decimal) else "write dates and times as strings"
    with pytest.raises(ValueError, match=rf"column 'x' has dtype object, .*{type(odd).__name__}.* in row 1; {advice}"):
        check_columns({"x": ["a", odd]}, 2)


def test_nothing_is_given_in_the_place_of_the_picture() -> None:
    with pytest.raises(ValueError, match="the array has its pictures under 'image'"):
        Arrays(PICTURES, given={"image": [1, 2, 3]})


@pytest.mark.parametrize("kind", [np.float64, torch.float64, torch.bfloat16])
def test_a_sample_whose_embedding_changed_has_another_stamp(kind: Any, tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    embeddings: Any = np.zeros((2, 2000), kind) if kind is np.float64 else torch.zeros(2, 2000, dtype=kind)
    dataset = ImageFiles(tmp_path)
    dataset.give("embedding", embeddings)
    before: Any = dataset.stamps
    embeddings[1, 1000] = 1e-5
    assert (dataset.stamps == before).tolist() == [True, False]


def test_parquet_files_may_hold_a_column_in_several_types(tmp_path: Path) -> None:
    columns = [pa.array([1], pa.int32()), pa.array([2**62 + 1], pa.int64()), pa.array([2**63], pa.uint64())]
    for row, column in enumerate(columns):
        pq.write_table(pa.table({"image": [b""], "x": column}), tmp_path / f"{row}.parquet")
    paths: list[Any] = [tmp_path / f"{row}.parquet" for row in range(3)]
    assert Parquet(paths, columns="x").columns["x"].tolist() == [1, 2**62 + 1, 2**63]
    pq.write_table(pa.table({"image": [b""], "x": pa.nulls(1)}), tmp_path / "3.parquet")
    with pytest.raises(ValueError, match=r"has no value of 'x' in row 3; fill it in"):
        Parquet([*paths, tmp_path / "3.parquet"], columns="x")
