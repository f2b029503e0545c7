"""Parsing, running a verb, telling what came of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from retrac_scale.cli import (
    check,
    completion,
    demo,
    index,
    info,
    init,
    judge,
    plan,
    project,
    query,
    report,
    serve,
    sketch,
    verify,
)
from retrac_scale.cli.spoken import spoken
from retrac_scale.cli.verb import Verb

VERBS = (
    *(demo.VERB, init.VERB, sketch.VERB, check.VERB, report.VERB, query.VERB, serve.VERB, index.VERB),
    *(info.VERB, verify.VERB, plan.VERB, judge.VERB, completion.VERB),
)
EXAMPLES = f"""examples:
  retrac-scale demo                             train, sketch, index, query, report: the whole street on real digits
  retrac-scale init --model model --images training-images --query-images generated-images
  retrac-scale sketch                           both folders, as {project.FILE} says; ends with a check
  retrac-scale report                           who made the model draw the generated images: report.html
  retrac-scale info demo/sketches.zarr          what is in a store or an index

{project.FILE} in the working directory, which `init` writes, says what is left out of a command; options come first.

exit status: 0 done; 1 failed, told in one line, or check: originals do not come first; 2 wrong usage;
3 verify: sound but not complete; 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and print what it found; the exit status, see `retrac-scale --help`."""
    arguments = parser().parse_args(argv)
    try:
        answer = arguments.run(arguments)
        print(json.dumps(answer.data) if arguments.json else spoken(answer.text), flush=True)
        status: int = answer.status
        return status
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("retrac-scale: interrupted; the same command goes on from there.", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        print(_told(error, arguments.json), file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    whole = argparse.ArgumentParser(
        prog="retrac-scale",
        description="Which training samples made a diffusion model produce this one?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = whole.add_subparsers(required=True, metavar="command")
    for verb in VERBS:
        _add(verbs, verb)
    return whole


def _add(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Verb) -> None:
    added = verbs.add_parser(
        verb.name,
        help=verb.help,
        description=verb.help,
        epilog="examples:\n" + verb.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_options(added)
    added.add_argument("--json", action="store_true", help="print JSON, errors too")
    added.add_argument("--debug", action="store_true", help="show where an error comes from")
    added.add_argument("--config", metavar="FILE", help=f"in place of {project.FILE}; its paths are relative to it")
    added.set_defaults(run=verb.run)


def _told(error: Exception, as_json: bool) -> str:
    expected = (ValueError, FileNotFoundError, KeyError, RuntimeError)
    said = str(error.args[0] if error.args and isinstance(error, expected) else error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif not isinstance(error, expected):
        said = f"{type(error).__name__}: {said}; --debug shows where"
    said = spoken(" ".join(said.split()))
    return json.dumps({"error": said}) if as_json else f"retrac-scale: {said}"
