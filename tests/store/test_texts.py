"""Columns of texts: they come back as they were given, and one long text among many costs its own length alone."""

from __future__ import annotations

import json
import operator
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Subset

import retrac_scale as rs
from retrac_scale.columns import check_columns, check_ids, is_text
from retrac_scale.query.where import which
from retrac_scale.report.content import Rows
from retrac_scale.serve.library import Library
from retrac_scale.task.items import brought

ODD = ["a", "a\0", "", "\0", "a\0b", "a\0\0", "\U0001f600", "\U0001f600\0", "\uffff", "öa", "a b"]
ODD += ["x" * 3000, "a" * 3000]
STRING = np.dtypes.StringDType()
IDS = ["a", "a b", "aa", "b", "\U0001f600", "\uffff", "x", "x" * 9, "öa", "zz", "a\0b", "\0b", "aaaaaaaaaa"]
N, LONG = 3000, 20_000
ENOUGH = N * LONG * 4 // 10
"""Bytes: a tenth of what N texts would take if each had room for the longest."""


def rows(n: int, seed: int = 0) -> dict[str, Any]:
    return {"c": np.random.default_rng(seed).standard_normal((n, 1, 4))}


def captions(n: int = N, longest: int = LONG) -> list[str]:
    return [f"caption {i}" for i in range(n - 1)] + ["l" * longest]


@contextmanager
def few_bytes() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < ENOUGH
    finally:
        tracemalloc.stop()


@cache
def odd_index(column: str = "caption") -> rs.Index:
    store = rs.write_store(None, rows(len(ODD)), ids=IDS, columns={column: ODD})
    return rs.build_index(store, rs.TracIn(), None)


def test_texts_come_back_as_they_were_given(tmp_path: Path) -> None:
    given: tuple[Any, ...] = (ODD, tuple(ODD), np.array(ODD, object), np.array(ODD, STRING))
    for number, values in enumerate(given):
        place = tmp_path / str(number)
        rs.write_store(place, rows(len(ODD)), columns={"caption": values})
        store = rs.open_store(place)
        assert is_text(store.columns["caption"])
        assert store.columns["caption"].tolist() == ODD
        assert rs.take(store, [5, 1]).columns["caption"].tolist() == [ODD[5], ODD[1]]
        index = rs.build_index(store, rs.TracIn(), None)
        assert index.columns["caption"].tolist() == ODD
        assert json.loads(json.dumps([Rows(index)[i]["caption"] for i in range(len(ODD))])) == ODD
    with rs.StoreWriter(tmp_path / "0") as writer:
        writer.append([100], rows(1), columns={"caption": ["x" * 5000 + "\0"]})
    assert rs.open_store(tmp_path / "0").columns["caption"].tolist() == [*ODD, "x" * 5000 + "\0"]


def test_a_store_has_the_same_bytes_however_texts_are_given(tmp_path: Path) -> None:
    texts = ["b", "añ", "\U0001f600", ""]
    kinds: tuple[Any, ...] = (np.array(texts), texts, np.array(texts, object), np.array(texts, STRING))
    stores = [rs.write_store(None, rows(4), ids=texts, columns={"caption": values}) for values in kinds]
    assert len({store.meta["digest"] for store in stores}) == 1


@pytest.mark.parametrize("values", [["a", 1, 2.5, True], [np.str_("a"), np.int64(1)], ["a", 1e22, 1e-7, 2**70]])
def test_numbers_among_texts_are_texts_as_numpy_makes_them(values: list[Any]) -> None:
    expected = np.asarray(values) if 2**70 not in values else np.array(["a", "1e+22", "1e-07", str(2**70)])
    assert check_columns({"x": values}, len(values))["x"].tolist() == expected.tolist()


def test_a_missing_text_is_refused_in_any_array() -> None:
    missing = np.array(["a", None], np.dtypes.StringDType(na_object=None))
    several: list[Any] = [missing, missing.astype(object), ["a", None]]
    for values in several:
        with pytest.raises(ValueError, match="column 'x' has dtype object"):
            check_columns({"x": values}, 2)
    several = [["a", "b\ud800"], np.array(["a", "b\ud800"])]
    for values in several:
        with pytest.raises(ValueError, match=r"column 'x': value 'b\\ud800' has no UTF-8"):
            check_columns({"x": values}, 2)


