"""The verb report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.check import find_each
from retrac_scale.cli.indexes import open_asked, open_indexes, picture_names
from retrac_scale.cli.measured import names_of
from retrac_scale.cli.project import Project, find
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    import numpy.typing as npt

    from retrac_scale.query.index import Index
    from retrac_scale.store import SketchStore


def _options(parser: argparse.ArgumentParser) -> None:
    add_sources(parser)
    parser.add_argument("--out", help="file to write (default: report.html)")
    parser.add_argument("-k", type=int, default=10, help="results per query and side (default: 10)")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Options that say what a page shows."""
    parser.add_argument("index", nargs="*", help="paths or URLs of indexes of the same samples")
    parser.add_argument(
        "--queries", action="append", help="store of query sketches: once for all indexes, or once for each, in order"
    )
    parser.add_argument(
        "--images", help=".npy of training images [n, h, w(, 3)], in the index's order; default: ids are paths"
    )
    parser.add_argument("--query-images", help="likewise of query images, in the order of the queries")
    parser.add_argument("--title", default="Attributions", help="heading of the page")


def open_queries(urls: Sequence[str], indexes: Mapping[str, Index]) -> dict[str, SketchStore]:
    """The store of queries of each index: one for all, or one for each in their order.

    Raises:
        ValueError: there are neither one nor as many.
    """
    each = list(urls) * len(indexes) if len(urls) == 1 else urls
    if each and len(each) != len(indexes):
        raise ValueError(f"got {len(each)} --queries for {len(indexes)} indexes; give one for all, or one for each.")
    return {name: open_asked(url, index) for url, (name, index) in zip(each, indexes.items(), strict=False)}


def project_queries(project: Project, given: str = "--queries STORE") -> str:
    """The project's store of queries.

    Args:
        project: that is asked.
        given: how a command is told of others.

    Raises:
        FileNotFoundError: there is none; says what to do.
    """
    from retrac_scale.store import open_store

    try:
        open_store(project.queries)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there are no queries at {project.queries}: say what is asked by {given}, or name the folder of "
            "images to ask about (query_images, --query-images) and run `retrac-scale sketch`."
        ) from None
    return project.queries


def still_there(project: Project, asked: SketchStore) -> tuple[SketchStore, list[str]]:
    """The project's queries without those whose pictures are gone, if not all are, and a sentence on these."""
    from retrac_scale.store.taking import take

    ids = asked.ids.tolist()
    kept = [name for name in ids if any(os.path.isfile(os.path.join(at, str(name))) for at in (project.folder, ""))]
    if not kept or len(kept) == len(ids):
        return asked, []
    gone = sorted(set(ids) - set(kept))
    told = f"{len(gone)} of {len(ids)} pictures that were asked about are gone, such as {gone[0]}, and left out"
    return take(asked, kept), [f"{told}; `retrac-scale sketch` forgets them"]


def unsketched(project: Project, asked: npt.NDArray[Any]) -> list[str]:
    """A sentence on files that came to the folder of images to ask about after it was sketched, if any did."""
    from retrac_scale.datasets import ImageFiles

    folder = project.path(project.query_images)
    if not project.query_images or not os.path.isdir(folder):
        return []
    names = ImageFiles([folder]).ids.tolist()
    own = names_of(project, project.query_images, names, project.queries)
    new = sorted(set(own) - set(asked.tolist()))
    if not new:
        return []
    which = f"{len(new)} files in {project.query_images} were not asked about, such as {new[0]}"
    return [f"{which}: run `retrac-scale sketch`"]


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.report import Pictures, norm_curve, read_images, write_report
    from retrac_scale.report.content import sides

    project = find(arguments.config)
    indexes = open_indexes(arguments.index, project)
    queries = open_queries(arguments.queries or [project_queries(project)], indexes)
    notes: list[str] = []
    if not arguments.queries:
        found = {name: still_there(project, one) for name, one in queries.items()}
        queries, notes = {name: one for name, (one, _) in found.items()}, next(iter(found.values()))[1]
    first = next(iter(indexes.values()))
    store = first.check_store()
    images = read_images(arguments.images, picture_names(first), project.folder, project.background)
    asked = next(iter(queries.values())).ids
    shown = read_images(arguments.query_images, asked, project.folder, project.background)
    pictures = Pictures(images, first.ids, shown)
    answers = {name: index.query(queries[name], arguments.k, side=sides(index)) for name, index in indexes.items()}
    curve = norm_curve(store) if store is not None and store.has("timestep") else None
    out = arguments.out or ("report.html" if arguments.index else project.place("report.html"))
    common = {"title": arguments.title, "curve": curve, "indexes": indexes, "queries": queries}
    checked = {} if arguments.index else find_each(project)
    write_report(out, answers, pictures, check=checked or None, **common)
    notes += [] if arguments.queries else unsketched(project, asked)
    lines = [out, *(f"note: {note}" for note in notes)]
    return Answer("\n".join(lines), {"report": out})


VERB = Verb(
    "report",
    "Write a self-contained HTML page of queries and their results.",
    """  retrac-scale report                                           what retrac-scale.toml says
  retrac-scale report attribution/retracridge.zarr attribution/trak.zarr     its queries, under other indexes
  retrac-scale report demo/tracin.zarr demo/retrac.zarr --queries demo/queries.zarr \\
      --images demo/images.npy --query-images demo/generated.npy --out report.html""",
    _options,
    _run,
)
