"""Wheel and sdist hold what they should, and an installed wheel works from any directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

import retrac_scale as rs

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, check=False, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files(folder: Path) -> set[str]:
    package = folder / "retrac_scale"
    files = [file for file in package.rglob("*") if file.is_file() and file.parent.name != "__pycache__"]
    return {str(file.relative_to(folder)) for file in files}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from it."""
    source = tmp_path_factory.mktemp("source") / "retrac_scale"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "demo", "build", "dist", "site", "*.egg-info")
    )
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", folder=source)
    return source / "dist"


def wheel(dist: Path) -> Path:
    return next(dist.glob("*.whl"))


def test_the_first_page_says_what_every_dependency_is_for() -> None:
    page = (ROOT / "docs" / "index.md").read_text()
    table = page.split("| package | for |\n| --- | --- |\n")[1].split("\n\n")[0]
    told = [name for line in table.splitlines() for name in line.split("|")[1].strip().split(", ")]
    needed = [re.split(r"[\[><=]", name)[0] for name in PROJECT["dependencies"]]
    assert sorted(told) == sorted(needed)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path) -> None:
    names = set(zipfile.ZipFile(wheel(dist)).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == package_files(ROOT)
    assert {name.split("/")[-1] for name in names - inside} >= {"LICENSE", "METADATA", "entry_points.txt"}


def test_the_sdist_holds_all_that_its_tests_and_docs_need(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert names >= package_files(ROOT)
    assert names >= {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py")}
    assert names >= {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")}
    assert names >= {"CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "README.md"}


def test_an_installed_wheel_runs_from_any_directory(dist: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", target, wheel(dist))
    run(sys.executable, *install, folder=elsewhere)
    where = {"PYTHONPATH": str(target)}
    assert "retrac-scale demo" in run(target / "bin" / "retrac-scale", "--help", folder=elsewhere, **where)
    found = run(sys.executable, "-c", "import retrac_scale; print(retrac_scale.__file__)", folder=elsewhere, **where)
    assert Path(found.strip()).is_relative_to(target)
    np.save(elsewhere / "scores.npy", np.random.default_rng(0).normal(size=(192, 512)))
    judge = ("judge", "scores.npy", "--truth", "digits8-lds", "--json")
    judged = json.loads(run(target / "bin" / "retrac-scale", *judge, folder=elsewhere, **where))
    assert [figure["queries"] for figure in judged["figures"]] == ["held out", "training", "generated"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]


def test_every_promised_extra_exists() -> None:
    assert PROJECT["optional-dependencies"].keys() >= {"gpu", "s3", "serve", "bench", "docs", "dev"}


@pytest.mark.parametrize("first", ["import retrac_scale", "from retrac_scale.cli.main import parser; parser()"])
def test_the_package_and_its_help_load_no_heavy_library(first: str) -> None:
    heavy = {"torch", "diffusers", "dask", "distributed", "pandas", "matplotlib", "pyarrow", "zarr", "numpy", "scipy"}
    loaded = run(sys.executable, "-c", f"{first}; import sys; print(*sys.modules)", folder=ROOT)
    assert not heavy & set(loaded.split())


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    assert set(dir(rs)) >= set(rs.__all__)
    assert len(set(rs.__all__)) == len(rs.__all__)
    for name in rs.__all__:
        assert getattr(rs, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        rs.no_such_name  # type: ignore[attr-defined]  # noqa: B018
