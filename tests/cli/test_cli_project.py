"""From a model in diffusers layout and folders of images to a report in three commands; and what can go wrong."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler, UNet2DModel
from distributed import LocalCluster
from PIL import Image

import retrac_scale as rs
from retrac_scale import planner
from retrac_scale.cli import check, main
from retrac_scale.cli.indexes import open_indexes
from retrac_scale.cli.measured import measured_like
from retrac_scale.cli.project import FILE, Project, find
from retrac_scale.query.question import Question
from retrac_scale.report import Pictures
from retrac_scale.report.pictures import PictureFiles
from retrac_scale.serve.library import Library
from retrac_scale.serve.limits import Limits
from retrac_scale.serve.uploads import read_upload
from retrac_scale.store.part import plans_of
from tests.conftest import tiny_unet
from tests.served import uploaded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder, training images, generated images."""
    folder = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for name, count in (("training-images", 9), ("generated-images", 2)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    model = tiny_unet()
    assert isinstance(model, UNet2DModel)
    model.save_pretrained(folder / "model" / "unet")
    DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / "model" / "scheduler")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(planner, "CALIBRATION_SECONDS", 0.1)
    monkeypatch.setattr(check, "OFTEN", 4)
    return tmp_path


INIT = ["init", "--model", "model", "--images", "training-images", "--query-images", "generated-images"]
BRIEF = ["--timesteps", "2", "--dim", "64", "--rank", "0"]
SMALL = [*BRIEF, "--measure", "mse"]
BOTH = ["mse", "mean_squared_output"]
"""What is measured unless somebody says otherwise."""


def test_three_commands_lead_from_folders_to_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*INIT, *BRIEF]) == 0
    told = capsys.readouterr().out
    assert "training-images: 9 images of 8 x 8" in told
    assert main(["sketch", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("check")["ReTracRidge"]["first"]["plain"] == {"first": 9, "of": 9}
    assert told == {
        "store": "attribution/sketches.zarr",
        "samples": 9,
        "queries": "attribution/queries.zarr",
        "query_samples": 2,
    }
    assert main(["report", "-k", "3"]) == 0
    page = (folder / "attribution" / "report.html").read_text()
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)
    found = json.loads(content)
    queries = rs.open_store("attribution/queries.zarr", measure=BOTH)
    expected = rs.open_index("attribution/retracridge.zarr").query(queries, 3)
    shown = [[result["id"] for result in query["lists"]["ReTracRidge"]["proponents"]] for query in found["queries"]]
    assert shown == expected.ids.tolist()
    store = rs.open_store("attribution/sketches.zarr")
    assert store.fingerprint["scheduler"]["num_train_timesteps"] == 50
    assert store.ids.tolist() == [f"training-images/{number}.png" for number in range(9)]
    # the other verbs need no more either
    capsys.readouterr()
    assert main(["query", "-k", "2", "--json"]) == 0
    assert [row["ids"] for row in json.loads(capsys.readouterr().out)["results"]] == expected.ids[:, :2].tolist()
    assert main(["query", "attribution/retracridge.zarr", "generated-images", "-k", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["ids"] for row in rows] == expected.ids[:, :1].tolist()
    np.testing.assert_allclose([row["scores"] for row in rows], expected.scores[:, :1], rtol=0.02)  # queries in int8
    for verb in ("info", "verify", "index"):
        assert main([verb, "--json"]) == 0
    for line in capsys.readouterr().out.splitlines():
        json.loads(line)


def test_ids_and_pictures_do_not_depend_on_where_a_command_is_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*INIT, *SMALL]) == 0
    assert main(["sketch"]) == 0
    commit = folder / "attribution" / "sketches.zarr" / "final" / "commit"
    written = {file: file.stat().st_mtime_ns for file in commit.rglob("*")}
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    for config in (Path(folder.name, FILE), folder / FILE):
        assert main(["sketch", "--config", str(config)]) == 0, capsys.readouterr().err
        assert main(["report", "--config", str(config), "-k", "2"]) == 0, capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in commit.rglob("*")} == written
    shutil.rmtree(folder / "attribution")  # and the other way about
    assert main(["sketch", "--config", f"{folder.name}/{FILE}"]) == 0
    assert rs.open_store(folder / "attribution" / "sketches.zarr").ids[0] == "training-images/0.png"
    monkeypatch.chdir(folder)
    assert main(["sketch"]) == 0
    assert main(["report", "-k", "2"]) == 0


