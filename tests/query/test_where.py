"""Which samples count: expressions give what Python gives for each sample, and wild ones are refused before a read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrac_scale as rs
from retrac_scale.columns import Places, Texts, joined
from retrac_scale.query.where import which

N = 60
RNG = np.random.default_rng(0)
COLUMNS: dict[str, Any] = {
    "year": RNG.integers(1990, 2000, N),
    "rating": RNG.integers(0, 9, N) / 2 - 1,
    "artist": np.array([f"artist {i}" for i in RNG.integers(0, 12, N)]),
    "studio": np.array(["artist 1", "artist 10", "", "artist 9", "zz", "artist ö"])[RNG.integers(0, 6, N)],
    "licence": np.array(["cc-by", "cc0", "ökonomisch"])[RNG.integers(0, 3, N)],
    "open": RNG.random(N) < 0.5,
    "label": RNG.integers(0, 6, N).astype(np.uint8),
}


@cache
def index(texts: bool = False) -> rs.Index:
    ids = np.array([f"picture-{i:02}" for i in range(N)]) if texts else np.arange(N) * 3
    store = rs.write_store(None, {"c": RNG.standard_normal((N, 1, 4))}, ids=ids, columns=COLUMNS)
    return rs.build_index(store, rs.TracIn(), None)


NUMBERS = st.one_of(
    st.sampled_from(["id", "year", "rating", "label", "-label"]),
    st.integers(-3, 2000).map(str),
    st.sampled_from(["0.5", "-1.5", "1e3"]),
)
SUMS = st.recursive(
    NUMBERS,
    lambda x: st.one_of(
        st.tuples(x, st.sampled_from("+-*"), x).map(lambda y: f"({' '.join(y)})"),
        st.tuples(x, st.sampled_from(["%", "//"]), st.sampled_from(["7", "-3", "2.5", "year"])).map(" ".join),
    ),
    max_leaves=3,
)
TEXTS = st.one_of(
    st.sampled_from(["artist", "licence"]), st.sampled_from(["artist 3", "artist 99", "", "cc0", "ö", "zz"]).map(repr)
)
COMPARED = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
LISTS = st.lists(st.sampled_from(["artist 3", "artist 4", "nobody", "cc0"]), max_size=3)
CONDITIONS = st.recursive(
    st.one_of(
        st.just("open"),
        st.tuples(st.sampled_from(["id", "year", "(rating + id)"]), COMPARED, SUMS).map(" ".join),
        st.tuples(NUMBERS, COMPARED, st.just("year"), COMPARED, NUMBERS).map(" ".join),
        st.tuples(st.sampled_from(["artist", "licence"]), COMPARED, TEXTS).map(" ".join),
        st.tuples(TEXTS, COMPARED, st.sampled_from(["artist", "licence"])).map(" ".join),
        st.tuples(st.sampled_from(["artist", "studio"]), COMPARED, st.sampled_from(["artist", "studio"])).map(" ".join),
        st.tuples(st.sampled_from(["artist in", "licence not in"]), LISTS).map(lambda x: f"{x[0]} {x[1]}"),
        st.lists(st.integers(1988, 2001), max_size=4).map(lambda x: f"year in {x}"),
    ),
    lambda x: st.one_of(
        st.tuples(x, st.sampled_from(["and", "or"]), x).map(lambda y: f"({' '.join(y)})"),
        st.tuples(x, st.sampled_from("&|^"), x).map(lambda y: f"(({y[0]}) {y[1]} ({y[2]}))"),
        x.map(lambda y: f"not ({y})"),
    ),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(expression=CONDITIONS)
def test_an_expression_says_of_each_sample_what_python_does(expression: str) -> None:
    rows = [{name: values[row].item() for name, values in {**COLUMNS, "id": index().ids}.items()} for row in range(N)]
    expected = [bool(eval(expression, {}, row)) for row in rows]
    if not any(expected):
        with pytest.raises(ValueError, match="leaves no sample"):
            which(expression, index())
    else:
        assert which(expression, index()).tolist() == expected  # type: ignore[union-attr]


def test_ids_that_are_texts_compare_as_texts() -> None:
    listed = "id in ['picture-03', 'picture-59', 'nobody', '']"
    for expression in ("id >= 'picture-50'", "'picture-50' <= id", listed):
        expected = [bool(eval(expression, {}, {"id": sample})) for sample in index(True).ids.tolist()]
        assert which(expression, index(True)).tolist() == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("label - 4 > 0", [5]),
        ("-label < -3", [4, 5]),
        ("label * 200 > 800", [5]),
        ("id % 2 == 1", [1, 3, 5]),
        ("id // 2 * 2 == id", [0, 2, 4]),
        ("id * 1 == 9007199254740993", [1]),
        ("id + id == 18014398509481986", [1]),
        ("hashed % 2 == 1", [1, 3, 5]),
        ("hashed - 9223372036854775808 == 3", [3]),
        ("-hashed < 0", [0, 1, 2, 3, 4, 5]),
        ("id * id > 9223372036854775807", [0, 1, 2, 3, 4, 5]),
        ("id % label == 2", [3, 5]),
        ("id // label > 9223372036854775807", [0]),
        ("id in [9007199254740993, 9223372036854775808, 0.5, 1e999]", [1]),
        ("hashed in [9223372036854775811, -1, True]", [3]),
        ("label in [-1, 300, 2.0, 5]", [2, 5]),
        ("id % 0 == 0 or 1 // 0 < id or label in [4 // 2]", [2]),
    ],
)
def test_integers_of_any_type_and_size_are_calculated_with_exactly(expression: str, expected: list[int]) -> None:
    places = np.arange(6)
    columns = {"label": places.astype(np.uint8), "hashed": 2**63 + places.astype(np.uint64)}
    store = rs.write_store(None, {"c": np.ones((6, 1, 4))}, ids=2**53 + places, columns=columns)
    found = which(expression, rs.build_index(store, rs.TracIn(), None))
    assert np.flatnonzero(found).tolist() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("artist == 3", "compares artist with 3, a text with a number"),
        ("year < '1999'", "a text with a number"),
        ("artist in artist", "looks in artist; `in` takes a list of values"),
        ("year in [1999, 'x']", "looks for a text among numbers"),
        ("year in [[1999]]", "only stands behind `in`"),
        ("year in [id]", "holds more than values"),
        ("artist + artist == 'x'", "calculates with artist, which is no number"),
        ("open + 1 == 2", "calculates with open, which is no number"),
        ("year == 1999 & open", "takes 1999 for a condition; put conditions joined by & or | into"),
        ("year and open", "takes year for a condition"),
        ("artist", "must say yes or no"),
        ("1 == 1", "must say yes or no"),
        ("index == 5", "names 'index'; the columns are id, artist, label, licence, open, rating, studio, year"),
        ("year is 3", "compares by `is`"),
        (f"rating * {'9' * 400} > 1", "holds a number that is too large"),
        (f"rating < {'9' * 400}", "holds a number that is too large"),
        ("year ** 9 > 1", "use column names, values, comparisons"),
        ("year == None", "use column names, values, comparisons"),
        ("year ==", "is no expression"),
        (" or ".join(["artist < licence"] * 5), "compares texts too often: two columns count for 16"),
        (" or ".join(["year // 2 == 1"] * 22), "where= has 67 operations; at most 64"),
        (" or ".join(["year == 1"] * 70), "where= has 71 operations; at most 64"),
        ("(" * 900 + "year" + ")" * 900, "is no expression"),
        ("open or " * 300 + "open", "characters; at most 2000 are read"),
    ],
)
def test_what_cannot_be_meant_is_told_before_a_column_is_read(
    expression: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    monkeypatch.setattr(rs.Index, "_check", lambda *_: pytest.fail("a column was read"))
    with pytest.raises(ValueError, match=why):
        which(expression, index())


def test_only_the_columns_that_are_named_are_read(tmp_path: Path) -> None:
    store = rs.write_store(tmp_path / "s", {"c": np.ones((N, 1, 4))}, columns=COLUMNS)
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    for name in ("licence", "rating"):
        for chunk in (tmp_path / "i" / "column" / name).rglob("c/0"):
            chunk.unlink()
    opened = rs.open_index(tmp_path / "i")
    assert which("artist == 'artist 3' and year > 1995", opened) is not None
    with pytest.raises(rs.DamagedStoreError, match="is missing"):
        which("licence == 'cc0'", opened)


def test_texts_come_back_from_their_codes() -> None:
    column = index().column("artist")
    assert isinstance(column, Texts)
    assert column.codes.dtype == np.int32
    assert [column.value(sample) for sample in range(N)] == COLUMNS["artist"].tolist()
    for text in ("", "artist 1", "artist 10", "artist 2~", "zz", "\ud800"):
        before = sorted({*COLUMNS["artist"].tolist(), text}).index(text)
        assert column.find(text) == (before, text in COLUMNS["artist"])
    odd = np.array(["ö", "", "\U0001f600", "\uffff", "z", "ö", "a b"])
    assert Texts.of(odd).values.tolist() == sorted({*odd.tolist()})
    assert Texts.of(odd).some(slice(2, 5)).whole().tolist() == odd[2:5].tolist()
    np.testing.assert_array_equal(column.values, np.unique(COLUMNS["artist"]))
    np.testing.assert_array_equal(index().columns["artist"], COLUMNS["artist"])


@given(st.lists(st.lists(st.text(max_size=3), max_size=9), min_size=1, max_size=4))
def test_columns_one_after_the_other_are_the_column_of_all(several: list[list[str]]) -> None:
    found = joined([Texts.of(np.array(texts, object)) for texts in several])
    assert isinstance(found, Texts)
    whole = Texts.of(np.array([text for texts in several for text in texts], object))
    for part in ("text", "ends", "codes"):
        np.testing.assert_array_equal(getattr(found, part), getattr(whole, part))


def test_places_are_found_of_numbers_and_texts_in_any_order_and_of_nothing_else() -> None:
    for ids in (np.array([5, 2, 9]), np.array([2, 5, 9]), np.array(["b", "äa", "c"]), np.array(["a", "b", "c"])):
        places = Places(ids)
        assert places.find(ids[::-1]).tolist() == [2, 1, 0]
        assert places.find(np.array(["d" * 1000, "7", ids[0]])).tolist() == [-1, -1, 0 if ids.dtype.kind == "U" else -1]
        assert places.find([2**63, 3]).tolist() == [-1, -1]
        assert places.find([True]).tolist() == [-1]
    assert Places(np.empty(0, np.int64)).find([1]).tolist() == [-1]
