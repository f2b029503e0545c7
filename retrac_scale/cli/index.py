"""The verb index."""

from __future__ import annotations

import argparse

from retrac_scale.cli.indexes import build_indexes, make_estimator
from retrac_scale.cli.project import find
from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", help="path or URL of a complete store")
    parser.add_argument("out", nargs="?", help="path or URL of the index to make")
    parser.add_argument("--estimator", default="ReTrac", help="TracIn, TRAK, ... (default: ReTrac)")
    parser.add_argument(
        "--pairing", choices=("cross", "matched"), default="cross", help="of timesteps (default: cross)"
    )
    parser.add_argument("--dtype", choices=("int8", "float16", "float32"), default="int8", help="default: int8")


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.index import build_index
    from retrac_scale.store import open_store

    if arguments.store is None:
        indexes = build_indexes(find(arguments.config))
    elif arguments.out is None:
        raise ValueError("say where the index shall be made: index STORE OUT.")
    else:
        estimator = make_estimator(arguments.estimator, arguments.pairing)
        built = build_index(open_store(arguments.store), estimator, arguments.out, dtype=arguments.dtype)
        indexes = {arguments.estimator: built}
    places = {name: str(index.url) for name, index in indexes.items()}
    return Answer("\n".join(str(index) for index in indexes.values()), {"indexes": places})


VERB = Verb(
    "index",
    "Collapse a store for one estimator, ready for queries.",
    """  retrac-scale index                                                 those of retrac-scale.toml
  retrac-scale index demo/sketches.zarr demo/retrac.zarr --estimator ReTrac
  retrac-scale index sketches.zarr matched.zarr --estimator ReTrac --pairing matched --dtype float16""",
    _options,
    _run,
)