def test_training_images_are_sketched_by_workers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*INIT, *SMALL]) == 0
    assert main(["sketch", "--out", "alone"]) == 0
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster:
        assert main(["sketch", "--workers", cluster.scheduler_address]) == 0
    assert "check of ReTracRidge: originals that come first: plain 9 of 9" in capsys.readouterr().out
    for name in ("sketches", "queries"):
        alone, spread = (rs.open_store(f"{out}/{name}.zarr") for out in ("alone", "attribution"))
        np.testing.assert_array_equal(alone.sketches("final"), spread.sketches("final"))
    assert main(["sketch", "--workers", "2", "--device", "cuda"]) == 1
    assert "--workers 2 would share one cuda; start a worker for each" in capsys.readouterr().err


def test_absolute_paths_stay_the_ids_from_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ["--images", str(folder / "training-images"), "--query-images", str(folder / "generated-images")]
    assert main(["init", "--model", "model", *images, *SMALL]) == 0
    assert main(["sketch"]) == 0
    monkeypatch.chdir("/")
    assert main(["sketch", "--config", str(folder / FILE)]) == 0
    assert main(["report", "--config", str(folder / FILE), "-k", "2"]) == 0
    store = rs.open_store(folder / "attribution" / "sketches.zarr")
    assert store.ids[0] == str(folder / "training-images" / "0.png")


def test_an_option_overrules_the_file(folder: Path) -> None:
    assert main([*INIT, *SMALL]) == 0
    assert main(["sketch", "--out", "elsewhere", "--checkpoint", "a=model/unet", "--query-images", ""]) == 0
    store = rs.open_store("elsewhere/sketches.zarr")
    assert store.checkpoints == ["a"]
    assert store.shape == (9, 2, 64)
    assert not Path("elsewhere/queries.zarr").exists()


def test_the_recipe_of_a_new_project_is_the_recommended_one(folder: Path) -> None:
    assert main(INIT) == 0
    text = Path(FILE).read_text()
    for line in (
        "timesteps = 4",
        'noise = "common"',
        "dim = 512",
        'measure = "mse,mean_squared_output"',
        'estimators = ["ReTracRidge"]',
        "TracIn and ReTrac",
        "RenormIF, TRAK; DTRAK and DAS",
    ):
        assert line in text
    found = find(None)
    assert (found.timesteps, found.noise, found.rank, found.dim) == (4, "common", -1, 512)
    assert main([*INIT, "--noise", "own", "--force"]) == 0
    assert (find(None).noise, find(None).measure, find(None).estimators) == ("own", "mse", ("TracIn", "ReTrac"))
    assert main([*INIT, "--noise", "own", "--measure", "l1", "--force"]) == 0
    assert find(None).measure == "l1"
    assert (found.estimators, found.stated) == (("ReTracRidge",), frozenset(found.__dict__) - {"folder", "stated"})


OLD = """model = "model"
images = "training-images"
query_images = "generated-images"
out = "attribution"
timesteps = 2
rank = 0
dim = 64
measure = "mse"
device = "cpu"
estimators = ["TracIn", "ReTrac"]
"""


