"""The demo's own training."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from diffusers import DDPMScheduler

import retrac_scale as rs
from retrac_scale import demo
from retrac_scale.cli.beforehand import preparing
from retrac_scale.sketching.calibration import torch_threads


def test_a_small_model_is_trained_in_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "KEPT_EPOCHS", (1,))
    scans, model, seen = demo.load_scans(), demo.build_model(), set()
    model.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    with torch_threads(2):
        demo.train(model, DDPMScheduler(), demo.Scans(scans.images[:32], scans.digits), tmp_path)
        seen.add(torch.get_num_threads() - 1)
    assert seen == {1}


def test_what_is_prepared_beside_the_demo_does_not_outlive_it() -> None:
    def others() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "retrac_scale.cli.beforehand" in child.cmdline()]

    def interrupted() -> None:
        with preparing():
            assert len(others()) == (psutil.cpu_count() > 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not others()


def test_what_is_prepared_is_a_sketch_and_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[rs.Index] = []

    def build(store: rs.SketchStore) -> rs.Index:
        asked.append(rs.build_index(store))
        return asked[-1]

    monkeypatch.setattr(demo, "build_index", build)
    monkeypatch.setattr(demo, "COMPILED_FOR", 12)
    demo.compile_beforehand()
    assert [index.shape[1] for index in asked] == [12, 12]
