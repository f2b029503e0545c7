"""The service: its answers are the index's, and what it does not take on it refuses in one sentence."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import schemathesis
import torch
from fastapi import UploadFile
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import status_code_conformance
from starlette.testclient import TestClient

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.cli.measured import measured_like
from retrac_scale.datasets.base import pixels
from retrac_scale.query.question import Question
from retrac_scale.report.content import ranked
from retrac_scale.report.pictures import PictureFiles, Pictures
from retrac_scale.serve import Limits, create_app
from retrac_scale.serve.app import Service
from retrac_scale.serve.asked import Asked, Sketches
from retrac_scale.serve.batcher import Batcher
from retrac_scale.serve.bodies import Ask, Part
from retrac_scale.serve.library import Library
from retrac_scale.serve.server import is_local, names_of
from retrac_scale.serve.uploads import Upload, read_upload
from retrac_scale.task.views import VIEWS
from tests.served import COPIED, COPIES, QUERIES, SAMPLES, build, of_classes, of_prompts, running, uploaded

LIMITS = Limits(upload_bytes=20_000, pixels=10_000, k=20, ids=4, kept_uploads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def library(folder: Path) -> Library:
    return build(folder)


@pytest.fixture(scope="module")
def client(library: Library) -> Iterator[TestClient]:
    with TestClient(create_app(library, limits=LIMITS), raise_server_exceptions=False) as client:
        yield client


def png(size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(2).integers(0, 255, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, **{"format": "PNG"} | options)
    return buffer.getvalue()


class Named(list[torch.Tensor]):
    """Images with ids."""

    def __init__(self, images: list[torch.Tensor], ids: list[str]) -> None:
        super().__init__(images)
        self.ids = ids


def sketched(library: Library, name: str, key: str) -> rs.SketchStore:
    """The picture of `png()` under an upload's id, sketched like an index's store."""
    store, measured = library.indexes[name].check_store(), library.measured
    assert store is not None
    assert measured is not None
    image = torch.from_numpy(np.asarray(Image.open(io.BytesIO(png()))).astype(np.float32))[None] / 127.5 - 1
    common: dict[str, Any] = {"checkpoints": measured.checkpoints, "dtype": "float32", "progress": False}
    return rs.sketch(measured.task, Named([image], [key]), None, like=store, **common)


def listed(answer: rs.TopK) -> list[list[int]]:
    """Of each query what stands on the side that it is listed on."""
    return [ids[on].tolist() for ids, on in zip(answer.ids, answer.listed, strict=True)]


def ids_of(lists: dict[str, Any]) -> list[int]:
    return [int(result["id"]) for side in ("proponents", "opponents") for result in lists[side]]


def test_answers_are_those_of_the_index(client: TestClient, library: Library) -> None:
    where = "year < 2005 and artist == 'Anna'"
    ask = {"source": "queries", "ids": ["2", "0"], "k": 3, "where": where}
    found = client.post("/api/query", json=ask).json()
    for name, index in library.indexes.items():
        answer = index.query(rs.take(library.queries[name], [2, 0]), 3, side="both", where=where)
        assert [ids_of(query["lists"][name]) for query in found["queries"]] == listed(answer)
        scores = [result["score"] for result in found["queries"][0]["lists"][name]["proponents"]]
        np.testing.assert_allclose(scores, answer.scores[0, :3], rtol=1e-4)
    assert {sample["columns"]["artist"] for sample in found["samples"].values()} == {"Anna"}


def test_copies_are_folded_on_request_with_their_pictures(client: TestClient, library: Library) -> None:
    ask = {"source": "training", "ids": [str(COPIED)], "k": 10, "duplicates": "fold"}
    body = client.post("/api/query", json=ask).json()
    assert set(body["samples"]) >= {str(copy) for copy in COPIES}
    index = library.indexes["ReTracRidge"]
    lists = body["queries"][0]["lists"]["ReTracRidge"]
    first = lists["proponents"][0]
    assert (first["id"], first["copies"]) == (str(COPIES[0]), [str(COPIES[1])])  # under common noise; itself left out
    assert all("copies" not in result for result in lists["proponents"][1:] + lists["opponents"])
    own = rs.take(library.queries["ReTracRidge"], [2])
    ask = {"source": "queries", "id": "2", "column": "artist", "k": 3, "duplicates": "fold"}
    groups = client.post("/api/groups", json=ask).json()["ReTracRidge"]["proponents"]
    totals = {group["id"]: group["score"] for group in groups}
    counted = ~np.isin(index.ids, COPIES)
    expected = index.query(own, 3, group_by="artist", where=counted)
    for name, score, listed in zip(expected.ids[0], expected.scores[0], expected.listed[0], strict=True):
        assert not listed or totals[name] == pytest.approx(score, rel=1e-4)


def test_pictures_that_are_not_those_that_were_sketched_are_refused_by_name(library: Library) -> None:
    first, others = library.pictures.images.copy(), library.pictures.queries.copy()  # type: ignore[union-attr]
    first[7], others[1] = 255 - first[7], 255 - others[1]
    ids = next(iter(library.indexes.values())).ids
    changed = Library(library.indexes, Pictures(first, ids, others), queries=library.queries)
    with TestClient(create_app(changed, limits=LIMITS), raise_server_exceptions=False) as asked:
        for query, k, name in (("1", 1, "their ids: 1;"), ("0", 20, "their ids: 7;")):
            refused = asked.post("/api/query", json={"source": "queries", "ids": [query], "k": k})
            assert 400 <= refused.status_code < 500
            assert "1 of 1 pictures are not what was sketched under " + name in refused.text


def test_training_samples_are_asked_without_themselves(client: TestClient, library: Library) -> None:
    ask = {"source": "training", "ids": ["5"], "k": 2}
    found = client.post("/api/query", json=ask).json()["queries"][0]
    for name, index in library.indexes.items():
        store = index.check_store()
        assert store is not None
        answer = index.query(rs.take(store, [5]), 2, side="both", exclude_self=True)
        assert ids_of(found["lists"][name]) == listed(answer)[0]


def test_explanations_and_group_totals_are_those_of_the_index(client: TestClient, library: Library) -> None:
    index, queries = library.indexes["TracIn"], library.queries["TracIn"]
    ask = {"source": "queries", "id": "1", "sample": "7", "index": "TracIn"}
    parts = client.post("/api/explain", json=ask).json()
    expected = index.explain(rs.take(queries, [1]), 7)
    np.testing.assert_allclose(parts["contributions"], expected.contributions.sum(1), rtol=1e-4)
    group = {"source": "queries", "id": "1", "column": "artist", "reduce": "mean", "k": 2}
    totals = client.post("/api/groups", json=group).json()["TracIn"]
    answer = index.query(rs.take(queries, [1]), 2, side="both", group_by="artist", reduce="mean")
    assert [one["id"] for side in totals.values() for one in side] == listed(answer)[0]


def test_an_uploaded_image_is_answered_as_if_sketched_here(client: TestClient, library: Library) -> None:
    found = client.post("/api/upload", files={"file": png()}, data={"k": "3", "where": "year > 1995"}).json()
    (query,) = found["queries"]
    assert query["note"] == ""
    assert ids_of(query["lists"]["TracIn"])
    again = client.post("/api/upload", files={"file": png()}, data={"k": "3", "where": "year > 1995"}).json()
    assert again == found
    for name, index in library.indexes.items():  # of two stores, one of them under common noise
        answer = index.query(sketched(library, name, query["id"]), 3, side="both", where="year > 1995")
        assert ids_of(query["lists"][name]) == listed(answer)[0]
        best = query["lists"][name]["proponents"][0]
        ask = {"source": "uploads", "id": query["id"], "index": name, "sample": best["id"]}
        parts = client.post("/api/explain", json=ask).json()
        assert parts["score"] == pytest.approx(best["score"], rel=1e-3)
    other = client.post("/api/upload", files={"file": png((20, 30))}).json()["queries"][0]
    assert other["note"] == "cropped and resized from 20 x 30 to 8 x 8"


def test_a_part_of_a_query_of_a_training_sample_and_of_an_upload_is_asked_about(
    client: TestClient, library: Library
) -> None:
    upload = client.post("/api/upload", files={"file": png()}).json()["queries"][0]["id"]
    painted = np.zeros((8, 8), np.uint8)
    painted[1:5, 2:] = 255
    drawn = io.BytesIO()
    Image.fromarray(painted).save(drawn, "PNG")
    mask = base64.b64encode(drawn.getvalue()).decode()
    for source, name, picture in (
        ("queries", "1", library.pictures.query(1)),
        ("training", "7", library.pictures.image(7)),
        ("uploads", upload, read_upload(png(), library.image_shape, LIMITS).pixels),
    ):
        asked = torch.from_numpy(picture.astype(np.float32))[None, None] / 127.5 - 1
        for body, region in (
            ({"box": [2, 1, 8, 5]}, (2, 1, 8, 5)),
            ({"mask": mask}, painted / 255),
            ({"box": [2, 1, 8, 5], "rest": True}, rs.AllBut(painted / 255)),
        ):
            given = {"source": source, "id": name, "k": 3, "where": "year > 1995", **body}
            (found,) = client.post("/api/region", json=given).json()["queries"]
            assert library.measured is not None
            samples = replace(library.measured, dataset=rs.Regions(asked, region))
            index = library.indexes["ReTracRidge"]  # of the store under common noise
            answer = index.query(samples, 3, side="both", where="year > 1995")
            assert ids_of(found["lists"]["ReTracRidge"]) == ids_of(ranked(answer)[0])
    for body, why in (
        ({"box": [0, 0, 9, 8]}, "the box 0,0,9,8 reaches outside of dataset item"),
        ({"box": [3, 0, 3, 8]}, "which is empty"),
        ({"mask": base64.b64encode(png((9, 9))[:60]).decode()}, "it has 9 x 9 pixels, and the picture 8 x 8"),
        ({"mask": "white"}, "the mask is not in base64"),
        ({"mask": base64.b64encode(b"x").decode()}, "the mask is no PNG of the picture's size that can be read"),
        ({}, "give box, [x0, y0, x1, y1], or mask"),
        ({"concept": "3"}, "the concept '3' is a prompt, but the task's model is told nothing"),
    ):
        response = client.post("/api/region", json={"source": "queries", "id": "1", **body})
        assert (response.status_code, why in response.json()["detail"]) == (422, True), response.text


def test_a_concept_is_asked_about_in_a_picture_in_a_part_of_it_and_in_an_upload(tmp_path: Path) -> None:
    library = of_classes(tmp_path)
    index, measured = library.indexes["ReTracRidge"], library.measured
    assert measured is not None

    def expected(pixels: Any, **asked: Any) -> list[int]:
        images = torch.from_numpy(pixels.astype(np.float32))[None, None] / 127.5 - 1
        samples = rs.Samples(images, measured.task, measured.checkpoints, **asked)
        return ids_of(ranked(index.query(samples, 3, side="both"))[0])

    with TestClient(create_app(library, limits=LIMITS), raise_server_exceptions=False) as client:
        assert client.get("/api/about").json()["told"]["count"] == 10
        training = {"source": "training", "id": "7", "k": 3}
        pixels = library.pictures.image(7)
        for body, more in (
            ({"concept": "3"}, {"concept": rs.Concept(3)}),
            ({"concept": "3", "against": "7"}, {"concept": rs.Concept(3, against=7)}),
            ({"concept": "3", "views": True}, {"concept": rs.Concept(3), "views": True}),
            ({"concept": "3", "box": [2, 1, 8, 5]}, {"concept": rs.Concept(3), "region": (2, 1, 8, 5)}),
        ):
            (found,) = client.post("/api/region", json=training | body).json()["queries"]
            assert ids_of(found["lists"]["ReTracRidge"]) == expected(pixels, **more)
        assert found["note"] == "box 2,1,8,5, about 3"
        asked = {"k": "3", "concept": "3", "against": "7"}
        (found,) = client.post("/api/upload", files={"file": png()}, data=asked).json()["queries"]
        own = read_upload(png(), library.image_shape, LIMITS).pixels
        assert ids_of(found["lists"]["ReTracRidge"]) == expected(own, concept=rs.Concept(3, against=7))
        assert found["note"] == "about 3 against 7"
        again = {"source": "uploads", "id": found["id"], "k": 3, "concept": "4"}
        (found,) = client.post("/api/region", json=again).json()["queries"]
        assert ids_of(found["lists"]["ReTracRidge"]) == expected(own, concept=rs.Concept(4))
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"concept": "red"}, "the concept 'red' is a prompt, but the task's model is told classes"),
            ({"concept": "11"}, "the concept 11 is no class: the model knows 10, from 0"),
            ({"against": "7"}, "'7' is what a concept is compared with, and there is no concept"),
            ({"concept": "3", "rest": True}, "give box, [x0, y0, x1, y1], or mask"),
        ]
        for body, why in wrong:
            response = client.post("/api/region", json=training | body)
            assert (response.status_code, why in response.json()["detail"]) == (422, True), response.text
        refused = client.post("/api/upload", files={"file": png()}, data={"concept": "red"})
        assert (refused.status_code, "is told classes" in refused.json()["detail"]) == (422, True)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_prompt_is_asked_about_in_pixels_that_a_vae_encodes(tmp_path: Path) -> None:
    library = of_prompts(tmp_path)
    index, measured = library.indexes["ReTracRidge"], library.measured
    assert measured is not None
    own = read_upload(png((20, 16)), (3, 16, 16), LIMITS)
    samples = replace(measured, dataset=rs.Concepts(own.dataset, rs.Concept("a dog", against="a cat")))
    with TestClient(create_app(library, limits=LIMITS), raise_server_exceptions=False) as client:
        told = {"k": "3", "concept": "a dog", "against": "a cat"}
        (found,) = client.post("/api/upload", files={"file": png((20, 16))}, data=told).json()["queries"]
        assert ids_of(found["lists"]["ReTracRidge"]) == ids_of(ranked(index.query(samples, 3, side="both"))[0])
        assert found["note"] == "cropped from 20 x 16 to 16 x 16, about 'a dog' against 'a cat'"
        (whole,) = client.post("/api/upload", files={"file": png((20, 16))}, data={"k": "3"}).json()["queries"]
        samples = replace(measured, dataset=[{"image": own.dataset[0], "prompt": ""}])
        assert ids_of(whole["lists"]["ReTracRidge"]) == ids_of(ranked(index.query(samples, 3, side="both"))[0])
        assert whole["note"] == "cropped from 20 x 16 to 16 x 16, under the prompt ''"


class Stepping(Library):
    """Counts the pieces that are begun; `allowed`, if given, holds back each until it is released."""

    pieces = 0
    allowed: threading.Semaphore | None = None

    def upload(self, upload: Upload, pieces: list[Sketches]) -> Asked | None:
        """See `Library`."""
        self.pieces += upload.key not in self.uploads
        if self.allowed is not None:
            self.allowed.acquire(timeout=30)
        return super().upload(upload, pieces)


@pytest.fixture
def stepping(library: Library) -> Stepping:
    """One index, and ten sketches that are remembered."""
    indexes, queries = ({"ReTracRidge": own["ReTracRidge"]} for own in (library.indexes, library.queries))
    return Stepping(indexes, library.pictures, queries=queries, measured=library.measured, kept_uploads=10)  # type: ignore[arg-type]


def test_a_picture_in_views_is_answered_as_the_index_answers_samples_in_views(stepping: Stepping) -> None:
    assert stepping.measured is not None
    index, task, weights = stepping.indexes["ReTracRidge"], stepping.measured.task, stepping.measured.checkpoints
    asked = {"k": 3, "where": "year > 1995", "views": True}
    with TestClient(create_app(stepping), raise_server_exceptions=False) as client:
        assert client.get("/api/about").json()["views"] == list(VIEWS)
        part = {"source": "queries", "id": "1", "box": [2, 1, 8, 5], "rest": True, **asked}
        for response, picture, region, note in (
            (
                client.post("/api/region", json=part),
                stepping.pictures.query(1),
                rs.AllBut((2, 1, 8, 5)),
                "all but box 2,1,8,5, in views",
            ),
            (
                client.post("/api/upload", files={"file": png()}, data=asked),
                read_upload(png(), stepping.image_shape, LIMITS).pixels,
                None,
                "in views",
            ),
        ):
            (found,) = response.json()["queries"]
            assert found["note"] == note
            image = torch.from_numpy(picture.astype(np.float32))[None, None] / 127.5 - 1
            samples = rs.Samples(image, task, weights, region=region, views=True)
            expected = ranked(index.query(samples, 3, side="both", where="year > 1995"))[0]
            for side, results in found["lists"]["ReTracRidge"].items():
                assert [one["id"] for one in results] == [one["id"] for one in expected[side]]
                scores = [one["score"] for one in expected[side]]
                np.testing.assert_allclose([one["score"] for one in results], scores, rtol=1e-4)


def test_a_score_in_views_is_explained_by_the_view_that_has_it(stepping: Stepping) -> None:
    index, store = stepping.indexes["ReTracRidge"], stepping.indexes["ReTracRidge"].check_store()
    assert store is not None
    assert stepping.measured is not None
    image = torch.from_numpy(stepping.pictures.query(1).astype(np.float32))[None, None] / 127.5 - 1
    every = index.scores(replace(stepping.measured, dataset=rs.Views(image)).sketch(like=store)).compute()
    with TestClient(create_app(stepping), raise_server_exceptions=False) as client:
        asked = {"source": "queries", "id": "1", "views": True, "k": SAMPLES}
        (found,) = client.post("/api/region", json=asked).json()["queries"]
        own = {"source": "uploads", "id": found["id"]}
        for side, best in (("proponents", every.argmax(0)), ("opponents", every.argmin(0))):
            for result in found["lists"]["ReTracRidge"][side][:3]:
                ask = {**own, "index": "ReTracRidge", "sample": result["id"], "side": side}
                parts = client.post("/api/explain", json=ask).json()
                assert parts["view"] == list(VIEWS)[best[int(result["id"])]]
                assert parts["score"] == pytest.approx(result["score"], rel=1e-3)
        plain = {"source": "queries", "id": "1", "index": "ReTracRidge", "sample": "3"}
        assert client.post("/api/explain", json=plain).json()["view"] is None
        assert client.post("/api/repeatability", json=own).json() == {}  # the best of several lists has no halves
        groups = client.post("/api/groups", json={**own, "column": "artist"})
        assert (groups.status_code, "without group_by=" in groups.json()["detail"]) == (422, True)


FOLDED = "a query in views is answered with the best of its lists, without duplicates=; leave it out."


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"duplicates": "fold"}, FOLDED),
        ({"where": "artist =="}, "is no expression"),
        ({"views": "perhaps"}, "valid boolean"),
        ({"views": False}, "a PNG in base64, or a concept, or views"),
        ({"rest": True}, "give box"),
    ],
)
def test_what_views_cannot_be_had_with_is_told_before_anything_is_measured(
    stepping: Stepping, more: dict[str, Any], why: str
) -> None:
    with TestClient(create_app(stepping), raise_server_exceptions=False) as client:
        response = client.post("/api/region", json={"source": "queries", "id": "1", "views": True, **more})
        assert (response.status_code, why in response.json()["detail"]) == (422, True), response.text
        if more.keys() & {"duplicates", "where"}:
            response = client.post("/api/upload", files={"file": png()}, data={"views": True, **more})
            assert (response.status_code, why in response.json()["detail"]) == (422, True), response.text
    assert stepping.pieces == 0


def test_views_are_sketched_a_few_at_a_time_and_no_longer_than_somebody_waits(stepping: Stepping) -> None:
    async def ask(allowed: threading.Semaphore) -> None:
        service = Service(stepping, "", LIMITS)
        part = Part.model_validate({"source": "queries", "id": "1", "views": True})
        other = Ask.model_validate({"source": "queries", "ids": ["0"]})
        async with service.lifespan(None):  # type: ignore[arg-type]
            asking = asyncio.create_task(service.region(part))
            while not stepping.pieces:
                await asyncio.sleep(0.001)
            answering = asyncio.create_task(service.query(other))
            for _ in range(10):  # until its scan stands behind the first piece
                await asyncio.sleep(0)
            allowed.release()
            await answering
            assert stepping.pieces < 3
            asking.cancel()
            allowed.release(3)
        # which ends after all that was begun
        assert stepping.pieces < 3
        assert not stepping.uploads

    stepping.allowed = threading.Semaphore(0)
    asyncio.run(ask(stepping.allowed))


def test_views_count_as_nine_in_a_scan_and_among_what_is_remembered(stepping: Stepping) -> None:
    sizes: list[int] = []
    plain = read_upload(png(), stepping.image_shape, LIMITS)
    views = [plain.part(box, None, stepping.views) for box in (None, (0, 0, 4, 8))]
    first, second, third = (uploaded(stepping, one) for one in (plain, *views))
    assert list(stepping.uploads) == [third.id]  # of 19 sketches; ten are kept
    uploaded(stepping, plain)
    uploaded(stepping, views[1])
    assert list(stepping.uploads) == [first.id, third.id]
    assert stepping.pieces == 1 + 3 + 3 + 1

    async def ask_all(size: int) -> list[Any]:
        batcher, question = Batcher(stepping, size, sizes.append), Question(5, "both", None, None, "sum", False)
        asked = [first, second, third, Asked("uploads", first.id)]
        found = await asyncio.gather(*(batcher.ask("ReTracRidge", one, question) for one in asked))
        await batcher.close()
        return found

    together, apart = asyncio.run(ask_all(64)), asyncio.run(ask_all(8))
    assert sizes == [20, 2, 9, 9]
    assert together == apart


@pytest.mark.parametrize("size", [(8, 8), (20, 30), (31, 9)])
def test_an_upload_is_cut_and_scaled_as_a_dataset_would(size: tuple[int, int]) -> None:
    for channels in (1, 3):
        ours = read_upload(png(size), (channels, 8, 8), LIMITS).dataset[0]
        assert torch.equal(ours, pixels(png(size), channels, 8))


def test_an_upload_is_answered_however_many_came_after_it(library: Library) -> None:
    few = Library(library.indexes, library.pictures, measured=library.measured, kept_uploads=1)
    first, second = (uploaded(few, read_upload(png(size), few.image_shape, LIMITS)) for size in ((8, 8), (9, 9)))
    question = Question(2, "both", None, None, "sum", False)
    for asked in (first, second):
        few.check(asked)
        (answer,) = few.ask("TracIn", [asked], [question])
        assert isinstance(answer, rs.TopK)
        (query,) = few.fragment([asked], {"TracIn": ranked(answer)})["queries"]
        assert query["picture"].startswith("data:image/png")
    with pytest.raises(ValueError, match="among the uploads"):
        few.check(Asked("uploads", first.id))  # but only the last can still be asked for by its key


def test_a_scan_waits_for_one_other_computation_at_most(library: Library) -> None:
    async def ask_amid_others() -> list[str]:
        batcher = Batcher(library, 16)
        others = [asyncio.create_task(batcher.run(time.sleep, 0.05)) for _ in range(10)]
        await asyncio.sleep(0.01)
        await batcher.ask("TracIn", Asked("queries", "0"), Question(2, "both", None, None, "sum", False))
        done = [str(other.done()) for other in others]
        await asyncio.gather(*others)
        await batcher.close()
        return done

    assert asyncio.run(ask_amid_others()).count("True") <= 2


def bomb() -> bytes:
    """A PNG of a few kilobytes that says it has 10^10 pixels."""
    content = bytearray(png())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def deep() -> bytes:
    """A PNG of 16 bits per pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "status", "why"),
    [
        (b"", 422, "no image"),
        (b"\x80\x04\x95pickle", 422, "no image"),
        (png()[:60], 422, "damaged"),
        (bomb(), 422, "pixels"),
        (png((101, 100)), 422, "101 x 100 pixels; 10000 are allowed"),
        (png(format="GIF"), 422, "no image"),
        (b"\x89PNG" + bytes(30_000), 413, "larger than 20000 bytes"),
        (deep(), 422, "the image has more than 8 bits"),
        (png((1, 17)), 422, "1 x 17 pixels; one side may be 16 times the other"),
    ],
    ids=["empty", "pickle", "cut", "bomb", "large", "gif", "long", "deep", "thin"],
)
def test_bad_uploads_are_refused(client: TestClient, content: bytes, status: int, why: str) -> None:
    response = client.post("/api/upload", files={"file": content})
    assert (response.status_code, why in response.json()["detail"]) == (status, True), response.text


