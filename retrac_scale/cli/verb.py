"""What a verb of the command line is, and gives."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a verb found: text for people, data for `--json`, and the exit status."""

    text: str
    data: Mapping[str, Any]
    status: int = 0


@dataclass(frozen=True)
class Verb:
    """A verb: its options, what it does, and examples for its help."""

    name: str
    help: str
    examples: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Answer]
