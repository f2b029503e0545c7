"""Models and images as the library takes them, from what a command says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.query.index import Index
    from retrac_scale.sketching.samples import Samples
    from retrac_scale.task.diffusion import DiffusionTask


def load_denoiser(place: str) -> Any:
    """A denoiser from a diffusers folder or the hub, in float32, of whatever variant it is.

    Raises:
        ValueError: there is none.
    """
    import diffusers

    from retrac_scale.task.weights import with_variant

    if os.path.isdir(place) and not os.path.isfile(f"{place}/config.json"):
        raise ValueError(f"{place} holds no diffusers model: neither config.json, nor unet/ or transformer/.")
    folder = _within(place, ("", "unet", "transformer"), diffusers.AutoModel.load_config, "model")
    return with_variant(diffusers.AutoModel.from_pretrained, place, subfolder=folder)


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


def image_files(paths: Sequence[str], task: DiffusionTask) -> ImageFiles:
    """Image files, and those of folders, in as many channels as the model takes.

    Raises:
        ValueError: the model takes no images, but latents.
    """
    from retrac_scale.datasets import ImageFiles

    channels = int(task.model.config.in_channels)  # type: ignore[union-attr, arg-type]
    if channels not in (1, 3):
        raise ValueError(
            f"the model takes {channels} channels, latents of a VAE; the command line measures models of pixels: in "
            "Python, give rs.sketch the task of rs.DiffusionTask.from_pretrained(folder), which encodes images."
        )
    files = ImageFiles(paths, channels)
    files.advice = "repair it, or take it away"
    return files


def measured_like(
    index: Index, model: str, checkpoints: Mapping[str, str], timesteps: int | None, device: str
) -> Samples:
    """How images are measured as the index's store was; without a dataset.

    Args:
        index: of a store that `sketch` made.
        model: folder or hub name of the denoiser.
        checkpoints: {name: weights}.
        timesteps: None for those of the store, with its noise where that is common; else so many, evenly spaced.
        device: where to compute.

    Raises:
        ValueError: that store cannot be had, or was not made by `sketch`.
    """
    import diffusers

    from retrac_scale.sketching.samples import Samples
    from retrac_scale.store.part import plans_of
    from retrac_scale.task.diffusion import DiffusionTask
    from retrac_scale.task.measures import measure_named
    from retrac_scale.task.timesteps import EvenlySpaced

    store = index.check_store()
    if store is None or "scheduler" not in store.fingerprint:
        raise ValueError("images can only be sketched like a store that sketch(...) made and that is still there.")
    config = dict(store.fingerprint["scheduler"])
    scheduler = getattr(diffusers, config.pop("class"))(**config)
    forward = store.fingerprint.get("forward") or store.fingerprint  # as earlier releases told it
    measured = {**measure_named(store.fingerprint["measure"]), "autocast": forward.get("autocast")}
    task = DiffusionTask(load_denoiser(model), scheduler, device=device, **measured)
    common = any(plan.get("noise") == "common" for plan in plans_of(store.fingerprint))
    plan = None if timesteps is None else EvenlySpaced(timesteps, noise="common" if common else "own")
    return Samples((), task, dict(checkpoints), plan)
