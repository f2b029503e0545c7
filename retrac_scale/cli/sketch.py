"""The verb sketch."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.measured import image_files, load_denoiser, load_scheduler
from retrac_scale.cli.project import Project, add_options, find, need, overruled, projection_of
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.task.diffusion import DiffusionTask


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.sketching import sketch
    from retrac_scale.task.diffusion import DiffusionTask
    from retrac_scale.timesteps import EvenlySpaced

    project = overruled(find(arguments.config), arguments)
    need(project.model, "--model")
    need(project.images, "--images")
    model, scheduler = load_denoiser(project.denoiser), load_scheduler(project.scheduler)
    task = DiffusionTask(model, scheduler, measure=project.measure, device=project.device)  # type: ignore[arg-type]
    projection = projection_of(project.rank, project.dim)
    common: dict[str, Any] = {"checkpoints": project.weights, "timesteps": EvenlySpaced(project.timesteps)}
    training = _images(project, project.images, task)
    store = sketch(task, training, project.store, projection=projection, **common)
    made = [store]
    if project.query_images:
        asked = _images(project, project.query_images, task)
        made.append(sketch(task, asked, project.queries, like=store, **common))
    text = "\n".join(str(one) for one in made)
    data = {"store": project.store, "samples": store.shape[0]}
    if len(made) > 1:
        data |= {"queries": project.queries, "query_samples": made[1].shape[0]}
    return Answer(text, data)


def _images(project: Project, folder: str, task: DiffusionTask) -> ImageFiles:
    """The images in a folder of the project; their ids do not depend on where the command is run."""
    import numpy as np

    files = image_files([project.path(folder)], task)
    if not os.path.isabs(folder):
        files.ids = np.array([project.own_name(file) for file in files.ids.tolist()])
    return files


VERB = Verb(
    "sketch",
    "Sketch the gradients of a folder of images under a model, and of the images to ask about.",
    """  retrac-scale sketch                           what retrac-scale.toml says; run again, it goes on
  retrac-scale sketch --model model --images training-images --query-images generated-images
  retrac-scale sketch --model model --images folder --checkpoint early=epoch-10.pt --checkpoint late=model/unet""",
    add_options,
    _run,
)
