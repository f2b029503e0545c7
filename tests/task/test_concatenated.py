"""A torch ConcatDataset has the ids, columns and digests of its parts, or says what it leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import retrac_scale as rs
from retrac_scale.task.items import brought
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images


def arrays(*names: str, **columns: Any) -> Any:
    return rs.datasets.Arrays(images(len(names)).numpy(), ids=list(names), columns=columns)


def joined(*parts: Any) -> Any:
    return ConcatDataset(parts)


def sketch(dataset: Any) -> rs.SketchStore:
    model = SmallDenoiser()
    plan: dict[str, Any] = {"timesteps": rs.Explicit([5]), "projection": rs.CountSketch(32), "progress": False}
    weights = {"last": model.state_dict()}
    return rs.sketch(rs.DiffusionTask(model, SCHEDULER), dataset, None, checkpoints=weights, **plan)


def test_ids_and_columns_are_those_of_the_parts_in_their_order() -> None:
    whole = joined(arrays("a", "b", shows=["cat", "dog"]), Subset(arrays("c", "d", "e", shows=["sea"] * 3), [2, 0]))
    store = sketch(whole)
    assert store.ids.tolist() == ["a", "b", "e", "c"]
    assert store.columns["shows"].tolist() == ["cat", "dog", "sea", "sea"]
    assert sketch(Subset(whole, [3, 1])).ids.tolist() == ["c", "b"]
    whole.ids = [7, 8, 9, 10]
    assert sketch(whole).ids.tolist() == [7, 8, 9, 10]


def test_parts_that_give_an_id_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="id 'a' is given twice, at positions"):
        sketch(joined(arrays("a", "b"), arrays("a")))


def test_parts_that_are_numbered_by_themselves_are_numbered_through() -> None:
    numbered = [rs.datasets.Arrays(images(n).numpy(), columns={"shows": ["cat"] * n}) for n in (2, 3)]
    store = sketch(joined(*numbered))
    assert store.ids.tolist() == [0, 1, 2, 3, 4]
    assert store.columns["shows"].tolist() == ["cat"] * 5


def test_what_some_parts_lack_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="some parts of the ConcatDataset bring no ids"):
        assert brought(joined(arrays("a"), TensorDataset(images(2))), "ids") is None
    with pytest.warns(UserWarning, match=r"bring no columns \['year'\]"):
        found = brought(joined(arrays("a", shows=["x"], year=[1]), arrays("b", shows=["y"])), "columns")
    assert found["shows"].tolist() == ["x", "y"]
    assert [*found] == ["shows"]
    assert brought(joined(TensorDataset(images(1)), TensorDataset(images(2))), "ids") is None


def test_digests_of_encoders_and_regions_are_the_parts_or_refused_where_they_differ() -> None:
    part, other = TensorDataset(torch.zeros(2, 1, 6, 6)), TensorDataset(torch.zeros(1, 1, 6, 6))
    left, right = (rs.Regions(part, (0, 0, width, 6)) for width in (3, 4))
    assert brought(joined(left, left), "region") == left.region
    with pytest.raises(ValueError, match="the parts of the ConcatDataset differ in their region"):
        brought(joined(left, right), "region")
    one: Any = part
    one.frozen, one.stamps = {"vae": "abc"}, np.array([5, 6], np.uint64)
    assert brought(joined(one, other), "frozen") == {"vae": "abc"}
    assert brought(joined(other, one), "stamps").tolist() == [0, 5, 6]
