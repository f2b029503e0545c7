"""The verbs index and query: stored ids, stores, image files; tables and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.datasets import ImageFiles
from tests.conftest import tiny_unet


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
    for estimator, damping in (("ReTrac", "0.25"), ("DAS", "-1")):
        assert main(["index", store, str(folder / "n"), "--estimator", estimator, "--damping", damping]) == 1
    errors = capsys.readouterr().err
    assert "ReTrac inverts no matrix, so it has no damping; ReTracRidge, TRAK, RelatIF, RenormIF, DTRAK, DAS have" in errors
    assert 'damping must be "auto" or a number of 0 or more, got -1.0' in errors
    with pytest.raises(SystemExit, match="2"):
        main(["index", store, str(folder / "n"), "--estimator", "TRAK", "--damping", "some"])
    assert "argument --damping: give auto or a number, not 'some'" in capsys.readouterr().err


def test_index_of_a_measure_and_options_without_a_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", str(folder / "s"), str(folder / "other"), "--measure", "l1"]) == 1
    assert "has no measure 'l1'" in capsys.readouterr().err
    assert main(["index", "--damping", "0"]) == 1
    assert "--damping is for one index: index STORE OUT --damping" in capsys.readouterr().err


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


def test_image_files_are_sketched_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    model = tiny_unet()
    assert isinstance(model, UNet2DModel)
    model.save_pretrained(tmp_path / "model" / "unet")
    pictures = ImageFiles([str(tmp_path / "pictures")], 1)
    task = rs.DiffusionTask(model, DDPMScheduler(num_train_timesteps=100))
    options = {"checkpoints": {"final": model.state_dict()}, "timesteps": rs.EvenlySpaced(2), "progress": False}
    store = rs.sketch(task, pictures, tmp_path / "s", projection=rs.CountSketch(64), **options)  # type: ignore[arg-type]
    rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    files = [str(tmp_path / "pictures" / "1.png")]
    weights = f"final={tmp_path / 'model' / 'unet'}"
    arguments = ["query", str(tmp_path / "i"), *files, "-k", "3", "--timesteps", "2", "--json"]
    assert main([*arguments, "--model", str(tmp_path / "model" / "unet"), "--checkpoint", weights]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    asked = rs.Samples(ImageFiles(files, 1), task, {"final": model.state_dict()}, rs.EvenlySpaced(2)).sketch(store)
    expected = rs.open_index(tmp_path / "i").query(asked, 3)  # with other noise than the training image's
    assert result["query"] == files[0]
    assert result["ids"] == expected.ids[0].tolist()
    np.testing.assert_allclose(result["scores"], expected.scores[0], rtol=1e-4)
    own = dict(zip(result["ids"], result["scores"], strict=True))[files[0]]
    assert own < 0.99 * rs.self_influence(store, rs.ReTrac())[1]
    assert main(arguments) == 1
    assert "give --model and a --checkpoint" in capsys.readouterr().err


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
