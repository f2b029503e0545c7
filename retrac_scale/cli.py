"""retrac-scale: the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

EXAMPLES = {
    "": """examples:
  retrac-scale demo                             train, sketch, index, query, report: the whole street on real digits
  retrac-scale info demo/sketches.zarr          what is in a store or an index
  retrac-scale query demo/retrac.zarr demo/queries.zarr
  retrac-scale report demo/tracin.zarr demo/retrac.zarr --queries demo/queries.zarr \\
      --images demo/images.npy --query-images demo/generated.npy --out report.html""",
    "demo": """examples:
  retrac-scale demo                             into ./demo
  retrac-scale demo --out /tmp/digits           elsewhere; run it again to continue or to see the result again""",
    "info": """examples:
  retrac-scale info demo/sketches.zarr          a store: checkpoints, samples, timesteps, what is committed
  retrac-scale info demo/retrac.zarr            an index: its estimator and size
  retrac-scale info s3://bucket/sketches.zarr   any fsspec URL""",
    "query": """examples:
  retrac-scale query demo/retrac.zarr demo/queries.zarr           a table of the top 10 of every query
  retrac-scale query demo/retrac.zarr demo/queries.zarr -k 3 --side opponents
  retrac-scale query demo/retrac.zarr demo/queries.zarr --json > answers.json""",
    "report": """examples:
  retrac-scale report demo/retrac.zarr --queries demo/queries.zarr \\
      --images demo/images.npy --query-images demo/generated.npy --out report.html
  several indexes stand beside each other on the page:
  retrac-scale report demo/tracin.zarr demo/retrac.zarr --queries demo/queries.zarr ...""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 on a failure that is told in one line, 2 on wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError, KeyError, RuntimeError) as error:
        print(f"retrac-scale: {error.args[0] if error.args else error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrac-scale",
        description="Which training samples made a diffusion model produce this one?",
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="command")

    def verb(name: str, run: object, help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=help,
            description=help,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    demo = verb("demo", _demo, "Train a small model on scanned digits and attribute what it draws.")
    demo.add_argument("--out", default="demo", help="folder for everything (default: demo)")
    info = verb("info", _info, "Say what is in a store or an index.")
    info.add_argument("url", help="path or fsspec URL")
    query = verb("query", _query, "Print the training samples that influenced each query most.")
    query.add_argument("index", help="path or URL of an index")
    query.add_argument("queries", help="path or URL of the store of query sketches")
    query.add_argument("-k", type=int, default=10, help="results per query (default: 10)")
    query.add_argument("--side", choices=("proponents", "opponents"), default="proponents")
    query.add_argument("--json", action="store_true", help="JSON instead of a table")
    report = verb("report", _report, "Write a self-contained HTML page of queries and their results.")
    report.add_argument("index", nargs="+", help="paths or URLs of indexes")
    report.add_argument("--queries", required=True, help="store of query sketches")
    report.add_argument("--images", required=True, help=".npy of training images [n, h, w(, 3)], in the index's order")
    report.add_argument("--query-images", required=True, help=".npy of query images, in the order of the queries")
    report.add_argument("--out", default="report.html", help="file to write (default: report.html)")
    report.add_argument("-k", type=int, default=10, help="results per query (default: 10)")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from retrac_scale import demo

    demo.run(arguments.out)


def _info(arguments: argparse.Namespace) -> None:
    import zarr

    from retrac_scale.index import Index, open_index
    from retrac_scale.store import open_store
    from retrac_scale.store.schema import ATTRIBUTE

    try:
        meta = zarr.open_group(arguments.url, mode="r").attrs.get(ATTRIBUTE)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no store or index at {arguments.url}.") from None
    if isinstance(meta, dict) and meta.get("what") == "index":
        index: Index = open_index(arguments.url)
        c, n, k = index.shape
        print(f"index of {index.estimator}\n{c} checkpoints x {n} samples x {k} entries, {index.meta['dtype']}")
        print(f"made from {index.meta['store']}")
        return
    store = open_store(arguments.url)
    n, t, k = store.shape
    print(f"sketch store, {n} samples x {t} timesteps x {k} entries, {store.meta['dtype']}")
    for key in ("projection", "measure", "timesteps"):
        print(f"{key}: {store.fingerprint.get(key, 'not stated')}")
    for name, weight in store.weights.items():
        done = store.committed(name)
        print(f"checkpoint {name}: weight {weight:.4g}, {done.sum()} of {len(done)} blocks committed")


def _query(arguments: argparse.Namespace) -> None:
    from retrac_scale.index import open_index
    from retrac_scale.store import open_store

    answer = open_index(arguments.index).query(open_store(arguments.queries), arguments.k, side=arguments.side)
    print(answer.to_json() if arguments.json else answer.to_frame().to_string(index=False))


def _report(arguments: argparse.Namespace) -> None:
    import numpy as np

    from retrac_scale.index import open_index
    from retrac_scale.report import Pictures, write_report
    from retrac_scale.store import open_store

    indexes = [open_index(url) for url in arguments.index]
    queries = open_store(arguments.queries)
    images, query_images = (np.load(file, allow_pickle=False) for file in (arguments.images, arguments.query_images))
    answers = {}
    for index, url in zip(indexes, arguments.index, strict=True):
        title = str(index.meta["estimator"]["kind"])
        answers[title if title not in answers else f"{title} ({url})"] = index.query(queries, arguments.k)
    print(write_report(arguments.out, answers, Pictures(images, indexes[0].ids, query_images)))


if __name__ == "__main__":
    sys.exit(main())
