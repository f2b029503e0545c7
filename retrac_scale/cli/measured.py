"""Models and images as the library takes them, from what a command says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.indexes import measures_of
from retrac_scale.cli.project import FILE, RECORDED, Project
from retrac_scale.cli.told import look_beside

if TYPE_CHECKING:
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.query.index import Index
    from retrac_scale.sketching.samples import Samples
    from retrac_scale.task.diffusion import DiffusionTask
    from retrac_scale.task.encoding import Encoder


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Of a repository: owner/name."""


def refuse_no_model(place: str) -> None:
    """ValueError unless a place holds a model in diffusers' layout, or may be a name on the hub."""
    if os.path.isfile(place):
        raise ValueError(f"{place} is a file; give the diffusers folder of the model, or its name on the hub.")
    if os.path.isdir(place):
        if not any(os.path.isfile(os.path.join(place, name, "config.json")) for name in ("", "unet", "transformer")):
            raise ValueError(f"{place} holds no diffusers model: neither config.json, nor unet/ or transformer/.")
    elif not HUB_NAME.fullmatch(place) or os.path.isdir(place.split("/")[0]):
        raise ValueError(f"there is no folder {place}, and no model on the hub is called so; give owner/name for one.")


def refuse_no_device(device: str) -> None:
    """ValueError unless torch can compute there."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ValueError(
            f"device is {device!r}, by {FILE} or --device, and torch has none such here: {said}."
        ) from None


def project_task(project: Project) -> DiffusionTask:
    """The task of a project: its model, loaded, and its scheduler."""
    from retrac_scale.task.diffusion import DiffusionTask

    refuse_no_device(project.device)
    refuse_no_model(project.denoiser)
    measures: Any = measures_of(project)
    scheduler = load_scheduler(project.scheduler)
    denoiser, encoder = load_adapted(project.path(project.model), project.weights)
    measured = {"measure": measures if len(measures) > 1 else measures[0], "device": project.device}
    return DiffusionTask(denoiser, scheduler, encoder=encoder, **measured)


def project_images(project: Project, folder: str, task: DiffusionTask, store: str) -> ImageFiles:
    """The images in a folder of the project; their ids do not depend on where the command is run.

    Training images that are measured where they were trained have the record's ids, which their noise was drawn by.

    Args:
        project: whose folder it is.
        folder: as the project names it.
        task: that the images are for.
        store: URL of the store that they are, or were, sketched into.
    """
    import numpy as np

    from retrac_scale.columns import as_column

    files = image_files([project.path(folder)], task, project.size)
    files.background = project.background
    names = names_of(project, folder, files.ids.tolist(), store)
    if project.timesteps == RECORDED and folder == project.images:
        files.columns = {**files.columns, "path": as_column(names)}
        files.ids = recorded_ids(project, names)
    else:
        files.ids = np.array(names)
    return files


def names_of(project: Project, folder: str, files: Sequence[str], store: str) -> list[str]:
    """What a project calls files of a folder, however that is spelled: as a store of them does, if there is one.

    A store that was begun with an absolute folder has absolute names; others are relative to the project.
    """
    known = _known(store)
    absolute = os.path.isabs(next(iter(known), folder))
    names = [os.path.abspath(file) if absolute else project.own_name(file) for file in files]
    if others := set(known) - set(names):  # the store's are spelled otherwise, or gone
        spelled = {os.path.abspath(os.path.join(project.folder, name)): name for name in others}
        names = [spelled.get(os.path.abspath(file), name) for file, name in zip(files, names, strict=True)]
    return names


def _known(url: str) -> list[str]:
    """The names of the files that a store was made of; none where there is no store, or none of files."""
    from retrac_scale.store import open_store

    try:
        store = open_store(url)
    except (FileNotFoundError, ValueError):  # whatever else is there, sketch names it
        return []
    names = store.columns.get("path", store.ids)
    return [] if names.dtype.kind in "iu" else [str(name) for name in names.tolist()]


def recorded_ids(project: Project, names: Sequence[str]) -> Any:
    """The ids that a training record has for files, `[n]`; of places in the training set, those in the files' order.

    Raises:
        ValueError: there is no record, or it is of other samples; says which.
    """
    import numpy as np

    from retrac_scale.training.record import read_record

    folder = project.path(project.record)
    record = read_record(folder) if project.record else None
    if record is None:
        where = f"{folder} holds none" if project.record else "none is given"
        raise ValueError(f"recorded timesteps need the training record, and {where}; give its folder by --record.")
    if record.ids is None:
        if record.n_samples != len(names):
            raise ValueError(
                f"the record in {folder} is of {record.n_samples} samples, named by their places in the training set, "
                f"and there are {len(names)} images; give the folder that was trained on, or let the recorder name the "
                "samples: TrainingRecorder(path, dataset, scheduler)."
            )
        return np.arange(len(names))
    known = {str(sample): sample for sample in record.ids.tolist()}
    found = [by_ending(name, known) for name in names]
    if None in found:
        name = names[found.index(None)]
        raise ValueError(
            f"the record in {folder} names samples such as {next(iter(known))!r}, and none of them is {name!r}; give "
            "the folder that was trained on."
        )
    return np.array([known[name] for name in found if name is not None], dtype=record.ids.dtype)


def by_ending(name: str, known: Mapping[str, Any]) -> str | None:
    """Of known names the longest that a file's path ends with, at a slash."""
    parts = name.split("/")
    return next((ending for cut in range(len(parts)) if (ending := "/".join(parts[cut:])) in known), None)


