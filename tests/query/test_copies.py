"""Copies folded, against families that are put together by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import retrac_scale as rs
from retrac_scale.query.copies import likeness
from tests.conftest import random_images, tiny_unet
from tests.sketching.test_sketching import SCHEDULER

COPIES = {3: 2, 7: 5, 20: 1, 33: 30}
"""Of these samples so many copies are planted behind the first 40."""


def planted(
    noise: float = 0.0, where: Path | None = None, out: Path | None = None
) -> tuple[rs.Index, rs.SketchStore, Any, Any]:
    """An index of 40 samples and copies of some, queries near samples, scores and of which sample each is one."""
    rng = np.random.default_rng(0)
    family = np.concatenate([np.arange(40), *(np.full(count, sample) for sample, count in COPIES.items())])
    rows = rng.standard_normal((40, 1, 64))[family]
    rows += noise * rng.standard_normal(rows.shape)
    order = rng.permutation(len(rows))
    rows, family = rows[order], family[order]
    ids = np.array([f"images/{place:03}.png" for place in rng.permutation(len(rows))])
    asked = rng.standard_normal((3, 1, 64)) * 0.3
    asked += np.stack([rows[family == sample][0] for sample in (7, 33, 12)])
    columns = {"artist": np.array(["Anna", "Bela", "Cleo"])[family % 3]}
    store = rs.write_store(where, {"c": rows}, ids=ids, columns=columns, dtype="float32")
    queries = rs.write_store(None, {"c": asked}, dtype="float32")
    scores = asked[:, 0] @ rows[:, 0].T
    return rs.build_index(store, rs.TracIn(), out, dtype="float32"), queries, scores, family


def by_hand(scores: Any, family: Any, ids: Any, k: int) -> tuple[list[Any], list[list[Any]]]:
    """The best of each family in the order of scores, and the others of it."""
    found: dict[int, list[Any]] = {}
    for place in np.lexsort((ids, -scores)):
        found.setdefault(int(family[place]), []).append(ids[place])
    best = list(found.values())[:k]
    return [members[0] for members in best], [members[1:] for members in best]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_list_has_the_best_of_each_family_with_its_copies(noise: float) -> None:
    index, queries, scores, family = planted(noise)
    places = np.argsort(index.ids)
    store_ids = index.ids
    answer = index.query(queries, 10, duplicates="fold")
    assert answer.copies is not None
    for query in range(3):
        best, others = by_hand(scores[query], family, store_ids, 10)
        assert answer.ids[query].tolist() == best
        for given, expected in zip(answer.copies[query], others, strict=True):
            assert sorted(given) == sorted(expected)
            own = [scores[query][places[np.searchsorted(store_ids[places], name)]] for name in given]
            assert (np.diff(own) <= 1e-12 * np.abs(scores).max()).all()  # the same row twice may differ by a rounding
    assert [len(answer.copies[query, 0]) for query in range(3)] == [5, 30, 0]
    kept = index.query(queries, 10)
    assert kept.copies is None
    assert (np.sort(kept.ids[0])[:6] != np.sort(answer.ids[0])[:6]).any()


def test_how_alike_samples_are_is_told_by_their_scores_for_each_other() -> None:
    rng = np.random.default_rng(1)
    store = rs.write_store(None, {"c": rng.standard_normal((30, 2, 16))}, weights={"c": 0.5}, dtype="float32")
    for estimator in (rs.TracIn(), rs.ReTracRidge(), rs.RelatIF()):
        index = rs.build_index(store, estimator, None, dtype="float32")
        scores = np.asarray(index.scores(store)).T
        own = np.sqrt(np.diag(scores))
        expected = np.sqrt(np.maximum(scores * scores.T, 0)) * np.sign(scores) / own / own[:, None]
        some = np.array([7, 3, 21])
        np.testing.assert_allclose(likeness(index, index.ids[some]), expected[np.ix_(some, some)], atol=1e-5)


@pytest.mark.parametrize("scale", [1e-22, 1e-15, 1e15])
def test_how_alike_samples_are_does_not_hang_on_how_large_gradients_are(scale: float) -> None:
    rows = np.random.default_rng(1).standard_normal((30, 1, 16))
    rows[3] = 0
    stores = [rs.write_store(None, {"c": size * rows}, dtype="float32") for size in (1, scale)]
    plain, scaled = (likeness(rs.build_index(store, rs.TracIn(), None), np.arange(30)) for store in stores)
    np.testing.assert_allclose(scaled, plain, atol=1e-3)
    assert not scaled[3].any()


def test_both_sides_are_folded_and_a_list_does_not_depend_on_its_company() -> None:
    index, queries, scores, family = planted()
    both = index.query(queries, 5, side="both", duplicates="fold")
    for query in range(3):
        ends = [by_hand(sign * scores[query], family, index.ids, 5) for sign in (1, -1)]
        assert both.ids[query].tolist() == ends[0][0] + ends[1][0]
        alone = index.query(rs.take(queries, [query]), 5, side="both", duplicates="fold")
        assert alone.copies is not None
        assert both.copies is not None
        assert alone.copies[0].tolist() == both.copies[query].tolist()


def test_a_number_says_what_a_copy_is() -> None:
    index, queries, _, family = planted(0.3)
    rows = np.concatenate([index.chunk(number).rows[0] for number in range(len(index.chunks))])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    own = np.flatnonzero(family == 33)
    least = (unit[own] @ unit[own].T).min()
    assert least < 0.95
    strict, loose = (index.query(queries, 1, duplicates=one).copies for one in ("fold", float(least) - 0.01))
    assert len(strict[1, 0]) < 30  # type: ignore[index]
    assert len(loose[1, 0]) == 30  # type: ignore[index]


def test_a_family_counts_once_in_its_group() -> None:
    index, queries, scores, family = planted()
    names = np.array(["Anna", "Bela", "Cleo"])
    first = np.unique(family, return_index=True)[1]
    answer = index.query(queries, 3, group_by="artist", duplicates="fold")
    for query in range(3):
        sums = [scores[query, first][family[first] % 3 == artist].sum() for artist in range(3)]
        order = np.argsort(-np.array(sums))
        assert answer.ids[query].tolist() == names[order].tolist()
        np.testing.assert_allclose(answer.scores[query], np.array(sums)[order], rtol=1e-5)
    np.testing.assert_allclose(answer.shares.sum(1), 1)  # type: ignore[union-attr]


def test_groups_of_a_sample_that_is_left_out_alone_are_told_as_without_folding() -> None:
    index, _, _, _ = planted()
    store = index.check_store()
    assert store is not None
    asked = rs.take(store, index.ids[:1])
    for duplicates in ("keep", "fold"):
        with pytest.raises(ValueError, match="no sample to score"):
            index.query(asked, where=index.ids[:1], exclude_self=True, group_by="artist", duplicates=duplicates)


def test_tables_json_and_text_tell_copies() -> None:
    index, queries, _, _ = planted()
    answer = index.query(queries, 4, duplicates="fold")
    assert answer.copies is not None
    assert "  and 5 copies" in str(answer).splitlines()[1]
    frame = answer.to_frame()
    assert frame["copies"].tolist() == [len(ids) for ids in answer.copies.ravel()]
    assert frame["copy_ids"][0] == list(answer.copies[0, 0])
    (first, *_) = json.loads(answer.to_json())["results"]
    assert first["copies"][0] == list(answer.copies[0, 0])
    assert answer.to_arrow()["copy_ids"][0].as_py() == list(answer.copies[0, 0])


def test_a_list_holds_no_more_than_there_are_families_and_wrong_words_are_refused() -> None:
    index, queries, _, _ = planted()
    assert index.query(queries, 60, duplicates="fold").ids.shape == (3, 40)
    for wrong in ("drop", 0.0, 1.5):
        with pytest.raises(ValueError, match="'keep', 'fold' or a likeness"):
            index.query(queries, duplicates=wrong)  # type: ignore[arg-type]


def test_copies_among_reranked_candidates_are_folded_in_the_exact_order() -> None:
    images = random_images(6, 0)
    images[4] = images[2]
    state = {"c": tiny_unet().state_dict()}
    task, steps = rs.DiffusionTask(tiny_unet(), SCHEDULER), rs.Explicit([40], noise="common")
    store = rs.sketch(task, images, None, checkpoints=state, timesteps=steps, progress=False)
    index = rs.build_index(store, rs.ReTrac(pairing="matched"), None)
    queries, train = (rs.Samples(x, task, state, steps) for x in (images[2:4], images))
    plain, folded = (
        index.query(queries, 5, rerank=6, train=train, duplicates=how, where="id != 0") for how in ("keep", "fold")
    )
    assert plain.ids[0].tolist()[:2] == [2, 4]
    assert folded.copies is not None
    assert folded.sketch_rank is not None
    for query in range(2):
        rest = [sample for sample in plain.ids[query].tolist() if sample != 4]
        assert folded.ids[query].tolist() == rest
        assert folded.copies[query].tolist() == [(4,) if sample == 2 else () for sample in rest]
    assert folded.sketch_rank[0, 0] == 1


def test_copies_are_told_in_an_index_that_grew_and_lost_samples(tmp_path: Path) -> None:
    index, queries, scores, family = planted(where=tmp_path / "s", out=tmp_path / "i")
    store = index.check_store()
    assert store is not None
    lost = np.flatnonzero(family == 33)[:7]
    store.delete(index.ids[lost])
    grown = rs.build_index(store, rs.TracIn(), tmp_path / "i", dtype="float32")
    alive = np.setdiff1d(np.arange(len(family)), lost)
    answer = grown.query(queries, 10, duplicates="fold")
    groups = grown.query(queries, 3, group_by="artist", duplicates="fold")
    assert answer.copies is not None
    firsts = alive[np.unique(family[alive], return_index=True)[1]]
    for query in range(3):
        best, others = by_hand(scores[query][alive], family[alive], index.ids[alive], 10)
        assert answer.ids[query].tolist() == best
        assert [sorted(given) for given in answer.copies[query]] == [sorted(rest) for rest in others]
        sums = [scores[query, firsts][family[firsts] % 3 == artist].sum() for artist in range(3)]
        np.testing.assert_allclose(groups.scores[query], np.sort(sums)[::-1], rtol=1e-5)
