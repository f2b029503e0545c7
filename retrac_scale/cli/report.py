"""The verb report."""

from __future__ import annotations

import argparse

from retrac_scale.cli.indexes import open_indexes
from retrac_scale.cli.project import find
from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    add_sources(parser)
    parser.add_argument("--out", help="file to write (default: report.html)")
    parser.add_argument("-k", type=int, default=10, help="results per query and side (default: 10)")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Options that say what a page shows."""
    parser.add_argument("index", nargs="*", help="paths or URLs of indexes of the same samples")
    parser.add_argument("--queries", help="store of query sketches")
    parser.add_argument(
        "--images", help=".npy of training images [n, h, w(, 3)], in the index's order; default: ids are paths"
    )
    parser.add_argument("--query-images", help="likewise of query images, in the order of the queries")
    parser.add_argument("--title", default="Attributions", help="heading of the page")


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.report import Pictures, norm_curve, read_images, write_report
    from retrac_scale.report.content import sides
    from retrac_scale.store import open_store

    project = find(arguments.config)
    indexes = open_indexes(arguments.index, project)
    if arguments.index and not arguments.queries:
        raise ValueError("say what is asked: --queries STORE.")
    queries = open_store(arguments.queries or project.queries)
    first = next(iter(indexes.values()))
    store = first.check_store()
    images = read_images(arguments.images, first.ids, project.folder)
    pictures = Pictures(images, first.ids, read_images(arguments.query_images, queries.ids, project.folder))
    answers = {name: index.query(queries, arguments.k, side=sides(index)) for name, index in indexes.items()}
    curve = norm_curve(store) if store is not None and store.has("timestep") else None
    out = arguments.out or ("report.html" if arguments.index else project.place("report.html"))
    common = {"title": arguments.title, "curve": curve, "indexes": indexes, "queries": queries}
    return Answer(str(write_report(out, answers, pictures, **common)), {"report": out})


VERB = Verb(
    "report",
    "Write a self-contained HTML page of queries and their results.",
    """  retrac-scale report                                           what retrac-scale.toml says
  retrac-scale report demo/tracin.zarr demo/retrac.zarr --queries demo/queries.zarr \\
      --images demo/images.npy --query-images demo/generated.npy --out report.html""",
    _options,
    _run,
)