def load_denoiser(place: str) -> Any:
    """A denoiser from a diffusers folder or the hub, in float32, of whatever variant it is.

    Raises:
        ValueError: there is none.
    """
    import diffusers

    from retrac_scale.task.weights import with_variant

    refuse_no_model(place)
    folder = _within(place, ("", "unet", "transformer"), diffusers.AutoModel.load_config, "model")
    return with_variant(diffusers.AutoModel.from_pretrained, place, subfolder=folder)


def load_encoded(place: str) -> tuple[Any, Encoder | None]:
    """The denoiser of a place, and what encodes pixels and prompts for it where the place is a pipeline with such.

    Raises:
        ValueError: there is no denoiser.
    """
    import diffusers

    from retrac_scale.task.checkpoints import COMPONENTS
    from retrac_scale.task.encoding import Encoder, load_pipeline

    refuse_no_model(place)
    try:
        parts = diffusers.DiffusionPipeline.load_config(place)
    except OSError:  # a denoiser by itself
        parts = {}
    if not any(name == "vae" or name.startswith("text_encoder") for name in parts):
        return load_denoiser(place), None
    pipeline = load_pipeline(place)
    return next(pipeline.components[name] for name in COMPONENTS if name in pipeline.components), Encoder(pipeline)


def load_adapted(place: str, checkpoints: Mapping[str, str]) -> tuple[Any, Encoder | None]:
    """`load_encoded`; a denoiser whose checkpoints are adapters has them, and they alone are differentiated.

    Raises:
        ValueError: there is no denoiser, it is one that a command cannot feed, or some checkpoints are adapters alone.
    """
    from retrac_scale.task.checkpoints import add_adapters, hold_adapters

    denoiser, encoder = load_encoded(place)
    if encoder is not None and getattr(encoder.pipeline, "controlnet", None) is not None:
        raise ValueError(
            f"{place} has a ControlNet, whose images come with others that control them; sketch it in Python: "
            "rs.DiffusionTask.from_pretrained(folder, component='controlnet')."
        )
    own = place.rstrip("/")  # its weights need not be looked into
    others = {name: path for name, path in checkpoints.items() if own not in (path, os.path.dirname(path))}
    if hold_adapters(denoiser, others):
        add_adapters(denoiser, next(iter(others.values())), None if encoder is None else type(encoder.pipeline))
    return denoiser, encoder


def load_scheduler(place: str) -> Any:
    """The noise scheduler of a pipeline, of the kind that its configuration names.

    Raises:
        ValueError: there is none.
    """
    import diffusers

    if os.path.isdir(place) and not os.path.isfile(f"{place}/scheduler_config.json"):
        raise ValueError(f"there is no scheduler_config.json in {place}, in scheduler/ within it, or beside it.")
    read = diffusers.DDPMScheduler.load_config
    folder = _within(place, ("", "scheduler"), read, "scheduler")
    named = read(place, subfolder=folder).get("_class_name", "DDPMScheduler")
    return getattr(diffusers, named).from_pretrained(place, subfolder=folder)


def _within(place: str, folders: Sequence[str], read: Callable[..., Any], what: str) -> str | None:
    """The folder of a local folder or of a repository on the hub in which diffusers finds a configuration."""
    said = ""
    for folder in folders:
        try:
            read(place, subfolder=folder or None)
            return folder or None
        except OSError as error:
            said = said or str(error).splitlines()[0]
    raise ValueError(f"there is no {what} at {place}, neither here nor on the hub: {said}")


