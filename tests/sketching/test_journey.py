"""Journey-TRAK's queries: predicted clean images along the sampling trajectory, and gradients there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

import retrac_scale as rs
from tests import oracle
from tests.conftest import MODELS, Labelled, random_images
from tests.sketching.test_sketching import SCHEDULER


@pytest.mark.parametrize("noise_of_store", ["own", "common"])
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_journey_sketches_are_gradients_at_the_predicted_clean_image_of_each_step(
    kind: str, noise_of_store: Any, tmp_path: Path
) -> None:
    model: Any = MODELS[kind](0)
    task = rs.DiffusionTask(model, SCHEDULER)
    checkpoints = {"last": {name: value.clone() for name, value in model.state_dict().items()}}
    options: dict[str, Any] = {"checkpoints": checkpoints, "progress": False}
    options["timesteps"] = rs.Explicit([40], noise=noise_of_store)
    store = rs.sketch(
        task, Labelled(random_images(12)), None, projection=rs.Identity(), dtype="float32", batch_size=4, **options
    )
    labels = {"class_labels": torch.tensor([3, 5])} if kind == "dit" else {}
    noise, sampler = random_images(2, seed=7), DDIMScheduler.from_config(SCHEDULER.config, clip_sample=False)
    journey = rs.sample_journey(task, sampler, noise, 3, conditioning=labels, ids=["x", "y"])
    queries = rs.sketch_journey(task, journey, tmp_path / "q", checkpoints=checkpoints, like=store)
    assert queries.timesteps("last").tolist() == [journey.timesteps] * 2
    assert queries.ids.tolist() == ["x", "y"]
    state = noise
    for column, timestep in enumerate(journey.timesteps):
        with torch.no_grad():
            prediction = model(state, torch.tensor([timestep] * 2), **labels).sample
        signal = SCHEDULER.alphas_cumprod[timestep]
        clean = (state - (1 - signal).sqrt() * prediction) / signal.sqrt()
        torch.testing.assert_close(journey.images[:, column], clean, rtol=1e-3, atol=1e-3)
        state = sampler.step(prediction, timestep, state).prev_sample
        for row, name in enumerate(["x", "y"]):
            expected = oracle.pair_gradient(
                model,
                checkpoints["last"],
                SCHEDULER,
                journey.images[row, column],
                name if noise_of_store == "own" else None,
                timestep,
                conditioning={key: value[row] for key, value in labels.items()},
                seed=int(noise_of_store == "own"),
            )
            found = queries.sketches("last")[row, column]
            assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    torch.testing.assert_close(journey.samples, state)
    answer = rs.build_index(store, rs.TRAK(), None).query(rs.open_store(tmp_path / "q"), 3)
    assert answer.ids.shape == (2, 3)


def test_a_sampler_that_hides_the_predicted_clean_image_is_refused() -> None:
    task = rs.DiffusionTask(MODELS["unet"](0), SCHEDULER)
    for sampler in (DPMSolverMultistepScheduler.from_config(SCHEDULER.config), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(ValueError, match=f"{type(sampler).__name__} does not tell the clean image"):
            rs.sample_journey(task, sampler, random_images(1), 2)
