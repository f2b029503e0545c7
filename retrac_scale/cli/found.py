"""What lies at the places that a project names: models, checkpoints, a training record, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retrac_scale.cli.measured import recorded_ids, refuse_no_model
from retrac_scale.cli.project import RECORDED, Project
from retrac_scale.cli.told import prompts

LOOKED_AT = 200
"""Pictures that are decoded to see whether some are transparent."""


@dataclass(frozen=True)
class Model:
    """What a model's configuration tells.

    Attributes:
        line: on it.
        shape: width and height of the images that it takes, None where they are not known.
        latent: whether a VAE encodes them.
        prompted: whether a text encoder tells it what they show.
    """

    line: str
    shape: tuple[int, int] | None
    latent: bool
    prompted: bool


def look_at_model(project: Project) -> Model:
    """What lies where a project's model should.

    Raises:
        ValueError: there is none.
    """
    refuse_no_model(project.path(project.model))
    config = Path(project.denoiser, "config.json")
    if config.exists():
        try:
            found = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is no JSON: {error}.") from None
    else:
        found = _on_the_hub(project.model)
    size, channels = found.get("sample_size"), found.get("in_channels")
    shape = None if size is None else (size, size) if isinstance(size, int) else (size[1], size[0])
    parts = _parts(project)
    vae, prompted = "vae" in parts, any(part.startswith("text_encoder") for part in parts)
    takes = ("latents" if vae else "images") + ("" if shape is None else f" of {shape[0]} x {shape[1]}")
    name = f"{found.get('_class_name')}, takes {takes} in {channels} channel{'' if channels == 1 else 's'}"
    if vae:  # whose factor its pipeline tells, which takes long to load
        name += f", of the pipeline's VAE{', and is told prompts' if prompted else ''}"
    return Model(f"model: {project.denoiser}, {name}", None if vae else shape, vae, prompted)


def _parts(project: Project) -> list[str]:
    """The parts of a pipeline, none of a denoiser by itself."""
    place = project.path(project.model)
    if os.path.isdir(place):
        index = Path(place, "model_index.json")
        return list(json.loads(index.read_text(encoding="utf-8"))) if index.exists() else []
    import diffusers

    try:
        return list(diffusers.DiffusionPipeline.load_config(place))
    except OSError:
        return []


def _on_the_hub(name: str) -> dict[str, object]:
    import diffusers

    for folder in ("unet", "transformer", None):
        try:
            found: dict[str, object] = diffusers.AutoModel.load_config(name, subfolder=folder)
        except OSError as error:
            said = str(error).splitlines()[0]
            continue
        return found
    raise ValueError(f"there is no folder {name}, and on the hub no model was found under that name: {said}")


def look_at_images(project: Project, folder: str, model: Model) -> list[str]:
    """Lines on a folder of images.

    Raises:
        ValueError: it holds none, or they do not fit the model; says which.
    """
    from PIL import Image, ImageOps

    from retrac_scale.datasets import ImageFiles
    from retrac_scale.datasets.base import is_transparent, opaque

    dataset = ImageFiles([project.path(folder)], 3)
    files = dataset.ids.tolist()
    some = files[:: max(1, len(files) // LOOKED_AT)]
    transparent, wanted, resized = 0, model.shape, model.latent or bool(project.size)
    sizes = set()
    for file in some:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            sizes.add(upright.size)
            wanted = wanted or upright.size
            opaque(upright, project.background)  # tells a colour that is none
            transparent += is_transparent(upright)
        if upright.size != wanted and not resized:
            size = f"{upright.size[0]} x {upright.size[1]}, {'the model takes' if model.shape else 'the first'} "
            raise ValueError(
                f"{file} is {size}{wanted[0]} x {wanted[1]}; resize the images, or have it done by --size."
            )
    width, height = min(sizes)
    lines = [f"{folder}: {len(files):,} images of {width} x {height}{' and other sizes' if len(sizes) > 1 else ''}"]
    if resized:
        lines[0] += f", cut to {f'{project.size} x {project.size}' if project.size else 'what the VAE takes'}"
    lines[0] += f"; columns {', '.join(dataset.columns)}" if folder == project.images else ""
    if model.prompted:
        lines.append(f"  {prompts(dataset, project.captions, needed=folder == project.images)}")
    if transparent:
        how = f"they are put onto {project.background}"
        if not project.background:
            how = (
                "their transparency is dropped, as diffusers' training examples do; if the training put them onto a "
                "ground, name its colour by --background"
            )
        looked = f"{transparent} of {len(some)} looked at" if len(some) < len(files) else f"{transparent} of them"
        lines.append(f"  {looked} are transparent: {how}")
    return lines


def find_record(project: Project) -> str:
    """The folder of a training record in the model's folder or beside it; empty where there is none."""
    from retrac_scale.training.record import read_record

    for place in _around(project):
        for folder in (place, *(one for one in sorted(_folders(place)))):
            if read_record(folder) is not None:
                return os.path.relpath(folder, project.folder or ".")
    return ""


def look_at_record(project: Project) -> str:
    """A line on the training record.

    Raises:
        ValueError: it is of other samples than the project's images.
    """
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.training.record import read_record

    record = read_record(project.path(project.record)) if project.record else None
    names = ImageFiles([project.path(project.images)], 3).ids.tolist()
    ids = recorded_ids(project, names)
    assert record is not None
    how = "by their own ids"
    if record.ids is None:
        how = f"by their places, taken as the order of the files: 0 is {project.own_name(names[0])}"
    checkpoints = ", ".join(record.checkpoints) or "none"
    return f"record: {project.record}, of {len(ids):,} samples, {how}; checkpoints: {checkpoints}"


def find_weights(project: Project) -> tuple[dict[str, str], str]:
    """The checkpoints of a run in the model's folder or beside it, all averaged or all not, and a line on them."""
    from retrac_scale.task.checkpoints import find_checkpoints

    for place in _around(project):
        for ema in (True, False):
            try:
                found = find_checkpoints(place, ema=ema)
            except ValueError:  # none there, or not all of this kind
                continue
            kind = "averaged weights (EMA)" if ema else "the weights of each step"
            weights = {name: os.path.relpath(file, project.folder or ".") for name, file in found.items()}
            return weights, f"checkpoints: {len(found)} in {os.path.relpath(place)}, {', '.join(found)}; {kind} of all"
    return {}, ""


def used_weights(project: Project, found: dict[str, str]) -> dict[str, str]:
    """Of found checkpoints those that a project measures unless it is told otherwise: of a recorded training all.

    Raises:
        ValueError: the record has checkpoints of other names.
    """
    from retrac_scale.training.record import read_record

    if project.timesteps != RECORDED:
        return {}
    record = read_record(project.path(project.record))
    known = {} if record is None else record.checkpoints
    if used := {name: path for name, path in found.items() if name in known}:
        return used
    raise ValueError(
        f"the record in {project.record} has the checkpoints {_listed(list(known))}, beside the model lie "
        f"{_listed(list(found))}; say which weights are whose by --checkpoint NAME=weights, for each."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _around(project: Project) -> Iterator[Path]:
    """The folder of a model on this disk, and the one that it lies in."""
    model = Path(project.path(project.model))
    if model.is_dir():
        yield model
        yield Path(os.path.normpath(model.parent))


def _folders(place: Path) -> list[Path]:
    return [one for one in place.iterdir() if one.is_dir() and not one.name.startswith(".")]
