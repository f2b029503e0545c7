"""Queries in views: what is seen, against slices; the answer, against the best of scores of views asked one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import retrac_scale as rs
from retrac_scale.task.items import About, Within
from retrac_scale.task.views import VIEWS
from tests.conftest import Labelled, random_images
from tests.query.test_regions import STEPS, pixel_samples

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LEFT = (0, 0, 4, 8)


def pictures(n: int, size: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).uniform(-1, 1, (n, 3, size, size)).astype(np.float32))


def test_a_moved_picture_is_a_slice_of_a_wider_one() -> None:
    images = pictures(2, 32)
    wide = F.pad(images, (2, 2, 2, 2), "replicate")
    for name, (x, y) in {"right": (0, 2), "left": (4, 2), "down": (2, 0), "up": (2, 4)}.items():
        found = VIEWS[f"moved {name}"].of(images)
        torch.testing.assert_close(found, wide[..., y : y + 32, x : x + 32], atol=1e-5, rtol=0)


def test_sizes_are_about_the_middle_and_light_is_above_black() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0) - 7.5, torch.arange(16.0) - 7.5, indexing="ij")
    ramp = torch.stack([rows, columns]) / 10
    for name, size in {"smaller": 0.9, "larger": 1.1}.items():
        seen = VIEWS[name].of(ramp[None])[0, :, 2:14, 2:14]
        torch.testing.assert_close(seen, ramp[:, 2:14, 2:14] / size)
    images = pictures(2)
    torch.testing.assert_close(VIEWS["darker"].of(images) + 1, 0.9 * (images + 1))
    torch.testing.assert_close(VIEWS["lighter"].of(images) + 1, (1.1 * (images + 1)).clamp(max=2))
    assert VIEWS["as it is"].of(images) is images


def test_a_region_moves_along_unless_it_would_leave_the_picture() -> None:
    dataset = Labelled(pictures(2), ids=["a", "b"])
    edge, middle = (0, 0, 1, 16), (4, 4, 12, 12)
    views = rs.Views(rs.Regions(dataset, {"edge": edge, "middle": middle}))
    names = list(VIEWS)
    assert views.ids[: len(VIEWS)] == [f"a: edge: {name}" for name in names]
    assert views.whose.tolist() == np.repeat(["a: edge", "a: middle", "b: edge", "b: middle"], len(VIEWS)).tolist()
    at = {name: 3 * len(VIEWS) + place for place, name in enumerate(names)}
    expected = np.zeros((16, 16))
    expected[4:12, 5:13] = 1
    seen = views[at["moved right"]]
    np.testing.assert_allclose(seen.region, expected, atol=1e-5)
    torch.testing.assert_close(seen.item[0], VIEWS["moved right"].of(dataset.images[1:])[0])
    assert seen.item[1] == 1  # its label
    assert views[at["as it is"]].region == middle
    assert views[at["darker"]].region.sum() == 64
    gone = views[2 * len(VIEWS) + names.index("moved left")]
    assert gone.region == edge
    assert gone.item[0] is not None
    torch.testing.assert_close(gone.item[0], dataset.images[1])


def test_items_keep_what_they_bring() -> None:
    image = pictures(1)[0]
    concept = rs.Concept("a hat", against="")
    within = Within({"image": image, "prompt": "x"}, LEFT)
    about = rs.Views(rs.Concepts(rs.Regions([within.item], (0, 0, 8, 8)), concept))[list(VIEWS).index("darker")]
    assert isinstance(about, About)
    assert about.concept is concept
    assert about.item.item["prompt"] == "x"
    torch.testing.assert_close(about.item.item["image"], VIEWS["darker"].of(image[None])[0])


@pytest.fixture(scope="module")
def index() -> rs.Index:
    train = pixel_samples(dataset=Labelled(random_images(12), ids=[f"{row}: left" for row in range(12)]))
    options: dict[str, Any] = {"timesteps": rs.Explicit(STEPS), "dtype": "float32", "progress": False}
    store = rs.sketch(
        train.task, train.dataset, None, checkpoints=train.checkpoints, projection=rs.CountSketch(256), **options
    )
    return rs.build_index(store, rs.ReTrac(pairing="matched"), None, dtype="float32")


def in_views(**regions: Any) -> rs.Samples:
    plain = pixel_samples()
    return rs.Samples(plain.dataset, plain.task, plain.checkpoints, region=regions, views=True)


def test_a_samples_score_is_the_best_that_any_view_gives_it(index: rs.Index) -> None:
    store = index.check_store()
    assert store is not None
    images, mask = random_images(2, seed=9), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    every = []
    for view in VIEWS.values():
        weights = view.placed(mask, "zeros")[0, 0]
        every.append(index.scores(pixel_samples(weights, dataset=view.of(images)).sketch(like=store)).compute())
    best, worst = np.max(every, axis=0), np.min(every, axis=0)
    answer = index.query(in_views(left=LEFT), k=5, side="both")
    assert answer.query_ids.tolist() == ["0: left", "1: left"]
    for scores, places, sign in ((best, slice(5), -1), (worst, slice(5, 10), 1)):
        ranked = np.argsort(sign * scores, axis=1)[:, :5]
        assert answer.ids[:, places].tolist() == [[f"{row}: left" for row in rows] for rows in ranked]
        np.testing.assert_allclose(answer.scores[:, places], np.take_along_axis(scores, ranked, 1), rtol=1e-5)
    assert answer.errors is None
    assert answer.resolved is None


def test_a_query_in_views_leaves_itself_out(index: rs.Index) -> None:
    answer = index.query(in_views(left=LEFT), k=11, exclude_self=True)
    for own, ids in zip(answer.query_ids, answer.ids.tolist(), strict=True):
        assert len(set(ids)) == 11
        assert own not in ids


@pytest.mark.parametrize("asked", [{"together": True}, {"group_by": np.arange(12)}, {"duplicates": "fold"}])
def test_what_views_do_not_answer_is_told(index: rs.Index, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"without {next(iter(asked))}="):
        index.query(in_views(left=LEFT), **asked)


def test_latents_and_videos_have_no_views() -> None:
    for item in ({"latents": torch.zeros(4, 8, 8)}, torch.zeros(3, 2, 8, 8)):
        with pytest.raises(ValueError, match=r"item 0 is no picture \[c, h, w\] of pixels"):
            rs.Views([item])[1]


def test_training_pictures_in_views_have_the_best_score_of_any() -> None:
    plain = pixel_samples(dataset=Labelled(random_images(5), ids=[f"p{row}" for row in range(5)]))
    views = rs.Views(plain.dataset)
    store = rs.sketch(
        plain.task,
        views,
        None,
        checkpoints=plain.checkpoints,
        timesteps=rs.Explicit(STEPS),
        projection=rs.CountSketch(256),
        dtype="float32",
        progress=False,
    )
    index = rs.build_index(store, rs.ReTrac(pairing="matched"), None, dtype="float32")
    queries = pixel_samples(LEFT, dataset=random_images(2, seed=9)).sketch(like=store)
    answer = index.query(queries, k=5, group_by="sample", reduce="max")
    scores = np.asarray(index.scores(queries)).reshape(2, 5, len(VIEWS)).max(2)
    ranked = np.argsort(-scores, axis=1)
    assert answer.ids.tolist() == [[f"p{row}" for row in rows] for rows in ranked]
    np.testing.assert_allclose(answer.scores, np.take_along_axis(scores, ranked, 1), rtol=1e-5)


def test_a_column_that_views_would_hide_is_refused() -> None:
    dataset = Labelled(pictures(2), ids=["a", "b"])
    dataset.columns = {"sample": [1, 2]}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="rename"):
        rs.Views(dataset)
