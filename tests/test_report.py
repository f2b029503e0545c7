"""The report page: what it holds, and that what the user wrote stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.report import Pictures, norm_curve, write_report
from retrac_scale.report.page import embed, page

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--<script>",
    "]]>\u2028\u2029&lt;&amp;",
    "'; DROP TABLE x; --",
    "\ud800",
]


def held(text: str) -> dict[str, Any]:
    """The JSON of a page."""
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.S)
    found: dict[str, Any] = json.loads(content)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    columns = {"artist": np.array(HOSTILE[:5] + [f"artist {i % 3}" for i in range(15)]), "year": np.arange(20) % 4}
    sketches = {name: rng.standard_normal((20, 2, 64)) for name in ("early", "late")}
    store = rs.write_store(folder / "s.zarr", sketches, columns=columns, timesteps=[4, 70])
    rs.write_store(
        folder / "q.zarr", {name: rng.standard_normal((2, 3, 64)) for name in sketches}, timesteps=[1, 50, 99]
    )
    for name, estimator in (("tracin", rs.TracIn()), ("retrac", rs.ReTrac())):
        rs.build_index(store, estimator, folder / f"{name}.zarr")
    np.save(folder / "images.npy", rng.integers(0, 255, (20, 8, 8), dtype=np.uint8))
    np.save(folder / "queries.npy", rng.random((2, 8, 8, 3)))
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    indexes = [str(folder / "tracin.zarr"), str(folder / "retrac.zarr")]
    files = ["--images", str(folder / "images.npy"), "--query-images", str(folder / "queries.npy")]
    out = ["--out", str(folder / "page.html")]
    assert main(["report", *indexes, "--queries", str(folder / "q.zarr"), *files, "-k", "3", *out]) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


def test_it_holds_the_answers_of_every_index_with_errors_and_columns(folder: Path, text: str) -> None:
    found, queries = held(text), rs.open_store(folder / "q.zarr")
    for name in ("TracIn", "ReTrac"):
        answer = rs.open_index(folder / f"{name.lower()}.zarr").query(queries, 3, side="both")
        assert answer.errors is not None
        assert answer.resolved is not None
        for place, query in enumerate(found["queries"]):
            results = query["lists"][name]["proponents"] + query["lists"][name]["opponents"]
            assert [int(result["id"]) for result in results] == answer.ids[place].tolist()
            np.testing.assert_allclose([result["score"] for result in results], answer.scores[place], rtol=1e-4)
            np.testing.assert_allclose([result["error"] for result in results], answer.errors[place], rtol=1e-4)
            assert [result["resolved"] for result in results] == answer.resolved[place].tolist()
    columns = rs.open_index(folder / "retrac.zarr").columns
    for sample, shown in found["samples"].items():
        assert shown["columns"] == {name: values[int(sample)].item() for name, values in columns.items()}


def test_it_holds_what_explains_each_result(folder: Path, text: str) -> None:
    index, queries = rs.open_index(folder / "tracin.zarr"), rs.open_store(folder / "q.zarr")
    for place, query in enumerate(held(text)["queries"]):
        for result in query["lists"]["TracIn"]["opponents"]:
            expected = index.explain(rs.take(queries, [place]), int(result["id"]))
            parts = result["explanation"]
            np.testing.assert_allclose(parts["contributions"], expected.contributions.sum(1), rtol=1e-4)
            assert parts["checkpoints"] == ["early", "late"]
            assert parts["query_timesteps"] == [1, 50, 99]
            assert parts["timesteps"] == [[4, 70], [4, 70]]


def test_group_totals_are_those_of_all_samples(folder: Path, text: str) -> None:
    index, queries = rs.open_index(folder / "retrac.zarr"), rs.open_store(folder / "q.zarr")
    scores = index.scores(queries).compute()
    for place, query in enumerate(held(text)["queries"]):
        totals = {item["id"]: item["score"] for item in query["groups"]["year"]["ReTrac"]["proponents"]}
        years = index.columns["year"]
        assert totals == {str(year): pytest.approx(scores[place, years == year].sum(), rel=1e-4) for year in range(4)}


def test_pictures_stand_in_it_once_and_nothing_comes_from_elsewhere(text: str) -> None:
    pictures = [sample["picture"] for sample in held(text)["samples"].values()]
    assert all(text.count(json.dumps(picture)) == 1 for picture in set(pictures))
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}  # a name, never fetched


def test_hostile_column_values_stay_data(folder: Path, text: str) -> None:
    assert text.count("</script>") == 2  # the page's JSON and its own script
    assert "<img" not in text
    artists = {sample["columns"]["artist"] for sample in held(text)["samples"].values()}
    assert artists <= set(HOSTILE) | {f"artist {i}" for i in range(3)}


@given(st.recursive(st.text() | st.sampled_from(HOSTILE), lambda inner: st.dictionaries(st.text(), inner)))
def test_any_string_survives_the_page_and_closes_nothing(value: Any) -> None:
    embedded = embed(value)
    assert not set(embedded) & set("<>&\u2028\u2029")
    assert json.loads(embedded) == value
    assert held(page("t", {"value": value}))["value"] == value


def test_a_title_is_text() -> None:
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in page("</title><script>", {})


def test_only_the_pages_own_script_may_run(text: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]


def test_floats_that_json_lacks_and_large_integers_are_told_apart(tmp_path: Path) -> None:
    ids = np.array([2**60, 2**60 + 1, 3])
    columns = {"price": np.array([-np.inf, np.inf, 1.5]), "number": ids}
    rng = np.random.default_rng(0)
    store = rs.write_store(None, {"c": rng.standard_normal((3, 1, 8))}, ids=ids, columns=columns)
    queries = rs.write_store(None, {"c": rng.standard_normal((1, 1, 8))})
    index = rs.build_index(store, rs.TracIn(), tmp_path / "i")
    pictures = Pictures(rng.random((3, 4, 4)), ids, rng.random((1, 200, 300, 3)))
    answers = {"TracIn": index.query(queries, 3)}
    out = write_report(tmp_path / "p.html", answers, pictures, indexes={"TracIn": index}, queries=queries)
    found = held(out.read_text())
    shown = {sample: value["columns"] for sample, value in found["samples"].items()}
    assert shown[str(2**60)] == {"number": str(2**60), "price": None}
    assert shown["3"] == {"number": 3, "price": 1.5}
    assert found["queries"][0]["picture"].startswith("data:image/jpeg")


def test_the_norm_curve_is_that_of_the_store(folder: Path, text: str) -> None:
    centres, mean, deviation = norm_curve(rs.open_store(folder / "s.zarr"))
    curve = held(text)["curve"]
    for name, values in (("timestep", centres), ("mean", mean), ("deviation", deviation)):
        np.testing.assert_allclose(curve[name], values, rtol=1e-4)


def test_deleted_samples_count_no_longer_in_the_norm_curve() -> None:
    norms = {"c": np.array([[1.0], [1.0], [100.0]], np.float32)}
    store = rs.write_store(None, {"c": np.ones((3, 1, 4))}, norms=norms, timesteps=[7])
    store.delete([2])
    assert norm_curve(store)[1].tolist() == [1]


def test_visits_that_were_not_made_are_in_no_norm_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = {"c": np.array([[0, 2], [2, 2]], np.float32)}
    sketches = {"c": np.ones((2, 2, 4)) * (norms["c"] > 0)[..., None]}
    store = rs.write_store(tmp_path / "s", sketches, norms=norms, timesteps={"c": np.array([[-1, 0], [0, 99]])})
    centres, mean, _ = norm_curve(store)
    assert centres.min() > 0
    assert mean.tolist() == [2, 2]
    assert main(["info", str(tmp_path / "s"), "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)["measurements"][0]["norms"]
    assert [(part["from"], part["mean_norm"]) for part in curve] == [(0, 2), (80, 2)]
    none = rs.write_store(None, {"c": np.zeros((2, 1, 4))}, norms={"c": np.zeros((2, 1))}, timesteps=[-1])
    assert [len(values) for values in norm_curve(none)] == [0, 0, 0]


def test_a_page_of_several_indexes_or_answers_is_of_the_same_samples_and_queries(folder: Path, tmp_path: Path) -> None:
    queries, images = rs.open_store(folder / "q.zarr"), np.load(folder / "images.npy")
    sketches = {name: np.random.default_rng(1).standard_normal((5, 1, 64)) for name in ("early", "late")}
    tracin = rs.open_index(folder / "tracin.zarr")
    other = rs.build_index(rs.write_store(None, sketches), rs.ReTrac(), None)
    pictures = Pictures(images, np.arange(20), images[:2])
    indexes = {"TracIn": tracin, "ReTrac": other}
    answers = {name: index.query(queries, 3) for name, index in indexes.items()}
    with pytest.raises(ValueError, match="ReTrac holds other samples than TracIn"):
        write_report(tmp_path / "p.html", answers, pictures, indexes=indexes, queries=queries)
    turned = tracin.query(rs.take(queries, [1, 0]), 3)
    with pytest.raises(ValueError, match="turned is about other queries than TracIn, or has"):
        write_report(tmp_path / "p.html", {"TracIn": answers["TracIn"], "turned": turned}, pictures)
    with pytest.raises(ValueError, match="queries= is about other queries than turned"):
        write_report(tmp_path / "p.html", {"turned": turned}, pictures, indexes={"turned": tracin}, queries=queries)
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_pictures_are_bytes_or_shares(dtype: Any) -> None:
    grey = np.full((1, 2, 2), 51, np.uint8)
    given = (grey / 255).astype(dtype) if dtype is np.float32 else grey.astype(dtype)
    assert (Pictures(given, np.arange(1), []).image(0) == 51).all()


def test_an_explanations_picture_takes_names_as_they_are(tmp_path: Path) -> None:
    store = rs.write_store(None, {"$a_{$": np.ones((1, 1, 4))}, ids=[r"$\nonsense$"])
    explanation = rs.build_index(store, rs.TracIn(), None).explain(store, store.ids[0])
    explanation.figure().savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size


def test_topk_writes_its_own_report_and_names_a_missing_picture(folder: Path) -> None:
    answer = rs.open_index(folder / "retrac.zarr").query(rs.open_store(folder / "q.zarr"), 3)
    images, queries = np.load(folder / "images.npy"), np.load(folder / "queries.npy")
    own = answer.report(folder / "own.html", images, queries, ids=range(20))
    assert [query["id"] for query in held(own.read_text())["queries"]] == ["0", "1"]
    with pytest.raises(ValueError, match="no picture of sample"):
        answer.report(folder / "own.html", images[:1], queries, ids=[99])


def test_ids_that_are_no_files_need_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "retrac.zarr"), "--queries", str(folder / "q.zarr")]) == 1
    assert "give the pictures in a .npy file" in capsys.readouterr().err
