"""The command line and the report, on a small store."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.query.table import in_full


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    store = rs.write_store(tmp_path / "s.zarr", {"c": rng.standard_normal((6, 1, 8))}, timesteps=[4])
    rs.write_store(tmp_path / "q.zarr", {"c": rng.standard_normal((2, 1, 8))}, timesteps=[4])
    for name, estimator in (("tracin", rs.TracIn()), ("retrac", rs.ReTrac())):
        rs.build_index(store, estimator, tmp_path / f"{name}.zarr")
    np.save(tmp_path / "images.npy", rng.integers(0, 255, (6, 8, 8), dtype=np.uint8))
    np.save(tmp_path / "queries.npy", rng.random((2, 8, 8, 3)))
    return tmp_path


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "demo",
        "init",
        "sketch",
        "check",
        "index",
        "info",
        "verify",
        "plan",
        "query",
        "report",
        "serve",
        "completion",
    ],
)
def test_help_teaches_by_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*([verb] if verb else []), "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert f"examples:\n  retrac-scale {verb or 'demo'}" in told
    assert verb or "exit status: 0 done" in told


def test_questions_to_stored_sketches_load_no_heavy_library_and_serving_none_before_a_scan(folder: Path) -> None:
    heavy = ("torch", "numba", "dask", "distributed", "pandas", "pyarrow", "matplotlib", "scipy", "trak", "PIL")
    verbs = [["info", "s.zarr"], ["query", "retrac.zarr", "--ids", "1", "2"], ["query", "retrac.zarr", "q.zarr"]]
    lines = [
        "import sys; from retrac_scale.cli import main",
        f"print([main(verb) for verb in {verbs}], [name for name in {heavy} if name in sys.modules])",
        "main(['verify', 's.zarr']); import retrac_scale.cli.serve, retrac_scale.serve.library, retrac_scale.report",
        f"print([name for name in ('diffusers', *{heavy[:-1]}) if name in sys.modules])",  # pictures are shown by PIL
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "[0, 0, 0] []" in told
    assert told[-1] == "[]"


def test_query_prints_a_table_or_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = rs.open_index(folder / "retrac.zarr").query(rs.open_store(folder / "q.zarr"), 3)
    arguments = ["query", str(folder / "retrac.zarr"), str(folder / "q.zarr"), "-k", "3"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told.startswith("ReTrac: proponents among 6 samples\n\nquery 0\n")
    rows = [line.split() for line in told.splitlines() if line.startswith("   ")]
    positive = expected.scores > 0
    assert [int(row[1]) for row in rows] == expected.ids[positive].tolist()
    np.testing.assert_allclose([float(row[2]) for row in rows], expected.scores[positive], rtol=1e-3)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["ids"] == expected.ids[0][positive[0]].tolist()


@pytest.mark.parametrize("name", ["samples", "timesteps", "checkpoints", "dim"])
def test_plan_takes_no_negative_number(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"samples": 5, "timesteps": 1, "checkpoints": 1, "dim": 16} | {name: -5}
    assert main(["plan", *(f"--{key}={value}" for key, value in sizes.items())]) == 1
    assert "give --samples, --timesteps, --checkpoints and --dim, each 1 or more" in capsys.readouterr().err


def test_verify_names_what_is_wrong_with_an_index(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "retrac.zarr", index := tmp_path / "index.zarr")
    assert main(["verify", str(index), "--repair"]) == 0
    assert "an index: 0 objects are not what was written" in capsys.readouterr().out
    rows, norms = index / "scale" / "c" / "0" / "0", index / "norm" / "c" / "0" / "0"
    (index / "row" / "c" / "0" / "0" / "0.5f.partial").write_bytes(b"half")
    rows.write_bytes(norms.read_bytes())
    norms.unlink()
    assert main(["verify", str(index), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"] == [
        "norm/c/0/0: is missing",
        "scale/c/0/0: is not the chunk that belongs there",
        "row/c/0/0/0.5f.partial: belongs to nothing; a killed process may have left it",
    ]


def test_an_id_that_is_no_number_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", str(folder / "retrac.zarr"), "--ids", "3", "three"]) == 1
    assert "there is no sample three: such as 0; give an id" in capsys.readouterr().err


def test_ids_are_known_by_any_short_form_that_is_none_of_two() -> None:
    ids = ["images/google/pear.png", "images/apple/pear.png", "images/apple/plum.png", "images/apple/plum"]
    assert in_full(["google/pear.png", "apple/pear", "plum.png", ids[3]], ids) == [ids[0], ids[1], ids[2], ids[3]]
    with pytest.raises(ValueError, match=r"2 samples are called pear: images/google/pear.png, images/apple/pear.png"):
        in_full(["pear"], ids)
    with pytest.raises(ValueError, match=r"there is no sample lum.png: such as images/google/pear.png"):
        in_full(["lum.png"], ids)
    assert in_full(["3"], [1, 3]) == [3]


@pytest.mark.parametrize(
    ("images", "why"),
    [
        (np.zeros((6, 1, 8, 8), np.uint8), r"has shape (6, 1, 8, 8); give images as [n, h, w] or [n, h, w, 3]"),
        (None, "is no .npy file of images"),
    ],
)
def test_files_that_hold_no_pictures_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], images: Any, why: str
) -> None:
    file = folder / "wrong.npy"
    file.write_text("text") if images is None else np.save(file, images)
    arguments = ["report", str(folder / "retrac.zarr"), "--queries", str(folder / "q.zarr"), "--images", str(file)]
    assert main(arguments) == 1
    assert why in capsys.readouterr().err


def test_info_describes_stores_and_indexes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder / "s.zarr")]) == 0
    assert "6 samples at 1 timesteps, 8 entries of int8 each" in capsys.readouterr().out
    assert main(["info", str(folder / "retrac.zarr")]) == 0
    assert "index of ReTrac" in capsys.readouterr().out


def test_info_finds_what_begins_at_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    for name, told in (("s", "6 samples at 1 timesteps"), ("retrac", "index of ReTrac")):
        assert main(["info", f"~/{name}.zarr"]) == 0
        assert told in capsys.readouterr().out


@pytest.mark.parametrize("what", ["s.zarr", "retrac.zarr"])
def test_info_is_json_when_asked(folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    assert main(["info", str(folder / what), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["what"] == ("store" if what == "s.zarr" else "index")


def test_failures_are_one_line_and_exit_status_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder / "nothing")]) == 1
    assert main(["query", str(folder / "s.zarr"), str(folder / "q.zarr")]) == 1
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in error] == ["retrac-scale"] * 2


def test_python_runs_the_package_as_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["retrac_scale", "info", str(folder / "s.zarr")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("retrac_scale", run_name="__main__")
    assert "6 samples" in capsys.readouterr().out
