"""Pixels in another range than the model's are refused, or told, before anything is computed."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import retrac_scale as rs
from retrac_scale.task.items import take_apart
from tests.conftest import tiny_unet
from tests.small_denoiser import SCHEDULER

MODEL = tiny_unet()
TASK = rs.DiffusionTask(MODEL, SCHEDULER)
CHECKPOINTS = {"only": MODEL.state_dict()}
BYTES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8))).float()
SEEN = BYTES / 127.5 - 1


def measured(images: Any, **options: Any) -> rs.SketchStore:
    return rs.sketch(
        TASK, images, None, checkpoints=CHECKPOINTS, timesteps=rs.EvenlySpaced(1), progress=False, **options
    )


def test_floats_of_bytes_are_refused_on_either_side() -> None:
    why = r"item 0 has pixels up to 2\d\d; give them in the range that the model was trained on, usually -1 .. 1"
    with pytest.raises(ValueError, match=why):
        measured(BYTES)
    index = rs.build_index(measured(SEEN))
    with pytest.raises(ValueError, match=why):
        index.query(rs.Samples(BYTES[:2], TASK, CHECKPOINTS), 2)


@pytest.mark.parametrize("item", [{"latents": BYTES[0]}, BYTES[0].repeat(4, 1, 1), -BYTES[0], BYTES[0, 0]])
def test_what_is_no_picture_may_be_as_large_as_it_is(item: Any) -> None:
    take_apart("any", item)


def test_pictures_that_never_go_below_zero_are_told_on_either_side() -> None:
    why = r"no picture has a pixel below 0: they seem to be in 0 .. 1"
    with pytest.warns(UserWarning, match=why):
        measured((SEEN + 1) / 2)
    index = rs.build_index(measured(SEEN))
    with pytest.warns(UserWarning, match=why):
        index.query(rs.Samples((SEEN[:2] + 1) / 2, TASK, CHECKPOINTS), 2)
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", "no picture has a pixel below 0")  # as it says
        measured((SEEN + 1) / 2)


BRIGHT = (BYTES[:1] / 2 + 128).floor() / 127.5 - 1


@pytest.mark.parametrize("images", [SEEN, BRIGHT, torch.cat([BRIGHT, SEEN[:2] / 2 + 0.1]), torch.zeros(2, 1, 8, 8)])
def test_bright_and_blank_pictures_are_taken_as_they_are(images: Tensor) -> None:
    with warnings.catch_warnings(action="error"):
        measured(images)
