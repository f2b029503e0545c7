"""Projects of two measured functions: stores that lack one, stand at other timesteps, or were stopped half way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

import retrac_scale as rs
from retrac_scale import planner
from retrac_scale.cli import main
from retrac_scale.cli.indexes import own_measures
from retrac_scale.cli.project import FILE, find
from tests.conftest import tiny_unet

BOTH = ("mse", "mean_squared_output")
OPTIONS = ["--model", "model", "--images", "train", "--query-images", "gen", "--dim", "64", "--rank", "0"]
SMALL = [*OPTIONS, "--timesteps", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine training images, two to ask about, and a model."""
    folder = tmp_path_factory.mktemp("measures")
    for number in range(11):
        file = folder / ("train" if number < 9 else "gen") / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)).save(file)
    tiny_unet().save_pretrained(folder / "model" / "unet")  # type: ignore[operator]
    DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / "model" / "scheduler")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planner, "CALIBRATION_SECONDS", 0.1)
    return tmp_path


def write(measure: str) -> None:
    """The file with another measure."""
    lines = Path(FILE).read_text().splitlines()
    said = f'measure = "{measure}"'
    Path(FILE).write_text("\n".join(said if line.startswith("measure =") else line for line in lines))


def held(name: str = "sketches") -> list[str]:
    return rs.open_store(f"attribution/{name}.zarr").measurements


def test_where_timesteps_are_averaged_the_loss_alone_is_measured_or_taken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sketch", *SMALL, "--noise", "own"]) == 0
    assert held() == ["mse"]
    assert main(["query", "-k", "1"]) == 0
    assert main(["init", *SMALL, "--noise", "own", "--measure", ",".join(BOTH), "--out", "both"]) == 0
    assert main(["sketch", "--until", "0.01", "--at-most", "2"]) == 0
    assert main(["plan", "--repeatability", "0.01"]) == 0
    assert main(["index", "both/sketches.zarr", "i.zarr", "--measure", ",".join(BOTH)]) == 0
    assert rs.open_index("i.zarr").meta["measure"] == "mse"


def test_a_run_that_was_stopped_before_anything_was_measured_begins_again_with_all(folder: Path) -> None:
    assert main(["sketch", *SMALL, "--measure", "mse", "--query-images", ""]) == 0
    assert own_measures(find(None)) == ("mse",)
    shutil.rmtree("attribution/sketches.zarr/final/commit")
    assert own_measures(find(None)) == BOTH


def test_a_check_that_was_being_begun_when_it_was_stopped_is_made_again(folder: Path) -> None:
    assert main(["sketch", *SMALL]) == 0
    about = json.loads(Path("attribution/check.zarr/zarr.json").read_text())
    (told,) = about["attributes"].values()
    told["creating"] = True
    shutil.rmtree("attribution/check.zarr")
    Path("attribution/check.zarr").mkdir()
    Path("attribution/check.zarr/zarr.json").write_text(json.dumps(about))
    assert main(["sketch", *SMALL]) == 0
    assert main(["check"]) in (0, 1)  # of nine random pictures nobody knows


def test_measures_at_other_timesteps_are_told_and_brought_together(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *SMALL]) == 0
    assert main(["sketch"]) == 0
    write("mse")
    assert main(["sketch", "--until", "0.99999", "--at-most", "4"]) == 0
    capsys.readouterr()
    assert main(["index"]) == 0
    other = "attribution/retracridge.zarr stays as it was: run `retrac-scale sketch --measure mse,mean_squared_output`"
    assert other in capsys.readouterr().out
    write(",".join(BOTH))
    why = "at other timesteps, which cannot stand side by side; run `retrac-scale sketch`, which measures each"
    assert main(["query"]) == 1
    assert why in capsys.readouterr().err
    assert main(["info"]) == 0
    assert why in capsys.readouterr().out
    assert main(["sketch"]) == 0
    assert "4 timesteps, 2 measures in attribution/sketches.zarr, 4.61 kB" in capsys.readouterr().out
    assert main(["query"]) == 0


def test_images_that_one_measure_lacks_are_told_as_commands_say_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *SMALL]) == 0
    assert main(["sketch"]) == 0
    write("mse")
    shutil.copy("gen/9.png", "train/9.png")
    assert main(["sketch"]) == 0
    write(",".join(BOTH))
    capsys.readouterr()
    assert main(["query"]) == 1
    assert "sketches.zarr is not complete; run `retrac-scale sketch` again." in capsys.readouterr().err
    assert main(["info"]) == 0
    assert "measures hold different samples: run `retrac-scale sketch`" in capsys.readouterr().out


def test_the_order_of_measures_in_the_file_need_not_be_the_stores(folder: Path) -> None:
    assert main(["init", *SMALL, "--measure", BOTH[1]]) == 0
    assert main(["sketch"]) == 0
    for told in (",".join(BOTH), ",".join(BOTH[::-1])):
        write(told)
        assert main(["sketch"]) == 0
        assert held() == held("queries") == [BOTH[1], BOTH[0]]
    write("mse")
    assert main(["index", "--json"]) == 0
    place = "attribution/retracridge-mse.zarr"  # the other place is of the first measure, as it was
    assert rs.open_index(place).meta["measure"] == "mse"


@pytest.mark.parametrize("told", ["", "mse,", "mse,mse"])
def test_measures_are_given_once_each(folder: Path, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(FILE).write_text(f'model = "model"\nimages = "train"\nmeasure = "{told}"')
    assert main(["plan"]) == 1
    assert f"measure: give each measure once, with commas between them, not '{told}'" in capsys.readouterr().err


def test_init_refuses_what_is_no_measure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *SMALL, "--measure", "mse mean_squared_output"]) == 1
    assert "measure must be Huber(), PseudoHuber() or one of" in capsys.readouterr().err
    assert not Path(FILE).exists()
