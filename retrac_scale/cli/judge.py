"""The verb judge."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", nargs="?", metavar="FILE", help=".npy with scores [queries, samples] of any method")
    parser.add_argument("--truth", metavar="NAME", help="what to judge by, such as emoji16-lds")
    parser.add_argument("--list", action="store_true", help="name the truths, with the shape that each expects")
    parser.add_argument("--draws", type=int, default=1000, help="resamples for the intervals (default: 1000)")


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.evaluate.judging import judge, truth, truths

    if arguments.list:
        known = [truth(name) for name in truths()]
        width = max((len(one.name) for one in known), default=0)
        lines = [f"{one.name:{width}}  {list(one.shape)!s:11}  {one.sentence}; {_asked(one.kinds)}" for one in known]
        data = [
            {"name": one.name, "shape": list(one.shape), "queries": dict(one.kinds), "holds": one.sentence}
            for one in known
        ]
        return Answer("\n".join(lines), {"truths": data})
    if arguments.scores is None or arguments.truth is None:
        raise ValueError("give a .npy file and --truth NAME, or --list to see the truths.")
    found = judge(arguments.scores, arguments.truth, draws=arguments.draws)
    return Answer(str(found), found.to_dict())


def _asked(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


VERB = Verb(
    "judge",
    "How right are the scores of any method? Metrics with intervals, against models that were retrained.",
    """  retrac-scale judge --list                               the truths, and the shape that each expects
  retrac-scale judge scores.npy --truth emoji16-lds       rows: queries; columns: training samples; in seconds""",
    _options,
    _run,
)