def test_few_uploads_are_decoded_at_a_time(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, read = 0, 0, Image.open

    def opened(*arguments: Any, **options: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1
        return read(*arguments, **options)

    async def upload_many() -> list[Any]:
        service = Service(library, "", LIMITS)
        async with service.lifespan(None):  # type: ignore[arg-type]
            return await asyncio.gather(*(service.upload(UploadFile(io.BytesIO(png()))) for _ in range(8)))

    monkeypatch.setattr(Image, "open", opened)
    found = asyncio.run(upload_many())
    assert all(one == found[0] for one in found)
    assert most <= 2


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("query", {"source": "queries", "ids": ["99"]}, "no '99' among the queries"),
        ("query", {"source": "queries", "ids": ["0"], "k": 21}, "at most 20"),
        ("query", {"source": "queries", "ids": ["0"] * 5}, "at most 4 ids"),
        ("query", {"source": "queries", "ids": ["0"], "indexes": ["TRAK"]}, "no index 'TRAK'"),
        ("query", {"source": "queries", "ids": ["0"], "where": "artist.to_csv('x') == 1"}, "holds a call"),
        ("query", {"source": "queries", "ids": ["0"], "where": "9**9**9 == id"}, "holds a pow"),
        ("query", {"source": "queries", "ids": ["0"], "where": "artist * 9999999999 == 'x'"}, "is no number"),
        ("query", {"source": "queries", "ids": ["0"], "where": "(" * 1000}, "no expression"),
        ("query", {"source": "queries", "ids": ["0"], "where": "\ud800 == id"}, "valid string"),
        ("query", {"source": "queries", "ids": ["0"], "where": "year > 3000"}, "leaves no sample"),
        ("query", {"source": "queries", "ids": ["0"], "more": 1}, "not permitted"),
        ("query", {"source": "queries", "ids": ["0"], "views": True}, "not permitted"),
        ("query", {"source": "/etc/passwd", "ids": ["0"]}, "should be 'queries' or 'training'"),
        ("explain", {"source": "queries", "id": "0", "sample": "x", "index": "TracIn"}, "no training sample 'x'"),
        ("explain", {"source": "uploads", "id": "0", "sample": "0", "index": "TracIn"}, "no '0' among the uploads"),
        ("groups", {"source": "queries", "id": "0", "column": "licence"}, "no column"),
        ("groups", {"source": "queries", "id": "0", "column": "year"}, "'year' is no column that puts"),
    ],
)
def test_wrong_questions_are_told_what_is_wrong(client: TestClient, path: str, body: Any, why: str) -> None:
    content = json.dumps(body).encode()
    response = client.post(f"/api/{path}", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, why in response.json()["detail"]) == (422, True), response.text


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_made_up_from_the_schema_get_an_answer_that_it_names(library: Library, mode: GenerationMode) -> None:
    with running(create_app(library, limits=LIMITS)) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for found in schema.get_all_operations():
            assert isinstance(found, Ok)
            operation = found.ok()
            if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
                continue  # nothing can be wrong about it

            @given(operation.as_strategy(generation_mode=mode))
            @settings(max_examples=10, suppress_health_check=list(HealthCheck))
            def ask(case: Any) -> None:
                case.call_and_validate(checks=[not_a_server_error, status_code_conformance])

            ask()


