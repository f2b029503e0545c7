"""A set of queries as one question, against means formed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import retrac_scale as rs
from retrac_scale.query import together

QUERIES, SAMPLES = 23, 50


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[rs.Index, rs.SketchStore, Any, Any]:
    """An index, queries of which five are read at a time, their scores, and the samples' artists."""
    monkeypatch.setattr(together, "AT_ONCE", 5)
    rng = np.random.default_rng(0)
    rows, own = rng.standard_normal((SAMPLES, 1, 16)), rng.standard_normal((QUERIES, 1, 16))
    artists = rng.integers(0, 4, SAMPLES)
    columns = {"artist": np.array(["Anna", "Bela", "Cleo", "Dora"])[artists]}
    index = rs.build_index(rs.write_store(None, {"c": rows}, columns=columns, dtype="float32"), rs.TracIn(), None)
    queries = rs.write_store(None, {"c": own}, dtype="float32")
    return index, queries, np.asarray(index.scores(queries)), artists


def test_shares_are_means_over_queries_and_errors_those_of_means(asked: Any) -> None:
    index, queries, scores, artists = asked
    answer = index.query(queries, 4, group_by="artist", together=True)
    assert answer.query_ids.tolist() == ["23 queries"]
    sums = np.stack([scores[:, artists == artist].sum(1) for artist in range(4)], 1)
    raised = np.stack([np.maximum(scores[:, artists == artist], 0).sum(1) for artist in range(4)], 1)
    shares = raised / raised.sum(1, keepdims=True)
    order = np.argsort(-sums.mean(0))
    assert answer.ids[0].tolist() == [["Anna", "Bela", "Cleo", "Dora"][artist] for artist in order]
    for found, values in ((answer.scores, sums.mean(0)), (answer.shares, shares.mean(0))):
        np.testing.assert_allclose(found[0], values[order], rtol=1e-5)
    for found, values in ((answer.errors, sums), (answer.share_errors, shares)):
        np.testing.assert_allclose(found[0], (values.std(0, ddof=1) / np.sqrt(QUERIES))[order], rtol=1e-4)
    assert answer.shares.sum() == pytest.approx(1)


def test_both_sides_where_and_themselves_left_out(asked: Any) -> None:
    index, _, _, artists = asked
    store = index.check_store()
    scores = np.asarray(index.scores(store))
    np.fill_diagonal(scores, 0)
    options: dict[str, Any] = {"group_by": "artist", "side": "both", "exclude_self": True, "together": True}
    answer = index.query(store, 2, where="artist != 'Dora'", **options)
    means = np.stack([scores[:, artists == artist].sum(1) for artist in range(3)], 1).mean(0)
    np.testing.assert_allclose(answer.scores[0], [*np.sort(means)[::-1][:2], *np.sort(means)[:2]], rtol=1e-5)
    assert "Dora" not in answer.ids


def test_samples_are_ordered_by_their_mean_score(asked: Any) -> None:
    index, queries, scores, _ = asked
    answer = index.query(queries, 7, together=True)
    expected = scores.mean(0)
    assert answer.ids[0].tolist() == np.argsort(-expected)[:7].tolist()
    np.testing.assert_allclose(answer.scores[0], np.sort(expected)[::-1][:7], rtol=1e-5)


def test_what_has_no_mean_is_refused(asked: Any) -> None:
    index, queries, _, _ = asked
    with pytest.raises(ValueError, match="which exclude_self= cannot be had of; use group_by="):
        index.query(queries, exclude_self=True, together=True)
    with pytest.raises(ValueError, match="rerank takes queries one by one"):
        index.query(queries, rerank=10, train=rs.Samples([], None, {}), together=True)  # type: ignore[arg-type]