def image_files(
    paths: Sequence[str], task: DiffusionTask, size: int = 0, shape: tuple[int, int, int] | None = None
) -> ImageFiles:
    """Image files, and those of folders, in as many channels as the model or its VAE takes.

    Args:
        paths: of files and folders.
        task: that they are for.
        size: of the square that they are cut to; 0: what latents are made of, and pixels stay as they are.
        shape: of the pictures that latents are made of, if not as the model's configuration has it.

    Raises:
        ValueError: the model takes no images, or it is not known of which size; says what to do.
    """
    from retrac_scale.datasets import ImageFiles

    channels = int(task.model.config.in_channels)  # type: ignore[union-attr, arg-type]
    if size < 0:
        raise ValueError(f"--size {size}: give the pixels of a square.")
    encoder = None if task.encoder is None or task.encoder.vae is None else task.encoder
    if encoder is not None:
        channels = _channels_of(encoder, task, channels)
        _, height, width = shape or task.picture_shape or (channels, size, size)
        size = size or (height if height == width else 0)
        if not size:
            raise ValueError("the model does not tell of which square its images are: say it by --size.")
        if size % (cell := encoder.cell[1] if encoder.cell else 1):
            raise ValueError(f"--size {size}: give a multiple of {cell}, the width of what becomes one latent.")
    if channels not in (1, 3):
        raise ValueError(
            f"the model takes {channels} channels, latents of a VAE that is not with it: give the --model of a whole "
            "pipeline, the folder with model_index.json."
        )
    files = ImageFiles(paths, channels, size=size or None)
    look_beside(files, paths)
    files.advice = "repair it, or take it away"
    return files


def _channels_of(encoder: Encoder, task: DiffusionTask, taken: int) -> int:
    """Of the images that a VAE encodes; ValueError where a model takes more than what the VAE makes of an image."""
    from retrac_scale.task.calling import layout_of

    assert encoder.cell is not None
    config, what = encoder.vae.config, ""
    if encoder.cell[0] > 1:
        what = "videos"
    elif layout_of(task.model) is None and taken != int(config.get("latent_channels") or taken):
        what = f"{taken} channels, the VAE's {config['latent_channels']} and others beside them"
    if what:
        raise ValueError(
            f"the model takes {what}, which no folder of images gives; sketch it in Python with a dataset of your own: "
            "rs.sketch(rs.DiffusionTask.from_pretrained(folder), dataset, ...)."
        )
    return int(config.get("in_channels") or 3)


def region_told(box: str | None, mask: str | None, all_but: bool) -> Any:
    """What --region, --mask and --all-but say, as `Regions` takes it; None for whole images.

    Raises:
        ValueError: it is no box or no picture, or two are given, or none to be left out.
    """
    if box is not None and mask is not None:
        raise ValueError("give --region or --mask, not both.")
    found: Any = None
    if box is not None:
        try:
            found = tuple(int(part) for part in box.split(","))
        except ValueError:
            found = ()
        if len(found) != 4:
            raise ValueError(f"--region {box}: give four whole numbers of pixels, as in 0,0,16,8.")
    elif mask is not None:
        import numpy as np
        from PIL import Image

        try:
            with Image.open(mask) as image:
                found = np.asarray(image.convert("L"), np.float32) / 255
        except OSError as error:
            raise ValueError(f"--mask {mask} cannot be read as a picture: {error}.") from None
    if all_but and found is None:
        raise ValueError("--all-but needs a --region or a --mask.")
    if not all_but:
        return found
    from retrac_scale.task.regions import AllBut  # needs torch

    return AllBut(found)


def measured_like(
    index: Index, model: str, checkpoints: Mapping[str, str], timesteps: int | None, device: str
) -> Samples:
    """How images are measured as the index's store was; without a dataset.

    Args:
        index: of a store that `sketch` made.
        model: folder or hub name of the denoiser, or of the pipeline that encodes pixels and prompts for it.
        checkpoints: {name: weights}.
        timesteps: None for those of the store, with its noise where that is common; else so many, evenly spaced.
        device: where to compute.

    Raises:
        ValueError: that store cannot be had, or was not made by `sketch`.
    """
    import diffusers

    from retrac_scale.sketching.samples import Samples
    from retrac_scale.store.part import measures_in, plans_of
    from retrac_scale.task.diffusion import DiffusionTask
    from retrac_scale.task.measures import OUTPUTS, measure_named
    from retrac_scale.task.timesteps import EvenlySpaced

    refuse_no_device(device)
    store = index.check_store()
    if store is None or "scheduler" not in store.fingerprint:
        raise ValueError(
            "images can only be sketched like a store that `retrac-scale sketch` made and that is still there."
        )
    config = dict(store.fingerprint["scheduler"])
    scheduler = getattr(diffusers, config.pop("class"))(**config)
    forward = store.fingerprint.get("forward") or store.fingerprint  # as earlier releases told it
    names = dict.fromkeys([*measures_in(store.fingerprint), *store.measurements])
    told = list(map(measure_named, names))
    loss = next((one for one in told if one["measure"] not in OUTPUTS), told[0])  # outputs know no weighting
    every = [one["measure"] for one in told if one["measure"] in OUTPUTS or one["weighting"] == loss["weighting"]]
    measured = {**loss, "measure": every, "autocast": forward.get("autocast")}
    denoiser, encoder = load_adapted(model, checkpoints)
    task = DiffusionTask(denoiser, scheduler, device=device, encoder=encoder, **measured)
    common = any(plan.get("noise") == "common" for plan in plans_of(store.fingerprint))
    plan = None if timesteps is None else EvenlySpaced(timesteps, noise="common" if common else "own")
    return Samples((), task, dict(checkpoints), plan)
