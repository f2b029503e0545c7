"""The walk of a newcomer from the README's commands to an answer, and its transcript, docs/walkthrough.md.

    RETRAC_SCALE_WRITE=1 pytest tests/cli/test_walkthrough.py

writes the transcript anew; otherwise it must be what the commands say, figures and order of lists apart.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from retrac_scale.cli import main
from tests.cli import walk

PAGE = Path(__file__).parents[2] / "docs" / "walkthrough.md"
HEAD = """# A walk from pictures to an answer

What the README's commands say, wrong turns included. There are 40 drawings of 16 x 16 pixels in four folders, the
circles without a ground; a small model that was trained on them, in diffusers' layout (`run`, with checkpoints of the
weights and of their averages); and three drawings to ask about. A test takes this walk and writes this page
(`tests/cli/test_walkthrough.py`); progress bars are left out.
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    walk.draw_all(folder)
    walk.train(folder)
    return folder


def test_the_walk_of_a_newcomer(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    told: list[str] = []

    def run(command: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(shlex.split(command)) == status, capsys.readouterr().err
        seen = capsys.readouterr()
        said = seen.out if status == 0 else "\n".join(x for x in seen.err.splitlines() if x.startswith("retrac-scale:"))
        told.append(f"    $ retrac-scale {command}\n" + "".join(f"    {x}\n" for x in said.strip().splitlines()))
        return said

    def say(text: str) -> None:
        told.append(f"{text}\n")

    _begin(run, say)
    _sketch_and_ask(run, say)
    _what_changes(run, say)
    page = "\n".join([HEAD, *told])
    assert not re.search(r"rs\.|\w+\(\.\.\.\)|\{'|=True", page)  # commands, no Python
    if os.environ.get("RETRAC_SCALE_WRITE"):
        PAGE.write_text(page)
    assert _skeleton(PAGE.read_text()) == _skeleton(page)


def _begin(run: Run, say: Callable[[str], None]) -> None:
    say("## What there is")
    assert "run `retrac-scale init` first" in run("sketch", 1)
    assert "run `retrac-scale init`, then `retrac-scale sketch`" in run("report", 1)
    images = "--images training-images --query-images generated-images"
    assert "there is no folder runn" in run(f"init --model runn {images}", 1)
    assert "holds no diffusers model" in run(f"init --model training-images {images}", 1)
    assert "is no image and holds none" in run("init --model run --images run", 1)
    said = run(f"init --model run {images}")
    assert "training-images: 40 images of 16 x 16; columns folder\n  10 of them are transparent: their trans" in said
    assert "checkpoints: 2 in run, checkpoint-80, checkpoint-160; averaged weights (EMA) of all" in said
    say("The training put its pictures onto white, so the circles must stand on white here too:")
    assert "they are put onto white" in run(f"init --model run {images} --background white --force")


def _sketch_and_ask(run: Run, say: Callable[[str], None]) -> None:
    say("## The long one, which ends with a check")
    said = run("sketch")
    assert "store: 40 images at 4 timesteps" in said
    assert "queries: 3 images" in said
    assert re.search(r"check of ReTracRidge: originals that come first: plain 12 of 12, moved 1[12] of 12", said)
    assert "run `retrac" not in run("report")
    say("## Asking")
    said = run("query -k 3")
    assert said.startswith("ReTracRidge: proponents among 40 samples, all in training-images/\n\nquery generated-im")
    assert len(re.findall(r"^ +\d ", said, re.M)) == 9
    assert said.count("order is not resolved") <= 1
    assert "training-images/" not in said.split("\n\n", 1)[1]
    assert "4 samples are called red: training-images/circle/red.png, " in run("query --ids red -k 3", 1)
    said = run("query --ids circle/red -k 8 --side both")
    opponents = re.findall(r"-?\d+\.?\d*(?:e-?\d+)?(?= ±)", said.split("opponents")[-1])
    assert all(float(score) < 0 for score in opponents)
    say("Another estimator beside the recommended one:")
    assert run("index --estimator trak") == "TRAK: 40 samples in attribution/trak.zarr\n"
    run("report attribution/retracridge.zarr attribution/trak.zarr --out both.html")
    shown = json.loads(re.findall(r'id="content">(.*?)</script>', Path("both.html").read_text(), re.S)[0])
    assert list(shown["queries"][0]["lists"]) == ["ReTracRidge", "TRAK"]
    assert "sketch store: 40 samples at 4 timesteps" in run("info")


def _what_changes(run: Run, say: Callable[[str], None]) -> None:
    say("## What changes in between")
    say("A picture to ask about is added, and is noticed:")
    walk.draw("triangle", "olive").save("generated-images/triangle.png")
    said = run("report")
    assert "note: 1 files in generated-images were not asked about, such as generated-images/triangle.png" in said
    assert "queries: 4 images" in run("sketch")
    say("A training picture is drawn anew, under its old name:")
    walk.draw("cross", "lime").save("training-images/cross/green.png")
    assert "training-images/cross/green.png" in run("sketch", 1)
    assert "store: 40 images" in run("sketch --replace")
    assert run("report") == "attribution/report.html\n"
    page = json.loads(re.findall(r'id="content">(.*?)</script>', Path("attribution/report.html").read_text(), re.S)[0])
    assert len(page["queries"]) == 4
    assert list(page["check"]) == ["ReTracRidge"]


def _skeleton(text: str) -> str:
    """A transcript without figures, and without the lines of lists, whose order may differ from machine to machine."""
    rows = r"^ {4} +\d+  .*$|^ {4}~ stands.*$|^ {4}blocks of.*$|^ +likely: .*$"
    without = re.sub(r"\n{2,}", "\n", re.sub(rows, "", text, flags=re.M))
    return re.sub(r"; (a training image|not even).*", "", re.sub(r"\d[\d.,]*", "#", without))
