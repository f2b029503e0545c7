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
    project, notes = find(arguments.config), list[str]()
    if arguments.index is not None:
        found = _find_in(arguments.index, arguments.queries)
    else:
        notes = _ask_again(project, open_sketches(project))
        found = find_each(project)
    lines = [line for name, one in found.items() for line in lines_of(name, one)]
    data = {"check": {name: as_json(one) for name, one in found.items()}, "notes": notes}
    return Answer("\n".join([*lines, *(f"note: {note}" for note in notes)]), data, int(not _first(found).is_well))


def ask(
    project: Project, task: DiffusionTask, images: Any, store: SketchStore, *, check_all: bool = False
) -> list[Any]:
    """Sketch a dozen training images, plain and altered, like the store; kept, so that it is done once.

    Returns:
        ids of those that are others than when they were asked before; they are sketched anew.
    """
    from retrac_scale.api.sketch import sketch
    from retrac_scale.evaluate.originals import Altered
    from retrac_scale.task.timesteps import EvenlySpaced

    there = _asked(project)
    kept, before = (None, {}) if there is None else (_originals(there), _contents(there))
    recorded = project.timesteps == RECORDED
    asked = sketch(
        task,
        Altered(images, kept),
        project.checked,
        checkpoints=project.weights,
        timesteps=EvenlySpaced(OFTEN, noise="own") if recorded else None,
        like=store,
        replace=True,
        check_all=check_all,
        progress="training images, altered",
    )
    now, originals = _contents(asked), dict(zip(asked.ids.tolist(), asked.columns["original"].tolist(), strict=True))
    return list(dict.fromkeys(originals[one] for one, word in now.items() if before.get(one, word) != word))


def _asked(project: Project) -> SketchStore | None:
    """The altered images that were asked about before, None where none were."""
    from retrac_scale.store import open_store

    try:
        return open_store(project.checked)
    except (FileNotFoundError, ValueError):  # none, or begun and not laid out: whatever else is there, sketch names it
        return None


def _originals(asked: SketchStore) -> list[Any]:
    return list(dict.fromkeys(asked.columns["original"].tolist()))


def _contents(asked: SketchStore) -> dict[str, int]:
    """{query: digest of what was sketched of it}."""
    from retrac_scale.sketching.content import ITEM, stored_contents

    return dict(zip(asked.ids.tolist(), stored_contents(asked, asked.ids)[:, ITEM].tolist(), strict=True))


def _ask_again(project: Project, store: SketchStore) -> list[str]:
    """Ask about what is there now; sentences on images that have changed, and on what is not there.

    Raises:
        ValueError: the weights are others than those of the store, or nothing was asked before and cannot be now.
    """
    from retrac_scale.evaluate.originals import Altered

    task, there = None, _asked(project)
    try:
        task = project_task(project)
        images = project_images(project, project.images, task, project.store)
        tell(images, task, project.captions)
        if there is not None:
            Altered(images, _originals(there))  # tells which are gone
    except (ValueError, OSError) as error:
        if there is None or not _is_asked(project, there, store):
            raise
        if task is not None:
            _refuse_other_weights(task, project, store)
        return [f"the sketches of before were asked, for what they were made of is not there: {error}"]
    try:
        changed = ask(project, task, images, store)
    except ValueError:
        _refuse_other_weights(task, project, store)
        raise
    which = f"{len(changed)} of them are others than when they were sketched, such as {changed[0]}" if changed else ""
    return [f"{which}: asked as they are now"] if changed else []


def _refuse_other_weights(task: DiffusionTask, project: Project, store: SketchStore) -> None:
    """ValueError where the weights of a checkpoint are not those that a store was sketched with."""
    held = store.fingerprint.get("checkpoints", {})
    for name, place in project.weights.items():
        if name in held and task.load(name, place) != held[name]:
            raise ValueError(
                f"{place} holds other weights than those that checkpoint {name} of {store.url} was sketched with; put "
                "them back, or begin another store with another out (--out)."
            )


def find_each(project: Project) -> dict[str, Originals]:
    """What each of the project's indexes says about the training images that were asked; empty where none were."""
    from retrac_scale.evaluate.originals import find_originals

    if _asked(project) is None:
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


def _is_asked(project: Project, asked: SketchStore, store: SketchStore) -> bool:
    """Whether all that is asked is sketched already, at as many timesteps as the store has by now."""
    from retrac_scale.store.part import measures_in

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
