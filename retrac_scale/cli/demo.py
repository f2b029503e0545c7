"""The verb demo."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from retrac_scale.cli.beforehand import preparing
from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", help="folder for everything (default: demo)")


def _run(arguments: argparse.Namespace) -> Answer:
    trained = (Path(arguments.out) / "generated.pt").exists()
    with contextlib.nullcontext() if trained else preparing():
        from retrac_scale import demo

        with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
            demo.run(arguments.out)
    return Answer("", {"out": arguments.out, "report": f"{arguments.out}/report.html"})


VERB = Verb(
    "demo",
    "Train a small model on scanned digits and attribute what it draws.",
    """  retrac-scale demo                             into ./demo
  retrac-scale demo --out /tmp/digits           elsewhere; run it again to continue or to see the result again""",
    _options,
    _run,
)