def test_deep_and_long_json_is_refused(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/api/query", content=b"[" * 100_000, headers=headers).status_code in (400, 422)
    assert client.post("/api/query", content=b" " * 300_000, headers=headers).status_code == 413

    def drip() -> Iterator[bytes]:
        yield from (b" " * 1000 for _ in range(300))

    assert client.post("/api/query", content=drip(), headers=headers).status_code == 413


def test_the_token_opens_all_but_the_empty_page(library: Library) -> None:
    with TestClient(create_app(library, token="s3cret")) as client:
        assert client.get("/").status_code == client.get("/health").status_code == 200
        for path in ("/metrics", "/api/about", "/openapi.json"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer s3cre"}).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer s3cret"}).status_code == 200
    with pytest.raises(ValueError, match="token is empty"):  # before a server runs, which would go on without it
        create_app(library, token="")


def test_other_sites_and_other_names_are_kept_out(library: Library) -> None:
    with TestClient(create_app(library, hosts=["localhost"]), base_url="http://localhost") as client:
        ask = {"source": "queries", "ids": ["0"]}
        assert client.post("/api/query", json=ask).status_code == 200
        assert client.post("/api/query", json=ask, headers={"sec-fetch-site": "cross-site"}).status_code == 403
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/").headers["x-frame-options"] == "DENY"
    with TestClient(create_app(library, hosts=names_of("127.0.0.2"))) as client:
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "127.0.0.2:8000"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        assert client.get("/health", headers={"host": "127.0.0.3"}).status_code == 400
    assert names_of("0.0.0.0") is None


def test_more_requests_than_allowed_are_told_to_come_again(library: Library) -> None:
    app = create_app(library, limits=Limits(concurrent=0))
    with TestClient(app) as client:
        response = client.get("/api/about")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert client.get("/health").status_code == 200


def test_without_a_model_uploads_are_not_served(library: Library) -> None:
    plain = Library(library.indexes, library.pictures, queries=library.queries)
    with TestClient(create_app(plain)) as client:
        assert client.post("/api/upload", files={"file": png()}).status_code == 404
        assert client.get("/api/about").json()["uploads"] is False


def test_indexes_of_other_samples_are_not_served_together(library: Library) -> None:
    sketches = {"final": np.random.default_rng(0).standard_normal((5, 2, 128))}
    other = rs.build_index(rs.write_store(None, sketches), rs.TracIn(), None)
    with pytest.raises(ValueError, match="other holds other samples than TracIn"):
        Library({"TracIn": library.indexes["TracIn"], "other": other}, library.pictures)
    turned = {**library.queries, "ReTracRidge": rs.take(library.queries["ReTracRidge"], [1, 0, 2, 3])}
    with pytest.raises(ValueError, match="queries of ReTracRidge are others"):
        Library(library.indexes, library.pictures, queries=turned)
    with pytest.raises(ValueError, match="give one store for all, or one for each"):
        Library(library.indexes, library.pictures, queries={"TracIn": library.queries["TracIn"]})


def test_files_that_are_gone_or_damaged_are_no_crash_and_deleted_samples_not_offered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [str(tmp_path / f"{number}.png") for number in range(4)]
    store = rs.write_store(tmp_path / "s", {"c": rng.standard_normal((4, 1, 8))}, ids=ids)
    store.delete(ids[:1])
    index = rs.build_index(store, rs.TracIn(), tmp_path / "i")
    small = Library({"TracIn": index}, Pictures(PictureFiles(ids[1:]), index.ids, []))
    with TestClient(create_app(small), raise_server_exceptions=False) as client:
        assert client.get("/api/ids", params={"source": "training"}).json()["ids"] == ids[1:]
        ask = {"source": "training", "ids": [ids[1]], "k": 2}
        for content in (None, b"not a picture"):
            if content is not None:
                Path(ids[1]).write_bytes(content)
            response = client.post("/api/query", json=ask)
            assert (response.status_code, ids[1] in response.json()["detail"]) == (503, True)


def test_ids_can_be_searched_and_metrics_count(client: TestClient) -> None:
    assert client.get("/api/ids", params={"source": "queries"}).json()["ids"] == [str(i) for i in range(QUERIES)]
    found = client.get("/api/ids", params={"source": "training", "contains": "1", "count": 3}).json()["ids"]
    assert found == ["1", "10", "11"]
    text = client.get("/metrics").text
    assert 'requests_total{route="/api/ids",status="200"} 2.0' in text


def test_concurrent_queries_share_a_scan_and_each_gets_its_own_answer(library: Library) -> None:
    sizes: list[int] = []
    ks, wheres = (1, 5, SAMPLES), (None, "artist == 'Anna'", "year < 1995")
    for where in wheres[1:]:
        library.mask("ReTracRidge", str(where))

    async def ask_all() -> list[Any]:
        batcher = Batcher(library, 16, sizes.append)
        filtered = [Question(k, "both", where, None, "sum", False) for k, where in zip(ks, wheres, strict=True)]
        asked = [(Asked("queries", str(i % QUERIES)), filtered[i % 3]) for i in range(12)]
        wrong = Question(2, "both", "artist", None, "sum", False)
        tasks = [batcher.ask("ReTracRidge", one, question) for one, question in [*asked, (asked[0][0], wrong)]]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return found

    *found, error = asyncio.run(ask_all())
    assert isinstance(error, ValueError)
    assert sizes == [12]  # what cannot be meant is told before a scan
    for i, lists in enumerate(found):
        query = rs.take(library.queries["ReTracRidge"], [i % QUERIES])
        answer = library.indexes["ReTracRidge"].query(query, ks[i % 3], side="both", where=wheres[i % 3])
        assert ids_of(lists) == listed(answer)[0]
        assert [x["resolved"] for side in lists.values() for x in side] == answer.resolved[answer.listed].tolist()  # type: ignore[index]


def test_a_query_that_cannot_be_answered_spoils_no_other(library: Library) -> None:
    """Both leave themselves out; only for the first is there then nothing left."""

    async def ask_both() -> list[Any]:
        batcher = Batcher(library, 16)
        question = Question(3, "both", "id == 3", None, "sum", True)
        tasks = [batcher.ask("TracIn", Asked("training", name), question) for name in ("3", "4")]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return found

    first, second = asyncio.run(ask_both())
    assert isinstance(first, ValueError)
    assert ids_of(second) == [3]  # on the side of its score


class Failing(Library):
    """Answers the first question with what no page can hold, and the others as ever, once each is `allowed`."""

    asked = 0
    allowed = threading.Semaphore(100)

    def ask(self, *arguments: Any) -> Any:
        """See `Library`."""
        self.asked += 1
        self.allowed.acquire(timeout=30)
        return [object()] if self.asked == 1 else super().ask(*arguments)


def test_an_answer_that_cannot_be_told_is_an_error_of_its_own_and_the_next_is_answered(library: Library) -> None:
    failing = Failing(library.indexes, library.pictures, queries=library.queries)
    ask = {"source": "queries", "ids": ["0"], "indexes": ["TracIn"]}
    with TestClient(create_app(failing), raise_server_exceptions=False) as client:
        assert [client.post("/api/query", json=ask).status_code for _ in range(2)] == [500, 200]


def test_whatever_befalls_a_scan_the_next_one_is_made(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []

    def observe(size: int) -> None:
        sizes.append(size)
        if len(sizes) == 1:
            raise OSError("no room for a count")

    async def ask_twice() -> list[Any]:
        batcher = Batcher(library, 16, observe)
        asked = Asked("queries", "0"), Question(2, "both", None, None, "sum", False)
        found = [await asyncio.gather(batcher.ask("TracIn", *asked), return_exceptions=True) for _ in range(2)]
        assert batcher.is_serving
        await batcher.close()
        assert not batcher.is_serving
        return found

    ((first,), (second,)) = asyncio.run(ask_twice())
    assert "no room for a count" in str(first)
    assert ids_of(second)
    assert "answers were lost" in caplog.text


def test_who_is_being_answered_when_the_service_ends_is_told_so(library: Library) -> None:
    held = Failing(library.indexes, library.pictures, queries=library.queries)
    held.asked, held.allowed = 1, threading.Semaphore(0)

    async def end_amid_a_scan() -> Any:
        batcher = Batcher(held, 16)
        asking = [
            asyncio.create_task(
                batcher.ask("TracIn", Asked("queries", "0"), Question(k, "both", None, None, "sum", k > 1))
            )
            for k in (1, 2)  # which do not share a scan
        ]
        while held.asked == 1:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(batcher.close())
        done, _ = await asyncio.wait(asking, timeout=10)
        held.allowed.release(2)
        await closing
        return [task.cancelled() for task in done]

    assert asyncio.run(end_amid_a_scan()) == [True, True]


def halves_by_hand(library: Library, query: rs.SketchStore, k: int, samples: list[int]) -> float:
    """Names that the lists of two halves of four timesteps share, from each score's parts, over all three splits."""
    index = library.indexes["ReTracRidge"]
    parts = np.array([index.explain(query, sample).contributions.sum(0).diagonal() for sample in samples])
    shared = []
    for one, other in (([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])):
        lists = [set(np.array(samples)[np.argsort(-parts[:, half].sum(1))[:k]]) for half in (one, other)]
        shared.append(len(lists[0] & lists[1]))
    return float(np.mean(shared))


def test_an_answer_comes_with_what_two_halves_of_its_measurements_share(client: TestClient, library: Library) -> None:
    every, queries = list(range(SAMPLES)), library.queries["ReTracRidge"]
    store = library.indexes["ReTracRidge"].check_store()
    assert store is not None
    upload = client.post("/api/upload", files={"file": png()}, data={"k": "3"}).json()["queries"][0]["id"]
    for ask, query, k, samples in (
        ({"source": "queries", "id": "1"}, rs.take(queries, [1]), 5, every),
        ({"source": "training", "id": "7"}, rs.take(store, [7]), 5, every[:7] + every[8:]),
        ({"source": "uploads", "id": upload}, sketched(library, "ReTracRidge", upload), 4, every),
        ({"source": "queries", "id": "2", "where": "artist == 'Bela'"}, rs.take(queries, [2]), 3, every[2::4]),
        ({"source": "queries", "id": "2", "where": "id < 4"}, rs.take(queries, [2]), 10, every[:4]),
    ):
        found = client.post("/api/repeatability", json={**ask, "k": k}).json()
        length = min(k, len(samples))
        shared = pytest.approx(halves_by_hand(library, query, length, samples), abs=0.01)
        assert found == {"ReTracRidge": {"k": length, "shared": shared}}  # means of timesteps cannot tell
    gone = client.post("/api/repeatability", json={"source": "uploads", "id": "gone"})
    assert (gone.status_code, gone.json()["detail"]) == (422, "there is no 'gone' among the uploads.")


class Counting(Library):
    """Counts how often it compares."""

    compared_groups = 0

    def repeatability(self, name: str, ids: Any) -> Any:
        """See `Library`."""
        self.compared_groups += 1
        return super().repeatability(name, ids)


def test_how_far_each_index_can_be_trusted_is_told_from_stored_queries_and_once(library: Library) -> None:
    counting = Counting(library.indexes, library.pictures, queries=library.queries)
    with TestClient(create_app(counting)) as client:
        found = client.get("/api/repeatability").json()
        assert client.get("/api/repeatability").json() == found
    assert counting.compared_groups == len(library.indexes)
    for name, index in library.indexes.items():
        store = index.check_store()
        assert store is not None
        expected = rs.repeatability(store, library.queries[name], index.estimator)
        assert found[name]["halves"] == pytest.approx([*vars(expected.halves).values()], abs=1e-3)
        assert found[name]["measurements"] == (4 if name == "ReTracRidge" else 2)
        assert f"{10 * expected.overlap.value:.1f} of the 10 names would come again" in found[name]["sentence"]
        assert "chance alone, among 24 samples, would bring 4.2" in found[name]["sentence"]
    with TestClient(create_app(Library(library.indexes, library.pictures))) as client:
        assert client.get("/api/repeatability").json() == {}


def test_many_stored_queries_are_compared_a_few_at_a_time(library: Library) -> None:
    index = library.indexes["ReTracRidge"]
    store = index.check_store()
    assert store is not None
    many = rs.take(store, range(20))
    several = Library({"ReTracRidge": index}, library.pictures, queries=many)
    groups = several.compared("ReTracRidge")
    assert [len(group) for group in groups] == [4, 4, 4, 4, 4]
    found = several.told("ReTracRidge", [several.repeatability("ReTracRidge", group) for group in groups])
    assert found["halves"] == pytest.approx([*vars(rs.repeatability(index, many).halves).values()], abs=1e-4)


def test_indexes_of_stores_that_differ_in_what_was_deleted_find_each_training_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sketches = rng.standard_normal((6, 2, 16))
    one = rs.write_store(tmp_path / "one", {"c": sketches}, ids=range(6), timesteps=[4, 9])
    other = rs.write_store(tmp_path / "other", {"c": sketches[1:]}, ids=range(1, 6), timesteps=[4, 9])
    one.delete([0])
    indexes = {"ReTrac": rs.build_index(one, rs.ReTrac()), "ReTracRidge": rs.build_index(other, rs.ReTracRidge())}
    both = Library(indexes, Pictures(rng.random((5, 4, 4)), np.arange(1, 6), []))
    with TestClient(create_app(both)) as client:
        found = client.post("/api/query", json={"source": "training", "ids": ["3"], "k": 2}).json()["queries"][0]
        part = client.post(
            "/api/explain", json={"source": "training", "id": "3", "sample": "1", "index": "ReTracRidge"}
        )
    for name, store in (("ReTrac", one), ("ReTracRidge", other)):
        answer = indexes[name].query(rs.take(store, [3]), 2, side="both", exclude_self=True)
        assert ids_of(found["lists"][name]) == listed(answer)[0]
    expected = indexes["ReTracRidge"].explain(rs.take(other, [3]), 1).score
    assert part.json()["score"] == pytest.approx(expected, rel=1e-4)


def test_images_are_measured_as_the_store_was_unless_timesteps_are_given(library: Library, tmp_path: Path) -> None:
    assert library.measured is not None
    model: Any = library.measured.task.model
    model.save_pretrained(tmp_path / "model")
    index, weights = library.indexes["ReTracRidge"], {"final": str(tmp_path / "model")}
    ours = read_upload(png(), library.image_shape, LIMITS)
    for steps, refused in ((None, False), (4, False), (2, True)):
        measured = measured_like(index, str(tmp_path / "model"), weights, steps, "cpu")
        served = Library({"ReTracRidge": index}, library.pictures, measured=measured)
        asked = uploaded(served, ours)
        question = Question(5, "both", None, None, "sum", False)
        if refused:
            with pytest.raises(ValueError, match="matched pairing needs the index's timesteps in the queries"):
                served.ask("ReTracRidge", [asked], [question])
            continue
        (expected,) = library.ask("ReTracRidge", [uploaded(library, ours)], [question])
        (found,) = served.ask("ReTracRidge", [asked], [question])
        assert found.ids.tolist() == expected.ids.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_only_loopback_is_this_machine(host: str, expected: bool) -> None:
    assert is_local(host) is expected


def test_serve_says_where_once_it_has_the_port_and_ends_after_what_it_has_begun(
    library: Library, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shown in (("images", library.pictures.images), ("made", library.pictures.queries)):
        np.save(tmp_path / f"{name}.npy", np.asarray(shown))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(folder / "TracIn.zarr"), "--queries", str(folder / "q.zarr"), "--port", str(port)]
    arguments += ["--images", str(tmp_path / "images.npy"), "--query-images", str(tmp_path / "made.npy")]
    assert main([*arguments, "--host", "0.0.0.0"]) == 1  # no token
    ridge = [
        "serve",
        str(folder / "ReTracRidge.zarr"),
        "--queries",
        str(folder / "qc.zarr"),
        *arguments[6:],
        "--model",
        "x",
        "--timesteps",
        "20",
    ]
    assert main(ridge) == 1
    assert (
        "ReTracRidge compares gradients at the timesteps of its store; leave --timesteps out" in capsys.readouterr().err
    )
    with socket.create_server(("127.0.0.1", port)):
        capsys.readouterr()
        assert main(arguments) == 1
        out, error = capsys.readouterr()
    assert not out
    assert f"port {port}: Address already in use" in error
    assert main([*arguments, "--port", "70000"]) == 1
    assert "from 0 to 65535" in capsys.readouterr().err
    environment = {**os.environ, "RETRAC_SCALE_TOKEN": "t"}
    command = [sys.executable, "-m", "retrac_scale.cli", *arguments, "--port", "0", "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with httpx2.Client(base_url=url, headers={"authorization": "Bearer t"}, timeout=60) as client:
                assert client.get("/health").status_code == 200  # whoever reads the address can ask at once

                def body() -> Iterator[bytes]:  # the signal comes while the request is being sent
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.3)
                    yield b'{"source": "queries", "ids": ["0"]}'

                headers = {"content-type": "application/json"}
                response = client.post("/api/query", content=body(), headers=headers)
                assert response.status_code == 200
            assert process.wait(20) == 0
        finally:
            process.kill()
