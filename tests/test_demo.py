"""The demo's own training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from retrac_scale import demo
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