def test_a_store_that_is_there_goes_on_as_it_began(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(FILE).write_text(OLD + 'noise = "own"\n')
    assert main(["sketch"]) == 0
    before = rs.open_store("attribution/sketches.zarr").sketches("final")
    for text in (OLD, "\n".join(line for line in OLD.splitlines() if line[:4] not in ("time", "rank", "dim "))):
        Path(FILE).write_text(text)  # as files were before they said whose the noise is; and one that says less
        assert main(["sketch"]) == 0
        store = rs.open_store("attribution/sketches.zarr")
        assert plans_of(store.fingerprint) == [{"kind": "EvenlySpaced", "count": 2, "draws": 1}]
        np.testing.assert_array_equal(store.sketches("final"), before)
    assert main(["index"]) == 0
    assert rs.open_index("attribution/tracin.zarr").estimator == rs.TracIn()
    Path(FILE).write_text("\n".join(OLD.splitlines()[:4]))
    assert main(["query", "-k", "2"]) == 0  # the estimator that suits its noise
    capsys.readouterr()
    for option, why in (
        (["--timesteps", "4"], "was sketched with timesteps = 2, but"),
        (["--noise", "common"], "was sketched with noise = 'own', but"),
        (["--dim", "512"], "was sketched with dim = 64, but"),
        (["--rank", "-1"], "was sketched with rank = 0, but"),
    ):
        assert main(["sketch", *option]) == 1
        told = capsys.readouterr().err
        assert f"attribution/sketches.zarr {why} {FILE} or an option says" in told
        assert "begin another store with another out (--out)" in told
    assert main(["sketch", "--noise", "common", "--out", "another"]) == 0
    assert plans_of(rs.open_store("another/sketches.zarr").fingerprint)[0]["noise"] == "common"


def test_images_that_were_changed_are_never_shown_beside_old_scores(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*INIT, *SMALL]) == 0
    assert main(["sketch"]) == 0
    assert main(["report", "-k", "2"]) == 0
    rng = np.random.default_rng(9)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(f"generated-images/{number}.png")
    capsys.readouterr()
    for verb, name in (("report", "generated-images/0.png"), ("query", "generated-images/0.png"), ("sketch", "2 of 2")):
        assert main([verb]) == 1
        told = capsys.readouterr().err
        assert name in told
        assert "--replace" in told
    assert main(["sketch", "--replace"]) == 0
    assert main(["query", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert main(["query", "attribution/retracridge.zarr", "generated-images", "--json"]) == 0
    anew = json.loads(capsys.readouterr().out)["results"]
    assert [row["ids"][:3] for row in stored] == [row["ids"][:3] for row in anew]
    assert main(["report", "-k", "2"]) == 0
    with Image.open("training-images/4.png") as picture:
        retouched = picture.copy()
    retouched.putpixel((2, 3), 255 - retouched.getpixel((2, 3)) // 2)  # type: ignore[operator]
    retouched.save("training-images/4.png")
    assert main(["report", "-k", "9"]) == 1
    assert "training-images/4.png" in capsys.readouterr().err
    assert main(["sketch", "--replace"]) == 0
    assert main(["report", "-k", "9"]) == 0


def test_a_store_that_was_given_its_sketches_is_no_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rs.write_store("attribution/sketches.zarr", {"final": np.ones((9, 1, 64))})
    assert main([*INIT, *SMALL]) == 0
    assert main(["sketch"]) == 1
    assert "was not measured by a command" in capsys.readouterr().err


def test_until_measures_again_and_queries_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*INIT, *BRIEF]) == 0
    assert main(["sketch"]) == 0
    assert main(["report", "-k", "2"]) == 0
    capsys.readouterr()
    assert main(["sketch", "--until", "0.99999", "--at-most", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    store, queries = (rs.open_store(f"attribution/{name}.zarr") for name in ("sketches", "queries"))
    assert store.shape[1] == queries.shape[1] == 4
    assert plans_of(queries.fingerprint) == plans_of(store.fingerprint)
    overlap = rs.repeatability(rs.open_store(store.url, measure=BOTH)).overlap.value
    assert (told["repeatability"]["overlap"]["value"], told["reached"]) == (overlap, overlap >= 0.99999)
    assert main(["query", "-k", "2"]) == 0  # of an index of the grown store
    assert main(["sketch"]) == 0
    assert rs.open_store("attribution/sketches.zarr").shape[1] == 4
    assert main(["sketch", "--at-most", "4"]) == 1
    assert "--at-most is the budget of --until" in capsys.readouterr().err


def test_new_training_images_are_added_and_those_that_are_gone_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--model", "model", "--images", "training-images", *SMALL]) == 0
    assert main(["sketch"]) == 0
    before = rs.open_store("attribution/sketches.zarr").sketches("final")
    for name in ("0a.png", "z.png"):  # one of them amid the others
        shutil.copyfile("generated-images/0.png", f"training-images/{name}")
    capsys.readouterr()
    assert main(["sketch"]) == 0
    assert "11 images at 2 timesteps" in (told := capsys.readouterr().out)
    assert "2 of them, such as training-images/0a.png, came since" in told
    store = rs.open_store("attribution/sketches.zarr")
    assert store.ids.tolist()[9:] == ["training-images/0a.png", "training-images/z.png"]
    np.testing.assert_array_equal(store.sketches("final")[:9], before)
    assert main(["query", "--ids", "z", "-k", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["ids"] == ["training-images/0a.png"]
    Path("training-images/3.png").unlink()
    assert main(["sketch"]) == 1
    told = "1 images that were sketched are not in training-images, such as training-images/3.png: put them back"
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_what_d_trak_and_das_differentiate_is_measured_when_the_file_names_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*INIT, *SMALL]) == 0
    assert main(["sketch"]) == 0
    commits = {file: file.stat().st_mtime_ns for file in Path("attribution/sketches.zarr/final/commit").rglob("*")}
    assert main(["index", "--estimator", "dtrak"]) == 1
    told = "name DTRAK among the estimators of retrac-scale.toml and run `retrac-scale sketch`"
    assert told in capsys.readouterr().err
    Path(FILE).write_text(Path(FILE).read_text().replace('["ReTracRidge"]', '["ReTracRidge", "dtrak", "DAS"]'))
    assert main(["sketch", "--json"]) == 0
    assert {"ReTracRidge", "DTRAK", "DAS"} == set(json.loads(capsys.readouterr().out.splitlines()[-1])["check"])
    assert {file: file.stat().st_mtime_ns for file in commits} == commits
    measures = ["mse", "mean_squared_output", "mean_output"]
    stores = {name: rs.open_store(f"attribution/{name}.zarr").measurements for name in ("sketches", "queries", "check")}
    assert stores == dict.fromkeys(stores, measures)
    both = "attribution/retracridge-mse-mean_squared_output.zarr"
    assert main(["index", "--estimator", "retracridge", "--measure", "mse,mean_squared_output"]) == 0
    assert rs.open_index(both).meta["measure"] == measures[:2]
    assert main(["query", both, "attribution/queries.zarr", "-k", "2"]) == 0
    assert main(["report", "-k", "2"]) == 0
    sides = [rs.open_store(f"attribution/{name}.zarr", measure=measures[1]) for name in ("sketches", "queries")]
    expected = rs.build_index(sides[0], rs.DTRAK(pairing="matched")).query(sides[1], 2)
    for asked in ("attribution/queries.zarr", "generated-images"):
        capsys.readouterr()
        assert main(["query", "attribution/dtrak.zarr", asked, "-k", "2", "--json"]) == 0
        assert [row["ids"] for row in json.loads(capsys.readouterr().out)["results"]] == expected.ids.tolist()
    indexes = open_indexes([], find(None))
    measured = measured_like(indexes["ReTracRidge"], "model/unet", {"final": "model/unet"}, None, "cpu")
    pictures = Pictures(PictureFiles(sides[0].ids.tolist()), sides[0].ids, [])
    library = Library(indexes, pictures, measured=measured)
    upload = read_upload(Path("generated-images/0.png").read_bytes(), library.image_shape, Limits())
    (served,) = library.ask("DTRAK", [uploaded(library, upload)], [Question(2, "proponents", None, None, "sum", False)])
    assert served.ids.tolist() == expected.ids[:1].tolist()  # type: ignore[union-attr]
    alone = planner.store_size(9, 2, 1, 64, ids=sides[0].ids, columns=sides[0].columns)
    capsys.readouterr()
    assert main(["plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store_bytes"] == 3 * alone.array_bytes


def test_the_loss_and_the_output_are_added_up_once_the_file_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*INIT, *SMALL]) == 0
    assert main(["sketch"]) == 0
    assert main(["plan", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    Path(FILE).write_text(Path(FILE).read_text().replace('measure = "mse"', 'measure = "mse,mean_squared_output"'))
    assert main(["report"]) == 1
    assert "was not measured by mean_squared_output yet" in capsys.readouterr().err
    assert main(["sketch", "--until", "0.01"]) == 0
    assert "9 images at 2 timesteps, 2 measures in attribution/sketches.zarr, 2.3 kB" in capsys.readouterr().out
    assert main(["query", "-k", "3", "--json"]) == 0
    sides = [rs.open_store(f"attribution/{name}.zarr", measure=BOTH) for name in ("sketches", "queries")]
    expected = rs.build_index(sides[0], rs.ReTracRidge()).query(sides[1], 3)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [row["ids"] for row in found] == expected.ids.tolist()
    assert main(["plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = ("store_bytes", "index_bytes")
    assert [planned[name] for name in sizes] == [2 * alone["store_bytes"], planner.index_bytes(9, 1, 64, 4, ridge=True)]
    # the index of the loss alone has the estimator's own place, and keeps it
    assert main(["info", "attribution/retracridge-mse-mean_squared_output.zarr"]) == 0
    assert "sketches.zarr, measured by mse and mean_squared_output" in capsys.readouterr().out
    assert main(["plan", "--repeatability", "0.01", "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (again["timesteps"], again["store_bytes"]) == (2, planned["store_bytes"])
    Path(FILE).write_text(Path(FILE).read_text().replace('["ReTracRidge"]', '["ReTracRidge", "TracIn", "DTRAK"]'))
    assert main(["index", "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])["indexes"]
    assert {name: rs.open_index(place).meta["measure"] for name, place in made.items()} == {
        "ReTracRidge": BOTH,
        "TracIn": "mse",
        "DTRAK": "mean_squared_output",
        "ReTracRidge (attribution/retracridge.zarr)": "mse",  # as it was before
    }


def test_a_file_that_states_no_measure_takes_what_its_store_has(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for measure, held in (("mse", "mse"), ("l1", "l1"), ("mse,mean_squared_output", BOTH)):
        out = measure.replace(",", "-")
        text = OLD.replace("attribution", out).replace('measure = "mse"', f'measure = "{measure}"')
        Path(FILE).write_text(text.replace('["TracIn", "ReTrac"]', '["ReTracRidge"]'))
        assert main(["sketch"]) == 0
        Path(FILE).write_text("\n".join(OLD.replace("attribution", out).splitlines()[:4]))
        assert main(["sketch"]) == 0
        assert main(["index", "--json"]) == 0
        places = json.loads(capsys.readouterr().out.splitlines()[-1])["indexes"]
        assert places == {"ReTracRidge": f"{out}/retracridge.zarr"}
        assert rs.open_index(places["ReTracRidge"]).meta["measure"] == held
        assert rs.open_store(f"{out}/sketches.zarr").measurements == measure.split(",")
    # beside that of both stands one of either
    assert main(["index", "--estimator", "retracridge", "--measure", "mse", "--json"]) == 0
    place = json.loads(capsys.readouterr().out.splitlines()[-1])["indexes"]["ReTracRidge"]
    assert place == f"{out}/retracridge-mse.zarr"


def test_plan_counts_the_recipe_of_the_project(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--samples", "1000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["store_bytes"] == 2 * planner.store_size(1000, 4, 1, 512).array_bytes
    assert found["index_bytes"] == planner.index_bytes(1000, 1, 512, 8, ridge=True)
    assert main(["plan", "--samples", "1000", "--measure", "mse", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store_bytes"] == planner.store_size(1000, 4, 1, 512).array_bytes
    Path(FILE).write_text(OLD)
    assert main(["plan", "--model", "model/unet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["index_bytes"] == 2 * planner.index_bytes(9, 1, 64)
    assert found["sketch_seconds"] > 0


def test_init_writes_what_find_reads(tmp_path: Path) -> None:
    hostile = 'a "quoted" \\ back\tslash é'
    project = Project(
        hostile,
        "b",
        "c",
        "d",
        {"early one": hostile},
        "recorded",
        "own",
        0,
        7,
        "l1",
        "record",
        "white",
        "caption",
        256,
        "cpu",
        ("ReTrac",),
        str(tmp_path),
    )
    (tmp_path / FILE).write_text(project.dumps(), encoding="utf-8")
    assert find(str(tmp_path / FILE)) == project


def test_init_asks_for_what_it_is_not_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("training-images\n\nresults\n"))
    assert main(["init", "--model", "model"]) == 0
    assert find(None) == Project("model", "training-images", "", "results")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model = ", "is no TOML"),
        ("modle = 'x'", "unknown entry 'modle'"),
        ("noise = 4", "noise must be like 'common', got 4"),
        ("model = 'model'\nimages = 'training-images'\nnoise = 'shared'", "noise must be one of ('common', 'own')"),
        ("rank = '16'", "rank must be like -1, got '16'"),
        ("rank = true", "rank must be like -1, got True"),
        ("checkpoints = ['a']", "checkpoints must be like {}"),
        ("estimators = [1]", "estimators must be like"),
        ("estimators = []", "names no estimator"),
        ("background = 'whit'", "retrac-scale.toml: background: give a colour such as white or #808080, not 'whit'"),
        (
            "model = 'model'\nimages = 'training-images'\ndevice = 'cudas'",
            "device is 'cudas', by retrac-scale.toml or --device, and torch has none such here: ",
        ),
        ("images = 'i'", "give --model, or run `retrac-scale init` first"),
        ("model = 'training-images'\nimages = 'training-images'", "no diffusers model"),
        ("model = 'model/unet'\nimages = 'model'", "no image and holds none"),
        (
            "model = 'model'\nimages = 'training-images'\nmeasure = 'l3'",
            "measure must be Huber(), PseudoHuber() or one of",
        ),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    Path(FILE).write_text(text)
    assert main(["sketch"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line


def test_images_that_do_not_fit_the_model_are_named_by_init(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (folder / "training-images").iterdir():
        Image.new("L", (9, 8)).save(file)
    assert main(INIT) == 1
    assert "0.png is 9 x 8, the model takes 8 x 8" in capsys.readouterr().err
    assert not Path(FILE).exists()


def test_init_and_reports_see_a_photograph_upright(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by 90 degrees
    lying = np.arange(9 * 8, dtype=np.uint8).reshape(8, 9)
    for file in (folder / "training-images").iterdir():
        Image.fromarray(lying).save(file, exif=turned)
    assert main(INIT) == 1
    assert "0.png is 8 x 9, the model takes 8 x 8" in capsys.readouterr().err
    shown = PictureFiles([str(next((folder / "training-images").iterdir()))])[0]
    np.testing.assert_array_equal(shown[..., 0], np.rot90(lying, -1))


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [("model/unet/config.json", "{", "config.json is no JSON"), ("model", "a file", "model is a file")],
)
def test_a_model_that_is_none_is_named_by_init(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, why: str
) -> None:
    if file == "model":
        shutil.rmtree(file)
    Path(file).write_text(text)
    assert main(INIT) == 1
    assert why in capsys.readouterr().err
    assert not Path(FILE).exists()


def test_an_empty_output_folder_is_the_files_own() -> None:
    assert Project(out="").store == "sketches.zarr"
    assert Project(out="/").store == "/sketches.zarr"
    assert Project(out="s3://bucket/run/").store == "s3://bucket/run/sketches.zarr"
    assert Project(out="", folder="there").store == "there/sketches.zarr"


def test_init_keeps_a_file_that_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(FILE).write_text("# mine\n")
    assert main(INIT) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*INIT, "--force"]) == 0


def test_errors_are_json_when_asked_and_tracebacks_only_with_debug(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["info", str(tmp_path / "nothing")]
    assert main([*wrong, "--json"]) == 1
    assert "there is no store" in json.loads(capsys.readouterr().err)["error"]
    with pytest.raises(FileNotFoundError):
        main([*wrong, "--debug"])
    with pytest.raises(SystemExit) as stop:
        main(["inform"])
    assert stop.value.code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_its_shell_accepts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--group-by" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def recorded_run(folder: Path, samples: Any) -> None:
    """A training of four steps, each of all nine images, with a checkpoint after the second and the last."""
    recorder = rs.TrainingRecorder(folder / "run" / "record", samples, DDPMScheduler(num_train_timesteps=50))
    ids = np.arange(9) if isinstance(samples, int) else np.array(samples.ids)
    for step in range(4):
        recorder.step(ids, np.arange(9) + step, step, 0.5)
        if step % 2:
            recorder.checkpoint(f"checkpoint-{step + 1}")
            shutil.copytree(folder / "model" / "unet", folder / "run" / f"checkpoint-{step + 1}" / "unet")
    shutil.copytree(folder / "model", folder / "run" / "model")


RECORDED = ["init", "--model", "run/model", "--images", "training-images", "--query-images", "generated-images"]


def test_a_recorded_training_is_found_and_measured_where_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded_run(folder, 9)
    assert main(RECORDED) == 0
    told = capsys.readouterr().out
    assert "record: run/record; --timesteps recorded measures where it says" in told
    assert "checkpoints: 2 in run, checkpoint-2, checkpoint-4; the weights of each step of all" in told
    assert main([*RECORDED, "--timesteps", "recorded", "--dim", "64", "--rank", "0", "--force"]) == 0
    told = capsys.readouterr().out
    assert "of 9 samples, by their places, taken as the order of the files: 0 is training-images/0.png" in told
    project = find(None)
    assert (project.timesteps, project.record, project.estimators) == ("recorded", "run/record", ("TracIn", "ReTrac"))
    assert list(project.checkpoints) == ["checkpoint-2", "checkpoint-4"]
    assert main(["sketch"]) == 0
    store = rs.open_store("attribution/sketches.zarr")
    assert store.ids.tolist() == list(range(9))  # by which the noise of the training was drawn
    assert store.columns["path"].tolist() == [f"training-images/{number}.png" for number in range(9)]
    assert store.timesteps("checkpoint-4")[:, 0].tolist() == [number + 3 for number in range(9)]
    assert store.weights == {"checkpoint-2": 1.0, "checkpoint-4": 1.0}  # two steps of rate 0.5 over all samples
    capsys.readouterr()
    assert main(["report", "-k", "2"]) == 0, capsys.readouterr().err
    assert main(["query", "-k", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1]


def test_a_record_of_other_samples_is_told_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Named:
        ids = tuple(f"{number}.png" for number in range(9))

        def __len__(self) -> int:
            return 9

        def __getitem__(self, row: int) -> int:
            return row

    recorded_run(folder, Named())
    given = [*RECORDED, "--timesteps", "recorded"]
    assert main(given) == 0  # the ends of the paths
    (folder / "training-images" / "8.png").rename(folder / "training-images" / "other.png")
    assert main([*given, "--force"]) == 1
    told = capsys.readouterr().err
    assert "names samples such as '0.png', and none of them is 'training-images/other.png'" in told
    assert main([*given, "--force", "--record", "nowhere"]) == 1
    assert "recorded timesteps need the training record, and nowhere holds none" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["missing", "./missing", "model/other", "/nowhere/model"])
def test_a_model_that_is_not_there_is_told_without_asking_the_hub(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("diffusers.AutoModel.load_config", lambda *a, **k: pytest.fail("asked the hub"))
    for verb in ("init", "sketch"):
        assert main([verb, "--model", place, "--images", "training-images"]) == 1
        assert f"there is no folder {place}, and no model on the hub is called so" in capsys.readouterr().err


def test_images_to_ask_about_are_looked_at_before_the_long_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*INIT, *SMALL]) == 0
    Image.new("L", (9, 9)).save(folder / "generated-images" / "0.png")
    Image.new("L", (9, 9)).save(folder / "generated-images" / "1.png")
    assert main(["sketch"]) == 1
    assert "generated-images/0.png has shape (1, 9, 9), but the model takes (1, 8, 8)" in capsys.readouterr().err
    assert not Path("attribution").exists()
