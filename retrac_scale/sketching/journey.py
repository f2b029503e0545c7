"""Queries along the sampling trajectory, for Journey-TRAK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrac_scale.columns import check_ids
from retrac_scale.sketching.request import Request
from retrac_scale.sketching.sketch import sketched
from retrac_scale.store import SketchStore, create_store, write_block
from retrac_scale.store.part import measures_in, plans_of
from retrac_scale.store.schema import Url
from retrac_scale.task.checkpoints import Checkpoint
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import Explicit, Noise, of_queries


@dataclass(frozen=True, eq=False)
class Journey:
    """How some images came about: the clean images that the model predicted on the way.

    Attributes:
        images: predicted clean images, `[n, t, ...]`.
        timesteps: of the steps, `[t]`, falling.
        samples: the finished images, `[n, ...]`.
        conditioning: further arguments of the model's forward, `{name: [n, ...]}`.
        ids: of the images, `[n]`; None for 0 .. n-1.
    """

    images: Tensor
    timesteps: list[int]
    samples: Tensor
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    ids: npt.ArrayLike | None = None


@torch.no_grad()
def sample_journey(
    task: DiffusionTask,
    sampler: Any,
    noise: Tensor,
    steps: int,
    *,
    conditioning: Mapping[str, Tensor] | None = None,
    ids: npt.ArrayLike | None = None,
    generator: torch.Generator | None = None,
) -> Journey:
    """Sample images with the task's model, as it is, and note the clean image predicted at each step.

    Args:
        task: its model is used with the weights that it has.
        sampler: a diffusers scheduler whose steps tell `pred_original_sample`, such as DDIMScheduler.
        noise: standard normal, `[n, ...]`.
        steps: number of sampling steps.
        conditioning: further arguments of the model's forward, `{name: [n, ...]}`.
        ids: of the images, `[n]`.
        generator: for samplers that draw noise.

    Raises:
        ValueError: the sampler does not tell the predicted clean image.
    """
    given = {name: value.to(task.device) for name, value in (conditioning or {}).items()}
    sampler.set_timesteps(steps)
    images, predicted = noise.to(task.device) * getattr(sampler, "init_noise_sigma", 1.0), []
    options = {} if generator is None else {"generator": generator}
    for step in sampler.timesteps:
        scaled = sampler.scale_model_input(images, step) if hasattr(sampler, "scale_model_input") else images
        output = task.model(scaled, step.to(task.device).expand(len(images)), **given, return_dict=False)[0]
        result = sampler.step(output, step, images, **options)
        clean = getattr(result, "pred_original_sample", None)
        if clean is None:
            raise ValueError(
                f"a {type(sampler).__name__} does not tell the clean image that it predicts; sample with "
                "DDIMScheduler, if the model is no flow, for which there is no journey yet."
            )
        images = result.prev_sample
        predicted.append(clean.cpu())
    times = [int(step) for step in sampler.timesteps]
    return Journey(torch.stack(predicted, 1), times, images.cpu(), conditioning or {}, ids)


def sketch_journey(
    task: DiffusionTask,
    journey: Journey,
    out: Url = None,
    *,
    checkpoints: Mapping[str, Checkpoint],
    like: SketchStore,
    draws: int = 1,
) -> SketchStore:
    """Query sketches at the clean image predicted at each sampling step, noised anew to that step's timestep.

    Where the training side was measured under common noise, so is the step: by what stands at its timestep there.

    Queried under `TRAK()` this is Journey-TRAK (Georgiev et al. 2023, arXiv 2312.06205), averaged over the steps as by
    Zheng et al. 2024 (arXiv 2311.00500). To attribute one step, cut the journey to it.

    Args:
        task: what is differentiated.
        journey: from `sample_journey`.
        out: path, fsspec URL, or None for memory.
        checkpoints: as for `sketch`, those of `like`.
        like: the training side.
        draws: noise draws averaged at each step.

    Returns:
        the store, float32, with one timestep per sampling step.
    """
    ids = check_ids(journey.ids, len(journey.images))  # type: ignore[arg-type]
    if len(measures := measures_in(like.fingerprint)) > 1:
        raise ValueError(
            f"a journey is sketched by one function, not by {' and '.join(measures)}; open like= under one."
        )
    stored = plans_of(like.fingerprint)
    noise: Noise = "common" if any(one.get("noise") == "common" for one in stored) else "own"
    plans = [of_queries(Explicit([timestep], draws, noise=noise), stored) for timestep in journey.timesteps]
    steps = []
    for number, plan in enumerate(plans):
        clean = _Step(journey, number, ids)
        steps.append(
            sketched(Request(task, clean, None, checkpoints, dtype="float32", like=like, progress=False), plan)
        )
    first = steps[0]
    described = {**plans[0].spec(), "kind": "Journey", "timesteps": journey.timesteps}
    store = create_store(
        out,
        shape=(len(ids), len(steps), first.shape[2]),
        ids=ids,
        weights=first.weights,
        fingerprint={**first.fingerprint, "timesteps": described},
        dtype="float32",
    )
    for name in store.checkpoints:
        for number, block in enumerate(store.blocks):
            parts = [(s.sketches(name, block), s.norms(name, block), s.losses(name, block)) for s in steps]
            sketches, norms, losses = (np.concatenate(values, axis=1) for values in zip(*parts, strict=True))
            times = np.tile(np.array(journey.timesteps, dtype=np.int64), (len(norms), 1))
            write_block(store, name, number, sketches, norms, losses=losses, timesteps=times)
    return store


@dataclass(frozen=True, eq=False)
class _Step:
    """The predicted clean images of one step, as a dataset."""

    journey: Journey
    number: int
    ids: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.journey.images)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        conditioning = {name: value[row] for name, value in self.journey.conditioning.items()}
        return self.journey.images[row, self.number], conditioning
