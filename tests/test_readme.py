"""The programs of the documentation run as printed."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

import retrac_scale as rs
from retrac_scale.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the README's reader has: PNG files in two folders, and a model in diffusers layout; here small ones."""
    rng = np.random.default_rng(0)
    for folder, count in (("training-images", 500), ("generated-images", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / folder / f"{number}.png")
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    model.save_pretrained(tmp_path / "model" / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    monkeypatch.chdir(tmp_path)
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


def test_the_program_for_ones_own_images_runs(folder: Path) -> None:
    program = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "def load" in block)
    names: dict[str, object] = {}
    exec(program, names)
    assert names["answer"].ids.shape == (2, 10)  # type: ignore[attr-defined]
    assert (folder / "report.html").exists()


def test_the_rules_of_the_page_on_rules_are_right() -> None:
    page = (Path(__file__).parent.parent / "docs/writing-a-rule.md").read_text()
    programs = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class " in block]
    names: dict[str, object] = {}
    for program in programs:
        exec(program, names)
    assert len(programs) == 2
