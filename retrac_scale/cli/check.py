"""The verb check."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.indexes import build_indexes, measures_of, open_asked, open_sketches
from retrac_scale.cli.measured import project_images, project_task
from retrac_scale.cli.project import RECORDED, Project, find
from retrac_scale.cli.told import tell
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from retrac_scale.evaluate.originals import Originals
    from retrac_scale.store import SketchStore
    from retrac_scale.task.diffusion import DiffusionTask

OFTEN = 20
"""Timesteps at which images are asked about where the training side was measured where it was trained."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", nargs="?", help="path or URL of an index (default: those of the project)")
    parser.add_argument("queries", nargs="?", help="of one: a store of images that rs.evaluate.Altered altered")


def _run(arguments: argparse.Namespace) -> Answer:
    project = find(arguments.config)
    if arguments.index is not None:
        found = _find_in(arguments.index, arguments.queries)
    else:
        store = open_sketches(project)
        if not _is_asked(project, store):
            task = project_task(project)
            images = project_images(project, project.images, task, project.store)
            tell(images, task, project.captions)
            ask(project, task, images, store)
        found = find_each(project)
    text = "\n".join(line for name, one in found.items() for line in lines_of(name, one))
    return Answer(text, {"check": {name: as_json(one) for name, one in found.items()}}, int(not _first(found).is_well))


def ask(
    project: Project,
    task: DiffusionTask,
    images: Any,
    store: SketchStore,
    *,
    replace: bool = False,
    check_all: bool = False,
) -> None:
    """Sketch a dozen training images, plain and altered, like the store; kept, so that it is done once."""
    from retrac_scale.api.sketch import sketch
    from retrac_scale.evaluate.originals import Altered
    from retrac_scale.store import open_store
    from retrac_scale.task.timesteps import EvenlySpaced

    try:
        kept = list(dict.fromkeys(open_store(project.checked).columns["original"].tolist()))
    except FileNotFoundError:
        kept = None
    recorded = project.timesteps == RECORDED
    sketch(
        task,
        Altered(images, kept),
        project.checked,
        checkpoints=project.weights,
        timesteps=EvenlySpaced(OFTEN, noise="own") if recorded else None,
        like=store,
        replace=replace,
        check_all=check_all,
        progress="training images, altered",
    )


def find_each(project: Project) -> dict[str, Originals]:
    """What each of the project's indexes says about the training images that were asked; empty where none were."""
    from retrac_scale.evaluate.originals import find_originals
    from retrac_scale.store import open_store

    try:
        open_store(project.checked)
    except FileNotFoundError:
        return {}
    indexes = build_indexes(project)
    return {name: find_originals(index, open_asked(project.checked, index)) for name, index in indexes.items()}


def lines_of(name: str, found: Originals) -> list[str]:
    """What a verb prints of it."""
    return [f"check of {name}: {found}", *(f"  likely: {cause}" for cause in found.causes)]


def as_json(found: Originals) -> dict[str, Any]:
    """Its figures."""
    counts = {how: {"first": first, "of": count} for how, (first, count) in found.counts.items()}
    return {"well": found.is_well, "meaning": found.meaning, "first": counts, "causes": list(found.causes)}


def _find_in(index: str, queries: str | None) -> dict[str, Originals]:
    from retrac_scale.evaluate.originals import find_originals
    from retrac_scale.query.index import open_index

    if queries is None:
        raise ValueError("give the store of altered images too: check INDEX QUERIES.")
    opened = open_index(index)
    return {type(opened.estimator).__name__: find_originals(opened, open_asked(queries, opened))}


def _is_asked(project: Project, store: SketchStore) -> bool:
    """Whether all that is asked is sketched already, at as many timesteps as the store has by now."""
    from retrac_scale.store import open_store
    from retrac_scale.store.part import measures_in

    try:
        asked = open_store(project.checked)
    except FileNotFoundError:
        return False
    if not set(measures_of(project)) & set(store.measurements) <= set(asked.measurements):
        return False
    asked = asked.under(*measures_in(store.fingerprint))
    return asked.is_complete and (project.timesteps == RECORDED or asked.shape[1] == store.shape[1])


def _first(found: Mapping[str, Originals]) -> Originals:
    return next(iter(found.values()))


VERB = Verb(
    "check",
    "Ask about training images, plain and altered a little: does each find its original?",
    """  retrac-scale check                            a dozen images of the project; sketch ends with the same
                                                exit status 0: originals come first, 1: they do not
  retrac-scale check demo/retracridge.zarr demo/check.zarr      those of the demo""",
    _options,
    _run,
)
