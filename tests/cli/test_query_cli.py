"""The verbs index and query: stored ids, stores, image files; tables and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

import retrac_scale as rs
from retrac_scale import planner
from retrac_scale.cli import main
from retrac_scale.cli.project import Project
from retrac_scale.cli.sizes import in_bytes
from retrac_scale.datasets import ImageFiles
from tests.conftest import Labelled, random_images, tiny_dit, tiny_unet
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images
from tests.task.test_pipelines import stable_diffusion


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    columns = {"artist": np.array(["x", "y"] * 10)}
    rs.write_store(tmp_path / "s", {"c": rng.standard_normal((20, 1, 8))}, columns=columns, timesteps=[4])
    rs.write_store(tmp_path / "q", {"c": rng.standard_normal((2, 1, 8))}, timesteps=[4])
    assert main(["index", str(tmp_path / "s"), str(tmp_path / "i"), "--estimator", "TracIn"]) == 0
    return tmp_path


def test_index_builds_what_build_index_builds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rs.open_index(folder / "i").estimator == rs.TracIn()
    assert main(["index", str(folder / "s"), str(folder / "m"), "--pairing", "matched", "--dtype", "float32"]) == 0
    assert rs.open_index(folder / "m").estimator == rs.ReTrac(pairing="matched")
    assert main(["index", str(folder / "s"), str(folder / "n"), "--estimator", "TRACK"]) == 1
    assert main(["index", str(folder / "s"), str(folder / "n"), "--estimator", "GradCos", "--pairing", "matched"]) == 1
    errors = capsys.readouterr().err
    assert "choose one of TracIn, ReTrac" in errors
    assert "GradCos has no matched pairing" in errors


def sketched(out: Path, timesteps: int, noise: Any = "common") -> rs.SketchStore:
    model = SmallDenoiser()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = rs.EvenlySpaced(timesteps, noise=noise)
    options: dict[str, Any] = {"checkpoints": {"c": state}, "projection": rs.CountSketch(16), "progress": False}
    return rs.sketch(rs.DiffusionTask(model, SCHEDULER), images(40), out, timesteps=plan, **options)


def test_index_takes_the_estimator_that_is_recommended_for_the_store(tmp_path: Path) -> None:
    for noise, expected in (("common", rs.ReTracRidge()), ("own", rs.ReTrac())):
        sketched(tmp_path / noise, 2, noise)
        assert main(["index", str(tmp_path / noise), str(tmp_path / "i" / noise)]) == 0
        assert rs.open_index(tmp_path / "i" / noise).estimator == expected
    assert main(["index", str(tmp_path / "common"), str(tmp_path / "damped"), "--damping", "2"]) == 0
    assert rs.open_index(tmp_path / "damped").estimator == rs.ReTracRidge(2.0)


def test_options_of_ridges_and_names_in_any_case(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matched = ["--pairing", "matched", "--directions"]
    for given, expected in (
        (["trak", *matched, "--damping", "0.25"], rs.TRAK(0.25, pairing="matched", directions=True)),
        (["RENORMIF", "--directions"], rs.RenormIF(directions=True)),
        (["retracridge", *matched], rs.ReTracRidge()),  # as it is anyway
        (["tracin"], rs.TracIn()),
    ):
        assert main(["index", str(folder / "s"), str(folder / given[0]), "--estimator", *given]) == 0
        assert rs.open_index(folder / given[0]).estimator == expected
    capsys.readouterr()
    for given, why in (
        (["ReTracRidge", "--pairing", "cross"], "ReTracRidge has no cross pairing"),
        (["retrac", "--directions"], "ReTrac has no directions; TRAK, RelatIF, RenormIF, DTRAK, DAS have"),
        (["Ridged"], "there is no estimator 'Ridged'; choose one of TracIn, ReTrac"),
    ):
        assert main(["index", str(folder / "s"), str(folder / "n"), "--estimator", *given]) == 1
        assert why in capsys.readouterr().err
    assert main(["index", "--directions"]) == 1
    assert "--directions is for one index" in capsys.readouterr().err


def test_info_tells_how_far_another_run_would_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = sketched(tmp_path / "s", 4)
    index = rs.build_index(store, None, tmp_path / "i")
    for of, place in ((store, "s"), (index, "i")):
        expected = rs.repeatability(of)
        assert main(["info", str(tmp_path / place), "--repeatability"]) == 0
        assert f"repeatability: {expected}" in capsys.readouterr().out
        assert main(["info", str(tmp_path / place), "--json", "--repeatability"]) == 0
        told = json.loads(capsys.readouterr().out)
        told = (told["measurements"][0] if place == "s" else told)["repeatability"]
        assert (told["k"], told["measurements"]) == (10, 4)
        assert told["overlap"]["value"] == expected.overlap.value
        assert told["rank_correlation"]["low"] == expected.rank_correlation.low
        assert main(["info", str(tmp_path / place)]) == 0
        assert "repeatability: not measured; --repeatability does" in capsys.readouterr().out


def test_info_says_what_cannot_be_told_and_how_to_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sketched(tmp_path / "once", 1)
    rs.write_store(tmp_path / "alone", {"c": np.ones((1, 4, 8))}, timesteps=[1, 2, 3, 4])
    for place, why in (("once", "measured once, which cannot tell"), ("alone", "fewer than two samples are left")):
        assert main(["info", str(tmp_path / place), "--repeatability"]) == 0
        told = capsys.readouterr().out
        assert why in told
        assert f"to query it: retrac-scale index {tmp_path / place} index.zarr" in told
        assert main(["info", str(tmp_path / place), "--json", "--repeatability"]) == 0
        assert why in json.loads(capsys.readouterr().out)["measurements"][0]["repeatability"]["unknown"]


def test_plan_tells_what_answers_that_repeat_so_far_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = sketched(tmp_path / "s", 4)
    share = 0.97
    needed = rs.repeatability(store).needed(share)
    total = max(4, -(-needed // 4) * 4)
    command = ["plan", "--store", str(tmp_path / "s"), "--repeatability", str(share)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["needed"], found["timesteps"]) == (needed, total)
    assert found["foretold"]["value"] == rs.repeatability(store).foretold(total).value >= share
    assert found["store_bytes"] == planner.store_size(40, total, 1, 16).array_bytes
    assert found["index_bytes"] == planner.index_bytes(40, 1, 16, total, ridge=True)
    assert main([*command, "--samples", "1000000"]) == 0
    told = capsys.readouterr().out
    assert f"for {share}: {total} timesteps" in told
    size = in_bytes(planner.index_bytes(1_000_000, 1, 16, total, ridge=True))
    assert f"index: {size} (int8, ReTracRidge with matched pairing)" in told
    for wrong, why in (
        (["--store", str(tmp_path / "none")], "`retrac-scale sketch` first, or sketch a sample"),
        (["--timesteps", "3"], "--timesteps is what the store has"),
        (["--repeatability", "1"], "lies between 0 and 1"),
    ):
        assert main([*command, *wrong]) == 1
        assert why in capsys.readouterr().err
    sketched(tmp_path / "once", 1)
    assert main(["plan", "--store", str(tmp_path / "once"), "--repeatability", "0.9"]) == 1
    assert "measured once, which cannot tell" in capsys.readouterr().err


def test_index_takes_a_damping_as_the_estimators_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(folder / "s")
    for name, given, expected in (
        ("number", ["--damping", "0.25"], rs.TRAK(0.25)),
        ("auto", ["--damping", "auto"], rs.TRAK("auto")),
        ("default", [], rs.TRAK("auto")),
    ):
        assert main(["index", store, str(folder / name), "--estimator", "TRAK", *given]) == 0
        assert rs.open_index(folder / name).estimator == expected
    assert rs.open_index(folder / "number").meta["fit"]["c"]["damping"] == 0.25
    assert main(["index", store, str(folder / "d"), "--estimator", "dtrak"]) == 0  # sketches that were given
    for estimator, damping in (("ReTrac", "0.25"), ("DAS", "-1")):
        assert main(["index", store, str(folder / "n"), "--estimator", estimator, "--damping", damping]) == 1
    errors = capsys.readouterr().err
    assert (
        "ReTrac inverts no matrix, so it has no damping; ReTracRidge, TRAK, RelatIF, RenormIF, DTRAK, DAS have"
        in errors
    )
    assert 'damping must be "auto" or a number of 0 or more, got -1.0' in errors
    with pytest.raises(SystemExit, match="2"):
        main(["index", store, str(folder / "n"), "--estimator", "TRAK", "--damping", "some"])
    assert "argument --damping: give auto or a number, not 'some'" in capsys.readouterr().err


def test_index_of_a_measure_and_options_without_a_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", str(folder / "s"), str(folder / "other"), "--measure", "l1"]) == 1
    assert "has no measure 'l1'" in capsys.readouterr().err
    weighted = "mse x SD3Weighting(scheme='cosmap', precondition_outputs=True)"
    assert main(["index", str(folder / "s"), str(folder / "other"), "--measure", f"{weighted}, l1"]) == 1
    assert f'has no measure "{weighted}"' in capsys.readouterr().err
    assert Project(measure=f"Huber(delta=0.5), {weighted},l1").measures == ("Huber(delta=0.5)", weighted, "l1")
    assert main(["index", "--damping", "0"]) == 1
    assert "--damping is for one index: say of which --estimator" in capsys.readouterr().err


def test_stored_ids_are_queries_and_answers_go_to_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, store = rs.open_index(folder / "i"), rs.open_store(folder / "s")
    capsys.readouterr()
    assert main(["query", str(folder / "i"), "--ids", "3", "7", "-k", "4", "--json"]) == 0
    expected = index.query(rs.take(store, [3, 7]), 4, exclude_self=True)
    assert [row["ids"] for row in json.loads(capsys.readouterr().out)["results"]] == expected.ids.tolist()
    options = ["-k", "2", "--side", "both", "--where", "artist == 'x' and id > 2"]
    for name in ("a.parquet", "a.json"):
        assert main(["query", str(folder / "i"), str(folder / "q"), *options, "--out", str(folder / name)]) == 0
    answer = index.query(rs.open_store(folder / "q"), 2, side="both", where="artist == 'x' and id > 2")
    assert pd.read_parquet(folder / "a.parquet")["id"].tolist() == answer.ids.ravel().tolist()
    assert (folder / "a.json").read_text() == answer.to_json()
    assert main(["query", str(folder / "i"), str(folder / "q"), "--group-by", "artist", "--reduce", "max"]) == 0
    assert set(capsys.readouterr().out.split()) >= {"x", "y"}


@pytest.mark.parametrize("noise", ["common", "own"])
def test_image_files_are_sketched_and_asked(noise: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    model = tiny_unet()
    assert isinstance(model, UNet2DModel)
    model.save_pretrained(tmp_path / "model" / "unet")
    pictures = ImageFiles([str(tmp_path / "pictures")], 1)
    task = rs.DiffusionTask(model, DDPMScheduler(num_train_timesteps=100))
    plans = [rs.EvenlySpaced(2, noise=noise), rs.EvenlySpaced(2, seed=7, noise=noise)]
    checkpoints = {"final": model.state_dict()}
    store = rs.sketch(
        task,
        pictures,
        tmp_path / "s",
        checkpoints=checkpoints,
        timesteps=plans if noise == "common" else plans[0],
        projection=rs.CountSketch(64),
        progress=False,
    )
    rs.build_index(store, None, tmp_path / "i")
    files = [str(tmp_path / "pictures" / "1.png")]
    arguments = ["query", str(tmp_path / "i"), *files, "-k", "5", "--json"]
    weights = ["--model", str(tmp_path / "model" / "unet"), "--checkpoint", f"final={tmp_path / 'model' / 'unet'}"]
    assert main([*arguments, *weights]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    asked = rs.Samples(ImageFiles(files, 1), task, checkpoints).sketch(store)
    expected = rs.open_index(tmp_path / "i").query(asked, 5)
    assert result["query"] == files[0]
    positive = expected.scores[0] > 0
    assert result["ids"] == expected.ids[0][positive].tolist()
    np.testing.assert_allclose(result["scores"], expected.scores[0][positive], rtol=1e-4)
    assert main(["query", str(tmp_path / "i"), "--ids", files[0], "-k", "3", "--json"]) == 0
    assert files[0] not in json.loads(capsys.readouterr().out)["results"][0]["ids"]
    if noise == "common":  # the training image's gradients: it explains itself best
        assert result["ids"][0] == files[0]
        own = np.asarray(rs.open_index(tmp_path / "i").scores(rs.take(store, files)))[0, 1]
        assert result["scores"][0] == pytest.approx(own, rel=0.02)
        assert main([*arguments, *weights, "--timesteps", "2"]) == 1
        assert "needs the index's timesteps in the queries" in capsys.readouterr().err
    else:  # of another noise than the training image's
        scores = dict(zip(expected.ids[0].tolist(), expected.scores[0].tolist(), strict=True))
        assert scores[files[0]] < rs.self_influence(store, rs.ReTrac())[1]
        assert main([*arguments, *weights, "--timesteps", "2"]) == 0
        assert json.loads(capsys.readouterr().out)["results"] == [result]
    assert main(arguments) == 1
    assert "give --model and a --checkpoint" in capsys.readouterr().err


def test_a_box_or_a_mask_of_image_files_is_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rng = tiny_unet(), np.random.default_rng(0)
    model.save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    painted = np.zeros((8, 8), np.uint8)
    painted[2:7, :3] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    task = rs.DiffusionTask(UNet2DModel.from_pretrained(tmp_path / "unet"), DDPMScheduler(num_train_timesteps=100))
    checkpoints = {"final": str(tmp_path / "unet")}
    files = ImageFiles([tmp_path / f"{number}.png" for number in range(3)], channels=1)
    options: dict[str, Any] = {"projection": rs.CountSketch(64), "timesteps": rs.EvenlySpaced(2), "progress": False}
    store = rs.sketch(task, files, tmp_path / "s", checkpoints=checkpoints, **options)
    index = rs.build_index(store, None, tmp_path / "i")
    query = ["query", str(tmp_path / "i"), str(tmp_path / "1.png"), "--json", "-k", "3"]
    query += ["--model", str(tmp_path / "unet"), "--checkpoint", f"final={tmp_path / 'unet'}"]
    one = ImageFiles([tmp_path / "1.png"], channels=1)
    for given, region, views in (
        (["--region", "0,2,3,7"], (0, 2, 3, 7), False),
        (["--region", "0,2,3,7", "--views"], (0, 2, 3, 7), True),
        (["--mask", str(tmp_path / "mask.png")], painted / 255, False),
        (["--region", "0,2,3,7", "--all-but"], rs.AllBut(painted / 255), False),
    ):
        assert main([*query, *given]) == 0
        found = json.loads(capsys.readouterr().out)["results"][0]
        expected = index.query(rs.Samples(one, task, checkpoints, region=region, views=views), k=3)
        assert found["ids"] == expected.ids[0].tolist()
        np.testing.assert_allclose(found["scores"], expected.scores[0], rtol=1e-5)
    for wrong, why in (
        ([*query, "--region", "0,2,3"], "give four whole numbers of pixels"),
        ([*query, "--region", "0,2,3,9"], "the box 0,2,3,9 reaches outside of dataset item"),
        ([*query, "--region", "0,2,3,7", "--mask", "mask.png"], "give --region or --mask, not both"),
        ([*query, "--mask", str(tmp_path / "none.png")], "none.png cannot be read as a picture"),
        ([*query, "--concept", "3"], "the concept '3' is a prompt, but the task's model is told nothing"),
        ([*query, "--all-but"], "--all-but needs a --region or a --mask"),
        ([*query[:2], "--ids", "x", "--region", "0,2,3,7"], "--ids are answered from stored sketches"),
        ([*query[:2], "--ids", "x", "--views"], "which are seen in one way"),
        ([*query, "--views", "--together"], "a query in views is answered with the best of its lists"),
        (
            [*query[:2], str(tmp_path / "s"), "--region", "0,2,3,7"],
            "holds sketches of whole images, which have no parts",
        ),
    ):
        assert main(wrong) == 1
        assert why in capsys.readouterr().err


def asked_by_command(
    folder: Path, task: rs.DiffusionTask, train: Any, size: int, channels: int
) -> tuple[rs.Index, list[str], dict[str, str], ImageFiles]:
    """An index of a store of a saved model, a command that asks it about an image file, its weights, and the file."""
    values = np.random.default_rng(0).integers(0, 255, (size, size, channels), dtype=np.uint8)
    Image.fromarray(values[..., 0] if channels == 1 else values).save(folder / "a.png")
    checkpoints = {"final": str(folder / "model" / "unet")}
    options: dict[str, Any] = {"projection": rs.CountSketch(64), "timesteps": rs.EvenlySpaced(2), "progress": False}
    store = rs.sketch(task, train, folder / "s", checkpoints=checkpoints, **options)
    index = rs.build_index(store, None, folder / "i")
    query = ["query", str(folder / "i"), str(folder / "a.png"), "--json", "-k", "3"]
    query += ["--model", str(folder / "model"), "--checkpoint", f"final={folder / 'model' / 'unet'}"]
    return index, query, checkpoints, ImageFiles([folder / "a.png"], channels)


def check_asked(index: rs.Index, query: list[str], samples: rs.Samples, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(query) == 0
    found = json.loads(capsys.readouterr().out)["results"][0]
    expected = json.loads(index.query(samples, k=3).to_json())["results"][0]
    assert found["ids"] == expected["ids"]
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-4)


def test_a_class_is_asked_about_for_image_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_dit().save_pretrained(tmp_path / "model" / "unet")  # type: ignore[operator]
    task = rs.DiffusionTask(tiny_dit(), DDPMScheduler(num_train_timesteps=100))
    index, query, checkpoints, file = asked_by_command(tmp_path, task, Labelled(random_images(6)), 8, 1)
    for given, concept, region in (
        (["--concept", "3"], rs.Concept(3), None),
        (["--concept", "3", "--against", "7", "--region", "0,2,3,7"], rs.Concept(3, against=7), (0, 2, 3, 7)),
    ):
        samples = rs.Samples(file, task, checkpoints, region=region, concept=concept)
        check_asked(index, [*query, *given], samples, capsys)
    assert main(query) == 1
    told = "brings no 'class_labels', which the model's forward needs; give its number in a column label of metadata"
    assert told in capsys.readouterr().err
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}')
    labelled = ImageFiles([tmp_path], 1, given={"label": "label"})
    check_asked(index, query, rs.Samples(labelled, task, checkpoints), capsys)
    for wrong, why in (
        ([*query, "--concept", "red"], "the concept 'red' is a prompt, but the task's model is told classes"),
        ([*query, "--concept", "11"], "the concept 11 is no class: the model knows 10, from 0"),
        ([*query, "--against", "7"], "--against needs the --concept"),
        ([*query[:2], "--ids", "x", "--concept", "3"], "--ids are answered from stored sketches, which were measured"),
        ([*query[:2], str(tmp_path / "s"), "--concept", "3"], "were measured without a concept"),
    ):
        assert main(wrong) == 1
        assert why in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_prompt_is_asked_about_for_image_files_by_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "model")
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model")
    train = [(image.tanh(), "a cat") for image in random_images(4).repeat(1, 3, 2, 2)]
    index, query, checkpoints, file = asked_by_command(tmp_path, task, train, 16, 3)
    for given, concept in (
        (["--concept", "a dog"], rs.Concept("a dog")),
        (["--concept", "a dog", "--against", "a cat"], rs.Concept("a dog", against="a cat")),
    ):
        check_asked(index, [*query, *given], rs.Samples(file, task, checkpoints, concept=concept), capsys)
    place = query.index("--model") + 1
    alone = [*query[:place], str(tmp_path / "model" / "unet"), *query[place + 1 :], "--concept", "a dog"]
    assert main(alone) == 1
    assert "no prompts, without a text encoder" in capsys.readouterr().err


def test_copies_are_folded_and_queries_asked_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, queries = rs.open_index(folder / "i"), rs.open_store(folder / "q")
    capsys.readouterr()
    assert main(["query", str(folder / "i"), str(folder / "q"), "-k", "2", "--json", "--fold-copies", "0.3"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(index.query(queries, 2, duplicates=0.3).to_json())
    asked = ["query", str(folder / "i"), str(folder / "q"), "--group-by", "artist", "--together", "--fold-copies"]
    assert main(asked) == 0
    expected = index.query(queries, 10, group_by="artist", together=True, duplicates="fold")
    assert str(expected) in capsys.readouterr().out
    assert main(["query", str(folder / "i"), str(folder / "q"), "--fold-copies", "much"]) == 1
    assert "--fold-copies much: give a likeness in 0 .. 1" in capsys.readouterr().err


def test_wrong_questions_are_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [[], [str(folder / "q"), "--ids", "3"], [str(folder / "q"), "--out", "a.txt"], ["--ids", "99"]]
    for arguments in wrong:
        assert main(["query", str(folder / "i"), *arguments]) == 1
    assert len(capsys.readouterr().err.splitlines()) == len(wrong)
    with pytest.raises(ValueError, match="is no image and holds none"):
        ImageFiles([str(folder)], 3)
    with pytest.raises(ValueError, match="takes 4 channels"):
        ImageFiles([str(folder)], 4)
    assert torch.is_grad_enabled()
