"""What each class of diffusers is told of time and what it predicts: as its own pipeline does, or it is refused."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.models import transformers, unets
from torch import Tensor, nn

import retrac_scale as rs
from retrac_scale.task.told_time import OWN_WAY, TIMES_T, TO_DATA, UNIT_TIME
from tests.architectures import ARCHITECTURES

T = 1000


def denoisers() -> Iterator[str]:
    for package in (transformers, unets):
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            for name, kind in vars(module).items():
                if inspect.isclass(kind) and issubclass(kind, ModelMixin) and kind.__module__ == module.__name__:
                    yield name


def test_every_denoiser_of_diffusers_stands_in_one_of_the_tables() -> None:
    """A class that a new release of diffusers brings is read first."""
    tables = (TIMES_T, UNIT_TIME, OWN_WAY.keys())
    assert {name: sum(name in table for table in tables) for name in denoisers()} == dict.fromkeys(denoisers(), 1)
    assert TO_DATA <= TIMES_T | UNIT_TIME


def tiny(name: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**ARCHITECTURES[name].config | changed).eval()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("GlmImageTransformer2DModel", "T s - 1"),
        ("LTX2VideoTransformer3DModel", "video and sound together"),
        ("StableCascadeUNet", "a ratio between 0 and 1"),
    ],
)
@pytest.mark.parametrize("scheduler", [DDPMScheduler(T), FlowMatchEulerDiscreteScheduler(T)])
def test_a_class_with_a_convention_of_its_own_is_refused_until_a_call_says_it(
    name: str, told: str, scheduler: Any
) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*{told}.*DiffusionTask\(call=\.\.\.\)"):
        rs.DiffusionTask(tiny(name), scheduler)
    rs.DiffusionTask(tiny(name), scheduler, call=lambda model, noisy, times, given: noisy)


def test_a_class_that_a_later_release_of_diffusers_brings_is_refused() -> None:
    def forward(self: Any, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return hidden_states

    methods = {"forward": forward, "__module__": "diffusers.models.transformers.transformer_later"}
    later = type("LaterTransformer2DModel", (ModelMixin,), methods)
    with pytest.raises(ValueError, match="LaterTransformer2DModel is none of the denoisers that this release knows"):
        rs.DiffusionTask(later(), FlowMatchEulerDiscreteScheduler(T))


class Own(nn.Module):
    def forward(self, sample: Tensor, t: Tensor) -> Tensor:
        return sample


@pytest.mark.parametrize(
    ("model", "inverted", "scale"),
    [
        (Own, False, 1.0),
        (Own, True, 1.0),
        (lambda: tiny("LongCatAudioDiTTransformer"), True, 1 / T),  # its pipeline divides by T
        (lambda: tiny("StableAudio3DiTModel"), False, 1 / T),  # its scheduler has T = 1
        (lambda: tiny("Flux3Transformer2DModel"), False, 1 / T),  # its denoising step divides by 1000
        (lambda: tiny("SanaTransformer2DModel", timestep_scale=0.001), False, 0.001),  # its pipeline multiplies
    ],
)
def test_the_scheduler_of_diffusers_samples_what_the_target_says(model: Any, inverted: bool, scale: float) -> None:
    """A model that always gives its training target, told what it is told there, is led from noise to the sample."""
    sample, noise = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    steps = torch.tensor([999, 749, 499, 249])
    scheduler: Any = FlowMatchEulerDiscreteScheduler(T, invert_sigmas=inverted)
    noising = rs.DiffusionTask(model(), scheduler).noising
    scheduler.set_timesteps(sigmas=((steps + 1) / T).tolist())
    latents = noise
    for step, told in zip(steps[:, None], scheduler.timesteps, strict=True):
        torch.testing.assert_close(latents, noising.noisy(sample, noise, step), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(noising.times(step), told[None] * scale, atol=1e-4, rtol=1e-5)
        latents = scheduler.step(noising.target(sample, noise, step), told, latents).prev_sample
    torch.testing.assert_close(latents, sample, atol=1e-5, rtol=1e-5)
