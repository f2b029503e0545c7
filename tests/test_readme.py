"""The programs of the documentation run as printed."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest

import retrac_scale as rs
from retrac_scale.cli import main
from tests import pages, readers

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README's reader has: PNG files in two folders, and a model in diffusers layout; here small ones."""
    monkeypatch.chdir(tmp_path)
    readers.folders_of_images({})
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


def test_the_commands_for_ones_own_images_lead_to_a_report(folder: Path) -> None:
    commands = re.findall(r"^    retrac-scale (.*)$", README, re.M)
    assert len(commands) <= 3
    for command in commands:
        assert main(shlex.split(command)) == 0
    assert rs.open_index("attribution/retracridge.zarr").shape[1] == 500
    shown = set(re.findall(r"training-images/\d+\.png", (folder / "attribution" / "report.html").read_text()))
    assert len(shown) >= 10
    assert shown <= {f"training-images/{number}.png" for number in range(500)}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # diffusers' and PEFT's own
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    names = pages.run("README.md", readers.BEFORE["README.md"], {}, tmp_path)
    assert names["answer"].ids.shape == (2, 10)
    assert (tmp_path / "report.html").exists()
    assert list(names["store"].checkpoints) == ["checkpoint-250", "checkpoint-500"]
