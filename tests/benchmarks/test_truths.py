"""Truths are made by training without some samples, on a tiny setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import truths
from retrac_scale.evaluate.settings import Images, Setting, joined
from retrac_scale.evaluate.settings.data import Pictures
from retrac_scale.evaluate.settings.losses import Losses
from retrac_scale.evaluate.settings.trainer import Trainer
from retrac_scale.evaluate.settings.training import Training

HOW = Training(epochs=2, kept=(1, 2), batch=4, channels=(8, 16), warmup_steps=1)


@pytest.mark.slow
def test_groups_are_losses_of_models_that_saw_no_sample_of_one_digit(tmp_path: Path) -> None:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = Pictures(Images(images), Images(images[:2].flip(3), "held-out"), {"digit": np.arange(8) % 2})
    setting = Setting("digits8", pictures, HOW, tmp_path / "work", asked_in=tmp_path)
    asked = {kind: images[2 * place :][:2] for place, kind in enumerate(truths.KINDS_OF_LDS)}
    packed: dict[str, Any] = {kind: values.numpy() for kind, values in asked.items()}
    np.savez(setting.queries_file, data=np.array(pictures.digest), **packed)
    found = truths.groups(setting, 0)
    assert (found.name, found.names["digit"].tolist(), found.shape) == ("digits8-groups", ["0", "1"], (6, 8))
    measure = Losses(joined([Images(values) for values in asked.values()]), setting.build(), setting.scheduler)
    for seed in truths.GROUP_SEEDS:
        apart = Trainer(pictures.train, HOW, tmp_path / "apart")
        whole, without = measure(apart(np.arange(8), seed)), measure(apart(np.arange(0, 8, 2), seed))
        np.testing.assert_allclose(found.whole[seed], whole)
        np.testing.assert_allclose(found.harm("digit")[seed, :, 1], without - whole)
