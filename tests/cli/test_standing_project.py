"""A project that is sketched already: asked by files, checked, and its indexes built again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.cli.measured import names_of
from retrac_scale.cli.project import FILE, find
from retrac_scale.datasets import ImageFiles
from tests.conftest import tiny_unet

BOTH = "mse,mean_squared_output"


def draw(file: Path, seed: int) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).save(file)


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine training images, three to ask about, white grounds, two measures."""
    folder = tmp_path_factory.mktemp("standing")
    for number in range(9):
        draw(folder / "train" / f"{number}.png", number)
    for number in range(3):
        draw(folder / "gen" / f"q{number}.png", 20 + number)
    tiny_unet().save_pretrained(folder / "model" / "unet")  # type: ignore[operator]
    DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / "model" / "scheduler")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = ["--model", "model", "--images", "train", "--query-images", "gen", "--background", "white"]
        assert (
            main(["init", *given, "--timesteps", "2", "--dim", "64", "--rank", "0", "--size", "8", "--measure", "mse"])
            == 0
        )
        for measure in ("mse", BOTH):
            assert main(["sketch", "--measure", measure]) == 0
        assert main(["index"]) == 0
    return folder


@pytest.fixture
def folder(sketched: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(sketched)
    return sketched


def test_an_index_of_another_measure_leaves_the_estimators_own_place_free(folder: Path) -> None:
    given = ["--measure", "mean_squared_output"]
    assert main(["index", "--estimator", "GradDot", *given]) == 0
    assert rs.open_index("attribution/graddot-mean_squared_output.zarr").meta["measure"] == given[1]
    for estimator, measure in (("GradDot", "mse"), ("DTRAK", given[1])):
        assert main(["index", "--estimator", estimator, "--measure", measure]) == 0
        assert main(["index", "--estimator", estimator]) == 0  # the same one
        assert rs.open_index(f"attribution/{estimator.lower()}.zarr").meta["measure"] == measure


def test_indexes_beside_those_of_the_file_are_refreshed_with_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trak = "attribution/trak-mse-mean_squared_output.zarr"
    given = ["--estimator", "trak", "--measure", BOTH, "--pairing", "matched", "--dtype", "float32"]
    assert main(["index", *given]) == 0
    before = rs.open_index(trak)
    draw(folder / "train" / "z.png", 9)
    assert main(["sketch"]) == 0
    query = ["query", trak, "attribution/queries.zarr", "-k", "1"]
    capsys.readouterr()
    assert main(query) == 1
    assert "build the index again by `retrac-scale index`, outside of a project" in capsys.readouterr().err
    assert main(["index"]) == 0
    assert f"{trak} stays as it was: run `retrac-scale sketch --measure {BOTH}` first" in capsys.readouterr().out
    assert main(["sketch", "--measure", BOTH]) == 0
    assert main(["index"]) == 0
    assert f"TRAK ({trak}): 10 samples in {trak}" in capsys.readouterr().out
    assert main(query) == 0
    now = rs.open_index(trak)
    assert (now.estimator, now.meta["dtype"], now.meta["measure"]) == (before.estimator, "float32", BOTH.split(","))


def test_what_measures_images_is_refused_of_stored_sketches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, why in (
        (["--ids", "3"], "--ids are answered from stored sketches"),
        (["attribution/retracridge.zarr", "attribution/queries.zarr"], "queries.zarr holds sketches of whole images"),
        ([], "queries.zarr holds sketches of whole images"),
    ):
        for option in ("--model nowhere", "--checkpoint a=b", "--timesteps 9", "--device tpu", "--size 9"):
            assert main(["query", *asked, *option.split()]) == 1
            told = capsys.readouterr().err
            assert why in told
            assert f"so that {option.split()[0]} changes nothing" in told


def test_the_advice_of_query_names_no_option_that_it_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries, away = Path("attribution/queries.zarr"), Path("queries.away")
    queries.rename(away)
    for verb, how in (("query", "by query INDEX STORE, or"), ("report", "by --queries STORE, or")):
        assert main([verb]) == 1
        assert how in capsys.readouterr().err
    away.rename(queries)


def test_pictures_alone_are_asked_of_the_projects_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (["attribution/retracridge.zarr", "gen"], ["gen"], ["gen/q0.png", "gen/q1.png", "gen/q2.png"])
    answers = []
    for given in asked:
        capsys.readouterr()
        assert main(["query", *given, "-k", "2", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["results"][0]["query"] == "gen/q0.png"
    assert answers == [answers[0]] * 3
    assert main(["query", "gen/none.png"]) == 1
    assert "there is no file or folder gen/none.png" in capsys.readouterr().err


def test_image_files_are_read_as_those_of_the_project_that_an_index_belongs_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (12, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "clear.png")
    index = folder / "attribution" / "retracridge.zarr"
    task = rs.DiffusionTask(tiny_unet(), DDPMScheduler(num_train_timesteps=50))
    file = ImageFiles([tmp_path / "clear.png"], channels=1, size=8)

    def answered(*given: str) -> tuple[list[float], str]:
        capsys.readouterr()
        query = ["query", str(index), str(tmp_path / "clear.png"), "-k", "9", *given]
        assert main([*query, "--json"]) == 0, capsys.readouterr().err
        scores: list[float] = json.loads(capsys.readouterr().out)["results"][0]["scores"]
        assert main(query) == 0
        return scores, capsys.readouterr().out

    def expected(background: str) -> list[float]:
        file.background = background
        samples = rs.Samples(file, task, {"final": str(folder / "model" / "unet")})
        scores: list[float] = json.loads(rs.open_index(index).query(samples, 9).to_json())["results"][0]["scores"]
        return scores

    white, dropped = expected("white"), expected("")
    assert white[0] != pytest.approx(dropped[0], rel=1e-3)
    monkeypatch.chdir(tmp_path)
    for given in ((), ("--config", str(folder / FILE)), ("--size", "8")):
        scores, told = answered(*given)
        np.testing.assert_allclose(scores, white, rtol=1e-4)
        assert "transparent" not in told
    scores, told = answered("--background", "")
    np.testing.assert_allclose(scores, dropped, rtol=1e-4)
    assert f"note: {tmp_path / 'clear.png'} is transparent, which is dropped; --background" in told


def test_one_folder_by_any_spelling_holds_the_same_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: rs.open_store(f"attribution/{name}.zarr").ids.tolist() for name in ("sketches", "queries")}
    for train, gen in ((str(folder / "train"), str(folder / "gen")), ("gen/../train", "./train/../gen/")):
        assert main(["sketch", "--images", train, "--query-images", gen]) == 0, capsys.readouterr().err
    for name, ids in before.items():
        assert rs.open_store(f"attribution/{name}.zarr").ids.tolist() == ids
    given = find(None), "gen/../train", ["gen/../train/0.png", "gen/../train/1.png"]
    assert names_of(*given, "nowhere.zarr") == ["train/0.png", "train/1.png"]
    for held in (str(folder / "train" / "0.png"), "./model/../train/0.png"):  # as stores were begun before
        rs.write_store(tmp_path / "s.zarr", {"c": np.ones((1, 1, 8))}, ids=[held])
        new = str(folder / "train" / "1.png") if held.startswith("/") else "train/1.png"
        assert names_of(*given, str(tmp_path / "s.zarr")) == [held, new]
        shutil.rmtree(tmp_path / "s.zarr")


def test_queries_whose_pictures_are_gone_are_left_out_and_forgotten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "gen" / "q0.png").rename("away.png")
    left_out = "note: 1 of 3 pictures that were asked about are gone, such as gen/q0.png, and left out"
    assert main(["query", "-k", "1"]) == 0
    told = capsys.readouterr().out
    assert left_out in told
    assert "query gen/q1.png" in told
    assert "query gen/q0.png" not in told
    assert main(["report", "-k", "1"]) == 0
    assert left_out in capsys.readouterr().out
    assert "q0.png" not in Path("attribution/report.html").read_text()
    before = rs.open_store("attribution/sketches.zarr").revision
    shutil.copytree("gen", "other")
    for option, kept, missing in (([], "gen", "gen/q0.png"), (["--query-images", "other"], "other", "gen/q1.png")):
        assert main(["sketch", *option]) == 0
        assert f"that were asked about are not in {kept}, such as {missing}" in capsys.readouterr().out
        assert rs.open_store("attribution/queries.zarr").ids.tolist() == [f"{kept}/q1.png", f"{kept}/q2.png"]
    assert rs.open_store("attribution/sketches.zarr").revision == before
    Path("away.png").rename("gen/q0.png")
    assert main(["sketch"]) == 0


def test_check_asks_about_the_images_and_the_weights_that_are_there_now(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def checked() -> str:
        capsys.readouterr()
        assert main(["check"]) in (0, 1)  # of nine random pictures nobody knows
        said = capsys.readouterr()
        return said.out + said.err

    assert "note" not in checked()
    written = rs.open_store("attribution/check.zarr").revision
    assert "note" not in checked()
    assert rs.open_store("attribution/check.zarr").revision == written  # nothing was sketched again
    shutil.copy("train/4.png", "was.png")
    draw(folder / "train" / "4.png", 99)
    told = checked()
    assert "plain 8 of 9" in told
    assert "note: 1 of them are others than when they were sketched, such as train/4.png: asked as they are" in told
    shutil.copy("was.png", "train/4.png")
    assert main(["sketch"]) == 0  # of the store's own images nothing changed
    assert "plain 9 of 9" in checked()
    weights = Path("model/unet/diffusion_pytorch_model.safetensors")
    kept = weights.read_bytes()
    tiny_unet(seed=1).save_pretrained("model/unet")  # type: ignore[operator]
    assert "model/unet holds other weights than those that checkpoint final of attribution/sketches.zarr" in checked()
    Path("train").rename("gone")
    assert "model/unet holds other weights" in checked()
    weights.write_bytes(kept)
    gone = "note: the sketches of before were asked, for what they were made of is not there: there is no "
    assert f"{gone}file or folder train" in checked()
    shutil.copytree("gone", "train", ignore=lambda *_: ["4.png"])
    assert f"{gone}'train/4.png' among the images" in checked()
    shutil.rmtree("train")
    Path("model").rename("away")
    assert f"{gone}folder model" in checked()
    for here, place in (("gone", "train"), ("away", "model")):
        Path(here).rename(place)
