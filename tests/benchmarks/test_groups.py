"""What the benchmark of groups says of shares, by loops, and of an index's own answer."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

import retrac_scale as rs
from benchmarks.groups import by_name, compared
from retrac_scale.evaluate import Groups, judge

Q, G = 7, 5


@pytest.fixture
def four() -> list[Any]:
    """Shares, errors, scores, harm `[q, g]`."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(G), Q)
    return [shares, rng.uniform(0.01, 0.1, (Q, G)), rng.normal(size=(Q, G)), rng.normal(size=(Q, G))]


def test_shares_are_compared_with_harm_group_by_group(four: list[Any]) -> None:
    found = compared(*four)
    for q, (shares, errors, scores, harm) in enumerate(zip(*four, strict=True)):
        worst, best = max(range(G), key=harm.__getitem__), max(range(G), key=shares.__getitem__)
        inside = [g for g in range(G) if shares[g] >= shares[best] - 1.96 * errors[best]]
        assert found["first, by share"][q] == (best == worst)
        assert found["first, by score"][q] == (max(range(G), key=scores.__getitem__) == worst)
        assert found["within"][q] == (worst in inside)
        assert found["groups within"][q] == len(inside)
        pairs = [
            (shares[a] - shares[b], harm[a] - harm[b])
            for a, b in combinations(range(G), 2)
            if abs(shares[a] - shares[b]) > 1.96 * (errors[a] ** 2 + errors[b] ** 2) ** 0.5
        ]
        assert found["apart"][q] == len(pairs) / 10
        assert found["of these in order"][q] == pytest.approx(np.mean([one * other > 0 for one, other in pairs]))


def test_an_answers_groups_come_back_in_the_order_of_the_truth() -> None:
    rng = np.random.default_rng(1)
    train, asked = rng.normal(size=(30, 6)).astype(np.float32), rng.normal(size=(Q, 6)).astype(np.float32)
    labels, names = np.array(["b", "c", "a"] * 10), np.array(["c", "a", "b"])
    store, queries = (rs.write_store(None, {"c": x[:, None]}, dtype="float32") for x in (train, asked))
    index = rs.build_index(store, rs.TracIn(), None, dtype="float32")
    shares, errors, scores = by_name(index.query(queries, 3, group_by=labels), names)
    products = asked.astype(np.float64) @ train.T
    for place, name in enumerate(names):
        np.testing.assert_allclose(scores[:, place], products[:, labels == name].sum(1), rtol=1e-5, atol=1e-5)
        raised = np.maximum(products, 0)
        expected = raised[:, labels == name].sum(1) / raised.sum(1)
        np.testing.assert_allclose(shares[:, place], expected, rtol=1e-5)
    harm = rng.normal(size=(1, 3, Q))
    truth = Groups("tiny-groups", {"held out": Q}, 30, {}, {"x": labels}, {"x": names}, {"x": harm}, np.zeros((1, Q)))
    told = compared(shares, errors, scores, truth.harm("x")[0])["first, by score"].mean()
    assert judge(products, truth, draws=5)["first of 3, x", "held out"].value.value == pytest.approx(told)
