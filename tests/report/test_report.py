"""The report page: what it holds, and that what the user wrote stays text."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.report import Pictures, attribution_figure, norm_curve, write_report
from retrac_scale.report.page import embed, page
from retrac_scale.report.pictures import data_uri
from retrac_scale.report.trust import repeatability_for_page

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
    rs.write_store(
        folder / "matched.zarr", {name: rng.standard_normal((2, 2, 64)) for name in sketches}, timesteps=[4, 70]
    )
    for name, estimator in (("tracin", rs.TracIn()), ("retrac", rs.ReTrac()), ("retracridge", rs.ReTracRidge())):
        rs.build_index(store, estimator, folder / f"{name}.zarr")
    np.save(folder / "images.npy", rng.integers(0, 255, (20, 8, 8), dtype=np.uint8))
    np.save(folder / "queries.npy", rng.random((2, 8, 8, 3)))
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    indexes = [str(folder / f"{name}.zarr") for name in ("tracin", "retrac", "retracridge")]
    queries = [f"--queries={folder / name}" for name in ("q.zarr", "q.zarr", "matched.zarr")]
    files = ["--images", str(folder / "images.npy"), "--query-images", str(folder / "queries.npy")]
    out = ["--out", str(folder / "page.html")]
    assert main(["report", *indexes, *queries, *files, "-k", "3", *out]) == 0
    return (folder / "page.html").read_text(encoding="utf-8")


def test_it_holds_the_answers_of_every_index_with_errors_and_columns(folder: Path, text: str) -> None:
    found = held(text)
    for name, asked in (("TracIn", "q"), ("ReTrac", "q"), ("ReTracRidge", "matched")):
        queries = rs.open_store(folder / f"{asked}.zarr")
        answer = rs.open_index(folder / f"{name.lower()}.zarr").query(queries, 3, side="both")
        for place, query in enumerate(found["queries"]):
            results = query["lists"][name]["proponents"] + query["lists"][name]["opponents"]
            assert [int(result["id"]) for result in results] == answer.ids[place].tolist()
            np.testing.assert_allclose([result["score"] for result in results], answer.scores[place], rtol=1e-4)
            if answer.errors is None or answer.resolved is None:  # means of timesteps do not tell
                assert name != "ReTracRidge"
                assert not any("error" in result or "resolved" in result for result in results)
                continue
            np.testing.assert_allclose([result["error"] for result in results], answer.errors[place], rtol=1e-4)
            assert [result["resolved"] for result in results] == answer.resolved[place].tolist()
    columns = rs.open_index(folder / "retrac.zarr").columns
    for sample, shown in found["samples"].items():
        assert shown["columns"] == {name: values.tolist()[int(sample)] for name, values in columns.items()}


def parts_by_hand(store: rs.SketchStore, queries: rs.SketchStore) -> Any:
    """Scores of `ReTracRidge` by the measurements alone, float64 `[t, q, n]`."""
    totals = np.zeros((2, 2, 20))
    for name in ("early", "late"):
        train, asked = (side.sketches(name).astype(np.float64) for side in (store, queries))
        train, asked = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (train, asked))
        for t in range(2):
            gram = train[:, t].T @ train[:, t]
            penalty = 0.5 * np.trace(gram) / 20 * np.eye(64)
            totals[t] += asked[:, t] @ np.linalg.inv(gram + penalty) @ train[:, t].T
    return totals


def test_it_tells_how_far_each_list_would_come_again(folder: Path, text: str) -> None:
    found, queries = held(text), rs.open_store(folder / "matched.zarr")
    store = rs.open_store(folder / "s.zarr")
    halves = [[set(np.argsort(-scores)[:3].tolist()) for scores in part] for part in parts_by_hand(store, queries)]
    shared = [len(one & other) for one, other in zip(*halves, strict=True)]
    assert [query["shared"]["ReTracRidge"] for query in found["queries"]] == [{"k": 3, "shared": x} for x in shared]
    told = found["repeatability"]
    assert list(told) == ["TracIn", "ReTrac", "ReTracRidge"]
    assert told["ReTracRidge"]["halves"][0] == pytest.approx(np.mean(shared) / 3, abs=1e-4)
    asked = rs.open_store(folder / "q.zarr")
    for name, expected in (
        ("ReTracRidge", rs.repeatability(store, queries, rs.ReTracRidge(), 3)),
        ("TracIn", rs.repeatability(store, asked, rs.TracIn(), 3)),
    ):
        share = expected.overlap
        numbers = f"{3 * share.value:.1f} of the 3 names would come again ({3 * share.low:.1f} to {3 * share.high:.1f})"
        assert told[name]["sentence"].startswith(f"measured again, {numbers}")
        assert told[name]["sentence"].endswith("; chance alone, among 20 samples, would bring 0.4.")
        assert ("the others are luck" in told[name]["sentence"]) == (share.value < 0.5)
        assert told[name]["correlation"][0] == pytest.approx(expected.rank_correlation.value, abs=1e-4)


def small(t: int) -> tuple[rs.SketchStore, rs.SketchStore, Pictures]:
    """A store, queries of it, and pictures."""
    rng = np.random.default_rng(3)
    store = rs.write_store(None, {"c": rng.standard_normal((30, t, 16))}, timesteps=list(range(t)))
    queries = rs.write_store(None, {"c": rng.standard_normal((4, t, 16))}, timesteps=list(range(t)))
    return store, queries, Pictures(rng.random((30, 4, 4)), store.ids, rng.random((4, 4, 4)))


def test_where_it_cannot_be_told_it_says_why(tmp_path: Path) -> None:
    store, queries, pictures = small(1)
    indexes = {"ReTracRidge": rs.build_index(store, rs.ReTracRidge()), "TracIn": rs.build_index(store, rs.TracIn())}
    answers = {name: index.query(queries, 3) for name, index in indexes.items()}
    out = write_report(tmp_path / "p.html", answers, pictures, indexes=indexes, queries=queries)
    for one in held(out.read_text())["repeatability"].values():
        assert list(one) == ["sentence"]
        assert one["sentence"].startswith("every sample was measured once, which cannot tell")
    assert all("shared" not in query for query in held(out.read_text())["queries"])
    large = repeatability_for_page(indexes["TracIn"], queries, 3, small=100)
    assert large == "not measured, because that would take an index for each part of a large store."


def test_what_was_measured_elsewhere_is_shown_when_it_is_about_this_page(tmp_path: Path) -> None:
    store, queries, pictures = small(4)
    index = rs.build_index(store, rs.ReTracRidge())
    answers = {"ridge": index.query(queries, 3)}
    own = rs.repeatability(index, queries, k=5)
    write_report(tmp_path / "p.html", answers, pictures, repeatability={"ridge": own})
    found = held((tmp_path / "p.html").read_text())
    assert found["repeatability"]["ridge"]["k"] == 5
    assert [query["shared"]["ridge"]["shared"] for query in found["queries"]] == (5 * own.by_query).round(2).tolist()
    write_report(tmp_path / "p.html", answers, pictures, repeatability={"ridge": "ask again tomorrow."})
    assert held((tmp_path / "p.html").read_text())["repeatability"] == {"ridge": {"sentence": "ask again tomorrow."}}
    with pytest.raises(ValueError, match="of ridge was measured with 30 queries, but the page has 4"):
        write_report(tmp_path / "p.html", answers, pictures, repeatability={"ridge": rs.repeatability(index)})
    with pytest.raises(ValueError, match="repeatability= is about 'TracIn', but the answers are of ridge"):
        write_report(tmp_path / "p.html", answers, pictures, repeatability={"TracIn": "?"})


def test_many_queries_are_compared_some_at_a_time(tmp_path: Path) -> None:
    store, _, _ = small(4)
    index = rs.build_index(store, rs.ReTracRidge())
    queries = rs.write_store(None, {"c": np.random.default_rng(1).standard_normal((70, 4, 16))}, timesteps=range(4))
    found, expected = repeatability_for_page(index, queries, 3), rs.repeatability(index, queries, k=3)
    assert isinstance(found, rs.Repeatability)
    assert found.by_query.tolist() == expected.by_query.tolist()
    assert (found.overlap, found.rank_correlation) == (expected.overlap, expected.rank_correlation)


@pytest.mark.parametrize(("count", "rows"), [(1, 8), (2, 8), (3, 16), (5, 16)])
def test_estimators_stand_side_by_side_in_the_readmes_picture_with_their_captions(count: int, rows: int) -> None:
    store, queries, pictures = small(2)
    queries = rs.take(store, range(16))
    pictures = Pictures(pictures.images, store.ids, np.asarray(pictures.images)[:16])
    answer = rs.build_index(store, rs.TracIn()).query(queries, 10)
    answers = {f"Estimator{number}": answer for number in range(count)}
    captions = dict.fromkeys(answers, "measured again, 8.3 of the 10 names would come again; unique fraction 0.883")
    figure = attribution_figure(answers, pictures, norm_curve(store), captions, rows=rows)
    assert figure.get_figwidth() < 10  # at a README's width, letters of 9 points stay legible
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.texts if text.get_text()}
    assert "query" in boxes
    assert {name for name in boxes if name.startswith("Estimator")} == set(answers)
    assert sum(text.get_text().replace("\n", " ") in captions.values() for text in figure.texts) == count
    every = [text.get_window_extent() for text in figure.texts if text.get_text()]
    for place, box in enumerate(every):
        assert box.x1 <= figure.bbox.x1 + 1
        assert not any(box.overlaps(other) for other in every[place + 1 :])


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
        sides = query["groups"]["year"]["ReTrac"]
        assert all(item["score"] > 0 for item in sides["proponents"])
        assert all(item["score"] < 0 for item in sides["opponents"])
        totals = {item["id"]: item["score"] for side in sides.values() for item in side}
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
    with pytest.raises(ValueError, match="queries= of turned is about other queries than turned"):
        write_report(tmp_path / "p.html", {"turned": turned}, pictures, indexes={"turned": tracin}, queries=queries)
    with pytest.raises(ValueError, match="queries= has stores for TracIn, but the indexes are turned; give one store"):
        write_report(
            tmp_path / "p.html",
            {"turned": turned},
            pictures,
            indexes={"turned": tracin},
            queries={"TracIn": queries},
        )
    store = rs.take(queries, [1, 0])
    with pytest.raises(ValueError, match="indexes= has TracIn, but the answers are of turned"):
        write_report(tmp_path / "p.html", {"turned": turned}, pictures, indexes={"TracIn": tracin}, queries=store)
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_pictures_are_bytes_or_shares(dtype: Any) -> None:
    grey = np.full((1, 2, 2), 51, np.uint8)
    given = (grey / 255).astype(dtype) if dtype is np.float32 else grey.astype(dtype)
    assert (Pictures(given, np.arange(1), []).image(0) == 51).all()


@pytest.mark.parametrize(("factor", "offset"), [(2, -1), (255, 0)])
def test_pictures_in_another_range_are_refused(factor: float, offset: float, tmp_path: Path) -> None:
    store = rs.write_store(None, {"a": np.eye(3, dtype=np.float32)[:, None]})
    answer = rs.build_index(store, rs.TracIn()).query(store, 2)
    shares = np.linspace(-0.01, 1.01, 12, dtype=np.float32).reshape(3, 2, 2)
    answer.report(tmp_path / "page.html", shares, shares, ids=store.ids)
    with pytest.raises(ValueError, match=r"a picture has floats from .* where 0 \.\. 1 are shown: give \(images \+ 1"):
        answer.report(tmp_path / "other.html", factor * shares + offset, shares, ids=store.ids)
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize(("size", "shown"), [(8, 64), (12, 60), (16, 16)])
def test_pictures_of_a_few_pixels_are_shown_smoothly(size: int, shown: int) -> None:
    steps = np.linspace(0, 255, size).astype(np.uint8)
    uri = data_uri(np.broadcast_to(steps, (size, size)))
    content = base64.b64decode(uri.partition(",")[2])
    (row, *_) = np.asarray(Image.open(io.BytesIO(content)), dtype=int)
    assert len(row) == shown
    assert np.diff(row).max() * (shown // size) <= np.diff(steps.astype(int)).max() + shown // size


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


def test_one_store_of_queries_is_given_for_all_indexes_or_one_for_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indexes = [str(folder / f"{name}.zarr") for name in ("tracin", "retrac", "retracridge")]
    assert main(["report", *indexes, *[f"--queries={folder / 'q.zarr'}"] * 2]) == 1
    assert "got 2 --queries for 3 indexes; give one for all, or one for each" in capsys.readouterr().err


def test_ids_that_are_no_files_need_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "retrac.zarr"), "--queries", str(folder / "q.zarr")]) == 1
    assert "give the pictures in a .npy file" in capsys.readouterr().err
