"""The verb sketch."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from retrac_scale.cli import check
from retrac_scale.cli.indexes import open_sketches, own_measures, recommended_of
from retrac_scale.cli.info import BYTES
from retrac_scale.cli.measured import project_images, project_task
from retrac_scale.cli.project import FILE, RECORDED, Project, add_options, find, need, overruled, projection_of
from retrac_scale.cli.repeated import as_json
from retrac_scale.cli.sizes import in_bytes
from retrac_scale.cli.told import tell
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from distributed import Client

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
    parser.add_argument(
        "--workers",
        metavar="N",
        help="sketch the training images in so many processes of this machine, or on the workers of a Dask scheduler: "
        "tcp://host:8786; a small model keeps hardly more than one core of a process busy",
    )


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.measurement.repeatability import repeatability

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
    at_work = _workers(arguments.workers, project.device)
    task = project_task(project)
    training = project_images(project, project.images, task, project.store)
    prompts = [tell(training, task, project.captions)]
    asked = None
    if project.query_images:
        asked = project_images(project, project.query_images, task, project.queries)
    if asked is not None:
        prompts.append(tell(asked, task, project.captions, needed=False))
    new = _added(project.store, training, project.images)
    if asked is not None:
        _look_at_queries(asked, training, task)
    common = {"checkpoints": project.weights, **again}
    measured["grow"] = _has_grown(project.store, training)
    dataset = _encoded(project, task, training, **again)
    with at_work as client:
        store = _sketched(project, task, dataset, until, client=client, **common, **measured)
    made = {"store": store}
    gone: list[str] = []
    if asked is not None:
        gone = _forgotten(project.queries, asked)
        made["queries"] = _queries(project, task, asked, store, **common)
    lines = [*filter(None, prompts), *(f"{name}: {_told(one)}" for name, one in made.items())]
    data: dict[str, Any] = {"store": project.store, "samples": store.shape[0]}
    if new:
        lines[-len(made)] += f"; {len(new)} of them, such as {new[0]}, came since"
        data["added"] = len(new)
    if gone:
        lines[-1] += (
            f"; anew, for {len(gone)} that were asked about are not in {project.query_images}, such as {gone[0]}"
        )
    if asked is not None:
        data |= {"queries": project.queries, "query_samples": made["queries"].shape[0]}
    if until:
        told = repeatability(recommended_of(open_sketches(project))[0])
        reached = told.overlap.value >= arguments.until
        lines.append(f"{told}: {'as asked' if reached else f'not {arguments.until:g}; raise --at-most to go on'}")
        data |= {"repeatability": as_json(told), "reached": reached}
    check.ask(project, task, training, store, check_all=arguments.check_all)
    found = check.find_each(project)
    lines += [line for name, one in found.items() for line in check.lines_of(name, one)]
    data["check"] = {name: check.as_json(one) for name, one in found.items()}
    return Answer("\n".join(lines), data)


def _sketched(
    project: Project, task: DiffusionTask, dataset: Any, until: dict[str, Any], **options: Any
) -> SketchStore:
    """The training images' store; measured again until lists of the project's own measures repeat, if that is asked."""
    from retrac_scale.api.sketch import sketch

    options["progress"] = "training images"
    if until:
        own = task.only(*(one for one in task.measures if one in own_measures(project)))
        sketch(own, dataset, project.store, **options, **until)
        options |= {"grow": True, "timesteps": None, "projection": None}  # as the store is now
    return sketch(task, dataset, project.store, **options)


def _workers(told: str | None, device: str) -> contextlib.AbstractContextManager[Client | None]:
    """What `--workers` says.

    Raises:
        ValueError: processes of this machine would share a GPU.
    """
    from retrac_scale.runtime.processes import workers

    if told is None:
        return contextlib.nullcontext()
    if told.isdecimal() and device != "cpu":
        raise ValueError(
            f"--workers {told} would share one {device}; start a worker for each, `dask cuda worker --resources "
            "GPU=1`, and give their scheduler's address."
        )
    return workers(told)


def _encoded(project: Project, task: DiffusionTask, images: ImageFiles, **again: bool) -> Any:
    """The images as the model takes them: those of a pipeline with VAE or text encoder pass it once, into a store."""
    from retrac_scale.sketching.encoded import encode

    if task.encoder is None:
        return images
    sample, told = task.check_item(images.ids[0], images[0])
    size = len(images) * sum(one.nbytes for one in (sample, *told.values()))
    if not os.path.isdir(project.encoded):
        print(f"encoding {len(images):,} images into {project.encoded}, up to {in_bytes(size)}", file=sys.stderr)
    return encode(task, images, project.encoded, **again)


def _look_at_queries(asked: ImageFiles, training: ImageFiles, task: DiffusionTask) -> None:
    """ValueError where an image to ask about cannot be read, or is of another size: now, not after the long run."""
    from retrac_scale.sketching.content import look_through

    look_through(task, asked, asked.ids)
    own, others = (task.read_item(one.ids[0], one[0]).sample.shape for one in (training, asked))
    if own != others:
        sizes = " x ".join(map(str, others[:0:-1])), " x ".join(map(str, own[:0:-1]))
        raise ValueError(f"{asked.ids[0]} is {sizes[0]}, the training images are {sizes[1]}; resize the images.")


def _queries(
    project: Project, task: DiffusionTask, asked: ImageFiles, store: SketchStore, **common: Any
) -> SketchStore:
    """The sketches of the images to ask about; of those that came to the folder since, too."""
    from retrac_scale.api.sketch import sketch
    from retrac_scale.sketching.plans import QUERY_PLAN

    plan = None
    if project.timesteps == RECORDED:  # at the paper's, or as many as a short schedule has
        plan = replace(QUERY_PLAN, count=min(QUERY_PLAN.count, task.num_train_timesteps - 1))
    where: dict[str, Any] = {"timesteps": plan, "like": store, "grow": _has_grown(project.queries, asked)}
    return sketch(task, asked, project.queries, progress="queries", **where, **common)


def _added(url: str, images: ImageFiles, folder: str) -> list[str]:
    """Images that came to a folder since it was sketched.

    Raises:
        ValueError: some that were sketched are gone; names one.
    """
    there = _there(url)
    if there is None:
        return []
    known, now = {*map(str, there.ids.tolist())}, {*map(str, images.ids.tolist())}
    if gone := sorted(known - now):
        raise ValueError(
            f"{len(gone)} images that were sketched are not in {folder}, such as {gone[0]}: put them back, or begin "
            "another store with another out (--out)."
        )
    return sorted(now - known)


def _forgotten(url: str, images: ImageFiles) -> list[str]:
    """Images to ask about that are gone from their folder; where some are, so is their store then, which is soon made.

    Raises:
        ValueError: it is not of files, so that no command made it.
    """
    import fsspec

    there = _there(url)
    gone = [] if there is None else sorted({*map(str, there.ids.tolist())} - {*map(str, images.ids.tolist())})
    if there is not None and gone:
        if there.ids.dtype.kind in "iu":
            raise ValueError(f"{url} holds queries that are no files, such as {gone[0]}; put it elsewhere.")
        filesystem, place = fsspec.core.url_to_fs(url)
        filesystem.rm(place, recursive=True)
    return gone


def _has_grown(url: str, images: ImageFiles) -> bool:
    """Whether a store was begun with fewer images than there are."""
    there = _there(url)
    return there is not None and there.parts[0].shape[0] != len(images)


def _there(url: str) -> SketchStore | None:
    from retrac_scale.store import open_store

    try:
        return open_store(url)
    except (FileNotFoundError, ValueError):  # whatever else is there, sketch names it
        return None


def _told(store: SketchStore) -> str:
    n, t, k = store.shape
    c, m = len(store.checkpoints), len(store.measurements)
    size = sum(c * n * store.under(one).shape[1] * k * BYTES[store.meta["dtype"]] for one in store.measurements)
    more = (f", {c} checkpoints" if c > 1 else "") + (f", {m} measures" if m > 1 else "")
    return f"{n:,} images at {t} timesteps{more} in {store.url}, {in_bytes(size)}"


def _measured(project: Project) -> dict[str, Any]:
    """How training images are measured: as the project says, or as those of the store that is there already.

    Raises:
        ValueError: the project says otherwise than that store; names the entry and what to do.
    """
    from retrac_scale.task.timesteps import EvenlySpaced
    from retrac_scale.training.recorded import Recorded

    recorded = Recorded(project.path(project.record)) if project.timesteps == RECORDED else None
    there = _there(project.store)
    if there is None:
        plan = recorded or EvenlySpaced(project.timesteps, noise=project.noise)  # type: ignore[arg-type]
        return {"timesteps": plan, "projection": projection_of(project.rank, project.dim)}
    for entry, held in _held(there).items():
        said = getattr(project, entry)
        if entry in project.stated and said != held and not (recorded and entry == "noise"):
            raise ValueError(
                f"{project.store} was sketched with {entry} = {held!r}, but {FILE} or an option says {said!r}; say "
                f"{entry} = {held!r} to go on with it, or begin another store with another out (--out)."
            )
    return {"timesteps": recorded} if recorded else {}


def _held(store: SketchStore) -> dict[str, Any]:
    """A store's plan and projection as entries of the file.

    Raises:
        ValueError: no entries stand for its plan.
    """
    from retrac_scale.store.part import plans_of

    first = next(iter(plans_of(store.fingerprint)), {"kind": "given"})
    projection = store.fingerprint["projection"]
    if first["kind"] not in ("EvenlySpaced", "Explicit", "Recorded"):
        raise ValueError(
            f"{store.url} was not measured by a command, but given its sketches ({first['kind']}); begin another store "
            "with another out (--out)."
        )
    return {
        "timesteps": RECORDED if first["kind"] == "Recorded" else first.get("count", first.get("timesteps")),
        "noise": first.get("noise", "own"),
        "rank": 0 if projection["kind"] == "CountSketch" else projection.get("rank") or -1,
        "dim": projection.get("dim"),
    }


VERB = Verb(
    "sketch",
    "Sketch the gradients of a folder of images under a model, and of the images to ask about.",
    """  retrac-scale sketch                           what retrac-scale.toml says; run again, it goes on
  retrac-scale sketch --until 0.9 --at-most 16  measures again and again, until answers would repeat so far
  retrac-scale sketch --workers 16              in as many processes, one for each core
  retrac-scale sketch --replace                 images that were changed, under the same names, are sketched anew
  retrac-scale sketch --model model --images training-images --query-images generated-images
  retrac-scale sketch --model model --images folder --checkpoint early=epoch-10.pt --checkpoint late=model/unet
  retrac-scale sketch --timesteps recorded --record run/recorded      where the training met each image
  retrac-scale sketch --model sd --images folder                      a latent model: sd is a whole pipeline, captions
                                                are a column text of folder/metadata.jsonl, or .txt files
  retrac-scale sketch --model sd --images folder --checkpoint lora=lora.safetensors     what a LoRA has learnt
  retrac-scale sketch --model sd --images folder --size 256 --captions none     cut to 256 x 256; the empty prompt""",
    _options,
    _run,
)
