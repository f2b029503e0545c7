"""The verb completion."""

from __future__ import annotations

import argparse

from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _run(arguments: argparse.Namespace) -> Answer:
    import shtab

    from retrac_scale.cli.main import parser  # at call time: the parser holds this verb

    script = shtab.complete(parser(), arguments.shell)
    return Answer(script, {"shell": arguments.shell, "script": script})


VERB = Verb(
    "completion",
    "Print a script that completes commands and options in a shell.",
    """  retrac-scale completion bash > ~/.local/share/bash-completion/completions/retrac-scale
  retrac-scale completion zsh > "${fpath[1]}/_retrac-scale\"""",
    _options,
    _run,
)
