"""The verb init."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrac_scale.cli.project import FILE, Project, add_options, need, overruled
from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--force", action="store_true", help="overwrite the file")


def _run(arguments: argparse.Namespace) -> Answer:
    file = Path(arguments.config or FILE)
    if file.exists() and not arguments.force:
        raise ValueError(f"{file} is there already; edit it, or overwrite it with --force.")
    project = overruled(Project(folder=str(file.parent) if file.parent != Path() else ""), arguments)
    if sys.stdin.isatty():
        project = _ask(project, _prompt)
    if project.noise == "own":  # products at the same timestep would be the luck of two draws
        project = replace(project, estimators=("TracIn", "ReTrac"))
    need(project.model, "--model")
    need(project.images, "--images")
    told = _look(project)
    file.write_text(project.dumps(), encoding="utf-8")
    text = "\n".join([*told.values(), f"wrote {file}; next: retrac-scale sketch, then retrac-scale report"])
    return Answer(text, {"config": str(file), **told})


def _ask(project: Project, prompt: Callable[[str, str], str]) -> Project:
    questions = {
        "model": "Model (diffusers folder or hub name)",
        "images": "Folder of training images",
        "query_images": "Folder of images to ask about (empty for none)",
        "out": "Folder for the results",
    }
    missing = {name: text for name, text in questions.items() if getattr(project, name) == getattr(Project, name)}
    told: dict[str, Any] = {name: prompt(text, getattr(project, name)) for name, text in missing.items()}
    return replace(project, **told)


def _prompt(text: str, default: str) -> str:
    return input(f"{text}{f' [{default}]' if default else ''}: ").strip() or default


def _look(project: Project) -> dict[str, str]:
    """What stands at the places that the project names.

    Raises:
        ValueError: a folder lacks what it should hold, or images do not fit the model; says which.
    """
    from PIL import Image, ImageOps

    from retrac_scale.datasets import ImageFiles

    told, shape = {}, None
    if os.path.isfile(project.path(project.model)):
        raise ValueError(f"{project.model} is a file; give the diffusers folder of the model, or its name on the hub.")
    if os.path.isdir(project.path(project.model)):
        config = Path(project.denoiser, "config.json")
        if not config.exists():
            raise ValueError(f"{project.model} holds no diffusers model: no config.json, unet/ or transformer/.")
        try:
            found = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is no JSON: {error}.") from None
        size = found.get("sample_size")
        shape = None if size is None else (size, size) if isinstance(size, int) else (size[1], size[0])
        takes = f"images of {size} in {found.get('in_channels')} channels"
        told["model"] = f"model {project.denoiser}: {found.get('_class_name')}, {takes}"
    for name in ("images", "query_images"):
        if folder := getattr(project, name):
            files = ImageFiles([project.path(folder)], 3).ids
            with Image.open(files[0]) as first:
                own = ImageOps.exif_transpose(first).size
            if shape is not None and own != shape:
                raise ValueError(
                    f"{files[0]} is {own[0]} x {own[1]}, the model takes {shape[0]} x {shape[1]}; resize the images."
                )
            told[name] = f"{folder}: {len(files)} images of {own[0]} x {own[1]}"
    return told


VERB = Verb(
    "init",
    f"Write {FILE} by asking for the model and the data.",
    """  retrac-scale init                             asks for what it is not told
  retrac-scale init --model model --images training-images --query-images generated-images""",
    _options,
    _run,
)
