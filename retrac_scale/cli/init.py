"""The verb init."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from retrac_scale.cli import found
from retrac_scale.cli.project import FILE, RECORDED, Project, add_options, need, overruled, told_entries
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
    need(project.model, "--model")
    need(project.images, "--images")
    project, beside, told = _look(project)
    file.write_text(project.dumps(beside), encoding="utf-8")
    options = f" --config {arguments.config}" if arguments.config else ""
    text = "\n".join([*told, f"wrote {file}; next: retrac-scale sketch{options}, then retrac-scale report{options}"])
    return Answer(text, {"config": str(file), "told": told})


def _ask(project: Project, prompt: Callable[[str, str], str]) -> Project:
    told = told_entries()
    missing = [
        name for name in ("model", "images", "query_images", "out") if getattr(project, name) == getattr(Project, name)
    ]
    said = {name: prompt(f"{name.replace('_', ' ')}: {told[name]}", getattr(project, name)) for name in missing}
    return replace(project, **said)  # type: ignore[arg-type]


def _prompt(text: str, default: str) -> str:
    return input(f"{text}{f' [{default}]' if default else ''}: ").strip() or default


def _look(project: Project) -> tuple[Project, dict[str, str], list[str]]:
    """The project with what lies beside its model, checkpoints that are found and not used, and what to tell of it all.

    Raises:
        ValueError: a place lacks what it should hold, images do not fit the model, or a measure is none; says which.
    """
    from retrac_scale.task.measures import checked

    model = found.look_at_model(project)
    checked(project.measures)
    told = [model.line]
    for folder in filter(None, (project.images, project.query_images)):
        told += found.look_at_images(project, folder, model)
    if not project.record:
        project = replace(project, record=found.find_record(project))
    recorded = project.timesteps == RECORDED
    if recorded:
        told.append(found.look_at_record(project))
    elif project.record:
        told.append(f"record: {project.record}; --timesteps {RECORDED} measures where it says")
    beside, line = ({}, "") if project.checkpoints else found.find_weights(project)
    if recorded and not project.checkpoints:
        project = replace(project, checkpoints=found.used_weights(project, beside))
        beside = {}
    if line and beside:
        line += "; in the file as comments: the model's own weights alone are measured, which is the recommended recipe"
    told += [line] if line else []
    if recorded or project.noise == "own":  # products at the same timestep would be the luck of two draws
        measure = project.measure if "measure" in project.stated else "mse"  # they average timesteps, of one function
        project = replace(project, noise="own", measure=measure, estimators=("TracIn", "ReTrac"))
    return project, beside, told


VERB = Verb(
    "init",
    f"Write {FILE} by asking for the model and the data.",
    """  retrac-scale init                             asks for what it is not told
  retrac-scale init --model model --images training-images --query-images generated-images
  retrac-scale init --model model --images training-images --background white        pictures with transparency
  retrac-scale init --model sd --images folder --checkpoint lora=lora.safetensors     a latent model and its LoRA;
                                                captions are a column text of folder/metadata.jsonl, or .txt files
  retrac-scale init --model run --images training-images --timesteps recorded        by the training's own record""",
    _options,
    _run,
)