def test_a_column_of_texts_serves_as_ids() -> None:
    names = np.array(["b", "a", "c"], object)
    for kind in (object, STRING):
        assert check_ids(names.astype(kind), 3).tolist() == names.tolist()
    store = rs.write_store(None, rows(3), ids=names, columns={"of": names[::-1]})
    assert store.places.find(store.columns["of"]).tolist() == [2, 1, 0]
    assert rs.take(store, store.columns["of"]).ids.tolist() == ["c", "a", "b"]
    assert store.delete(store.columns["of"][:1]) == 1
    assert which(names[:1], rs.build_index(store, rs.TracIn(), None)).tolist() == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize("op", ["<", "<=", "==", "!=", ">", ">="])
@pytest.mark.parametrize("zeros", [True, False])
def test_ids_compare_with_texts_as_python_compares_them(op: str, zeros: bool) -> None:
    compared: Callable[[str, str], bool] = {
        "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, ">=": operator.ge
    }[op]  # fmt: skip
    texts = ODD if zeros else [text for text in ODD if "\0" not in text]
    ids = IDS[: len(texts)]
    store = rs.write_store(None, rows(len(texts)), ids=ids, columns={"caption": texts})
    index = rs.build_index(store, rs.TracIn(), None)
    for turned in (False, True):
        expected = [compared(b, a) if turned else compared(a, b) for a, b in zip(ids, texts, strict=True)]
        found = which(f"caption {op} id" if turned else f"id {op} caption", index)
        assert found is not None
        assert found.tolist() == expected


def test_groups_are_named_as_their_texts_are() -> None:
    queries = rs.write_store(None, rows(2, 1))
    for group_by in ("caption", ODD, np.array(ODD, STRING)):
        answer = odd_index().query(queries, len(ODD), group_by=group_by)
        assert sorted(answer.ids[0].tolist()) == sorted(ODD)
        frame = answer.to_frame()
        assert frame["id"].dtype == frame["side"].dtype  # as pandas has texts
        assert frame["id"].tolist() == answer.ids[answer.listed].tolist()
        assert json.loads(answer.to_json())["results"][0]["ids"] == answer.ids[0][answer.listed[0]].tolist()
        assert answer.to_arrow().column("id").to_pylist() == frame["id"].tolist()


def test_one_long_text_costs_its_own_length_from_the_data_set_to_the_answer(tmp_path: Path) -> None:
    texts, names, queries = captions(), [f"{i}.png" for i in range(N)], rs.write_store(None, rows(1, 1))
    folder, kept = tmp_path / "store", {"caption": texts}
    with few_bytes():
        pictures: Any = rs.datasets.Arrays(np.zeros((N, 1, 1), np.uint8), ids=names, columns=kept)
        assert len(brought(Subset(pictures, range(1, N)), "columns")["caption"][-1]) == LONG
        rs.write_store(folder, rows(N), ids=names, columns=kept)
    with few_bytes():
        store = rs.open_store(folder)
        assert store.columns["caption"].tolist() == texts
        rs.take(store, names[-99:])
    with few_bytes():
        index = rs.build_index(store, rs.TracIn(), tmp_path / "index")
        assert index.columns["caption"].tolist() == texts
    for asked in ({"where": "id < caption"}, {"where": "caption > 'k'"}, {"group_by": "caption"}, {"group_by": texts}):
        with few_bytes():
            index.query(queries, 3, **asked)
    with few_bytes():
        with rs.StoreWriter(folder) as writer:
            writer.append(["more"], rows(1), columns={"caption": ["m" * 2 * LONG]})
        rs.build_index(rs.open_store(folder), rs.TracIn(), tmp_path / "index")
        assert rs.open_index(tmp_path / "index").columns["caption"].tolist() == [*texts, "m" * 2 * LONG]


def test_a_service_tells_texts_as_they_were_given(tmp_path: Path) -> None:
    from retrac_scale.report.pictures import Pictures

    index, dots = odd_index(), np.zeros((len(ODD), 2, 2), np.uint8)
    library = Library({"TracIn": index}, Pictures(dots, index.ids, dots[:1]), queries=rs.write_store(None, rows(1, 1)))
    assert json.loads(json.dumps(library.about()))["columns"]["caption"] == sorted(ODD)
    assert library.sample("x")["columns"]["caption"] == ODD[IDS.index("x")]
