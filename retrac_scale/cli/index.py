"""The verb index."""

from __future__ import annotations

import argparse
from typing import Any

from retrac_scale.cli.indexes import (
    build_indexes,
    make_estimator,
    of_measure,
    open_sketches,
    place_of,
    recommended_of,
    refresh_beside,
    with_options,
)
from retrac_scale.cli.project import find, parted
from retrac_scale.cli.verb import Answer, Verb

DAMPING_HELP = """of ReTracRidge, TRAK, RelatIF, RenormIF, DTRAK, DAS: what is added to a Gram matrix before it is
inverted, in units of its mean eigenvalue, so that the scale of gradients does not matter; the more, the nearer the
scores come to plain inner products; auto is 0.5, where two halves of the measurements agree best; where you have
retrained models to judge by, try 0.01 to 10 (default: auto)"""
OPTIONS = ("pairing", "damping", "directions")
"""Of an estimator."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", help="path or URL of a complete store")
    parser.add_argument("out", nargs="?", help="path or URL of the index to make")
    parser.add_argument(
        "--estimator",
        help="ReTracRidge, ReTrac, TracIn, TRAK, ... (default: what the store is made for, ReTracRidge where its noise "
        "is common, else ReTrac)",
    )
    parser.add_argument(
        "--measure",
        type=parted,
        metavar="MEASURE[,MEASURE]",
        help="of a store that was measured in several ways (default: its first); scores of several are added up",
    )
    parser.add_argument("--pairing", choices=("cross", "matched"), help="of timesteps (default: the estimator's)")
    parser.add_argument("--damping", type=_damping, metavar="auto|NUMBER", help=DAMPING_HELP)
    parser.add_argument("--directions", action="store_true", default=None, help="of TRAK and its kin: unit gradients")
    parser.add_argument("--dtype", choices=("int8", "float16", "float32"), help="default: int8")


def _damping(given: str) -> float | str:
    try:
        return given if given == "auto" else float(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"give auto or a number, not {given!r}") from None


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.api.index import build_index
    from retrac_scale.estimators import recommended
    from retrac_scale.store import open_store

    options = {name: getattr(arguments, name) for name in OPTIONS}
    every = ("estimator", "measure", *OPTIONS, "dtype")
    given = [name for name in every if getattr(arguments, name) is not None]
    project, notes = find(arguments.config), list[str]()
    if arguments.store is None and not given:
        indexes = build_indexes(project)
        beside, notes = refresh_beside(project, indexes)
        indexes |= beside
    elif arguments.store is not None and arguments.out is None:
        raise ValueError("say where the index shall be made: index STORE OUT.")
    elif arguments.store is None and arguments.estimator is None:
        raise ValueError(f"--{given[0]} is for one index: say of which --estimator.")
    else:
        if arguments.estimator is not None:
            with_options(make_estimator(arguments.estimator), options)  # first: what is no option of it is told at once
        given_store = arguments.store is not None
        measures = arguments.measure
        store = open_store(arguments.store, measure=measures) if given_store else open_sketches(project, measures)
        if arguments.estimator is None:
            store, plain = recommended_of(store)
        elif measures is None:
            store, plain = of_measure(arguments.estimator, store)
        else:
            plain = make_estimator(arguments.estimator)
            plain = recommended(store) if store.fingerprint.get("measure") in plain.measures else plain
        estimator = with_options(plain, options)
        place = arguments.out or place_of(project, estimator, store)
        name = type(estimator).__name__
        shown: dict[str, Any] = {"dtype": arguments.dtype or "int8", "progress": f"index of {name}"}
        indexes = {name: build_index(store, estimator, place, **shown)}
    places = {name: str(index.url) for name, index in indexes.items()}
    lines = [f"{name}: {index.shape[1]:,} samples in {index.url}" for name, index in indexes.items()]
    return Answer("\n".join([*lines, *(f"note: {note}" for note in notes)]), {"indexes": places})


VERB = Verb(
    "index",
    "Collapse a store for one estimator, ready for queries.",
    """  retrac-scale index                                                 those of retrac-scale.toml and beside them
  retrac-scale index --estimator trak                                of its store, beside them
  retrac-scale index --estimator ReTracRidge --measure mse,mean_squared_output    scores of both, added up
  retrac-scale index sketches.zarr index.zarr                        by the estimator recommended for the store
  retrac-scale index demo/sketches.zarr demo/retrac.zarr --estimator ReTrac
  retrac-scale index sketches.zarr matched.zarr --estimator ReTrac --pairing matched --dtype float16
  retrac-scale index sketches.zarr trak.zarr --estimator TRAK --pairing matched --directions --damping 0.5
  retrac-scale index sketches.zarr d-trak.zarr --estimator DTRAK --measure mean_squared_output
  retrac-scale index sketches.zarr both.zarr --measure mse,mean_squared_output""",
    _options,
    _run,
)
