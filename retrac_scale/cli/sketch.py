"""The verb sketch."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.measured import image_files, load_denoiser, load_scheduler
from retrac_scale.cli.project import FILE, Project, add_options, find, need, overruled, projection_of
from retrac_scale.cli.repeated import as_json
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.store import SketchStore
    from retrac_scale.task.diffusion import DiffusionTask


def _options(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument(
        "--until",
        type=float,
        metavar="SHARE",
        help="measure all images again at further timesteps until two such runs are foretold to share so much of their "
        "top-10 lists, such as 0.9",
    )
    parser.add_argument(
        "--replace", action="store_true", help="sketch images anew that are others than those that were sketched"
    )
    parser.add_argument(
        "--check-all",
        action="store_true",
        help="compare all images with those that were sketched, also where more than 10,000 have not changed in size "
        "and time",
    )
    parser.add_argument("--at-most", type=int, help="timesteps of an image in all, with --until (default: 32)")


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.api.sketch import sketch
    from retrac_scale.measurement.repeatability import repeatability
    from retrac_scale.task.diffusion import DiffusionTask

    project = overruled(find(arguments.config), arguments)
    need(project.model, "--model")
    need(project.images, "--images")
    until: dict[str, Any] = {}
    again = {"replace": arguments.replace, "check_all": arguments.check_all}
    if arguments.until is not None:
        until = {"until": arguments.until, "at_most": 32 if arguments.at_most is None else arguments.at_most}
    elif arguments.at_most is not None:
        raise ValueError("--at-most is the budget of --until: give both, such as --until 0.9 --at-most 16.")
    measured = _measured(project)
    model, scheduler = load_denoiser(project.denoiser), load_scheduler(project.scheduler)
    task = DiffusionTask(model, scheduler, measure=project.measure, device=project.device)  # type: ignore[arg-type]
    training = _images(project, project.images, task)
    store = sketch(task, training, project.store, checkpoints=project.weights, **measured, **until, **again)
    made = [store]
    if project.query_images:
        asked = _images(project, project.query_images, task)
        made.append(sketch(task, asked, project.queries, checkpoints=project.weights, like=store, **again))
    lines = [str(one) for one in made]
    data: dict[str, Any] = {"store": project.store, "samples": store.shape[0]}
    if len(made) > 1:
        data |= {"queries": project.queries, "query_samples": made[1].shape[0]}
    if until:
        told = repeatability(store)
        reached = told.overlap.value >= arguments.until
        lines.append(f"{told}: {'as asked' if reached else f'not {arguments.until:g}; raise --at-most to go on'}")
        data |= {"repeatability": as_json(told), "reached": reached}
    return Answer("\n".join(lines), data)


def _measured(project: Project) -> dict[str, Any]:
    """How training images are measured: as the project says, or as those of the store that is there already.

    Raises:
        ValueError: the project says otherwise than that store; names the entry and what to do.
    """
    from retrac_scale.store import open_store
    from retrac_scale.task.timesteps import EvenlySpaced

    try:
        there = open_store(project.store)
    except (FileNotFoundError, ValueError):  # whatever else is there, sketch names it
        plan = EvenlySpaced(project.timesteps, noise=project.noise)  # type: ignore[arg-type]
        return {"timesteps": plan, "projection": projection_of(project.rank, project.dim)}
    for entry, held in _held(there).items():
        said = getattr(project, entry)
        if entry in project.stated and said != held:
            raise ValueError(
                f"{project.store} was sketched with {entry} = {held!r}, but {FILE} or an option says {said!r}; say "
                f"{entry} = {held!r} to go on with it, or begin another store with another out (--out)."
            )
    return {}


def _held(store: SketchStore) -> dict[str, Any]:
    """A store's plan and projection as entries of the file.

    Raises:
        ValueError: no entries stand for its plan.
    """
    from retrac_scale.store.part import plans_of

    first = next(iter(plans_of(store.fingerprint)), {"kind": "given"})
    projection = store.fingerprint["projection"]
    if first["kind"] not in ("EvenlySpaced", "Explicit"):
        raise ValueError(
            f"{store.url} was not measured at the same timesteps for every image ({first['kind']}), as a command does; "
            "go on with it by sketch(..., timesteps=) in Python, or begin another store with another out (--out)."
        )
    return {
        "timesteps": first.get("count", first.get("timesteps")),
        "noise": first.get("noise", "own"),
        "rank": 0 if projection["kind"] == "CountSketch" else projection.get("rank") or -1,
        "dim": projection.get("dim"),
    }


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
  retrac-scale sketch --until 0.9 --at-most 16  measures again and again, until answers would repeat so far
  retrac-scale sketch --replace                 images that were changed, under the same names, are sketched anew
  retrac-scale sketch --model model --images training-images --query-images generated-images
  retrac-scale sketch --model model --images folder --checkpoint early=epoch-10.pt --checkpoint late=model/unet""",
    _options,
    _run,
)
