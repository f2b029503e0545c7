"""The Python of a page of the documentation, run as a reader would: block by block, in one namespace and folder."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

Names = dict[str, Any]
Before = Callable[[Names], None]
"""Gives the names and files that the reader of a block has by then; may change to another folder."""


def with_python() -> list[str]:
    """The pages that have Python in them, by their places in the repository."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    return sorted(str(page.relative_to(ROOT)) for page in pages if any(blocks(page)))


def blocks(page: Path) -> Iterator[str]:
    """The blocks of a page, also those that stand in lists."""
    for _, block in re.findall(r"^( *)```python\n(.*?)^\1```$", page.read_text(), re.S | re.M):
        yield textwrap.dedent(block)


def run(page: str, before: Mapping[int, Before], instead: Mapping[str, str], folder: Path) -> Names:
    """Run a page; the names that it leaves.

    A block whose first line is the name of a file is that file: it is imported, and its tests are called.

    Args:
        page: its place in the repository.
        before: number of a block -> what its reader has.
        instead: what stands in the page -> what is run in its place.
        folder: an empty one, where the page runs.
    """
    names: Names = {"__name__": "__main__"}
    files: list[str] = []
    sys.path.insert(0, "")
    try:
        with chdir(folder):
            for number, block in enumerate(blocks(ROOT / page)):
                if number in before:
                    before[number](names)
                for printed, run_instead in instead.items():
                    block = block.replace(printed, run_instead)
                if file := re.match(r"# (\w+)\.py\n", block):
                    files.append(file[1])
                    Path(f"{file[1]}.py").write_text(block)
                    _run_tests(file[1])
                else:
                    exec(compile(block, f"{page}, block {number}", "exec"), names)
    finally:
        sys.path.remove("")
        for name in files:
            sys.modules.pop(name, None)
    return names


def _run_tests(name: str) -> None:
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    tests = [one for key, one in vars(module).items() if key.startswith("test_")]
    assert bool(tests) == name.startswith("test_")
    for test in tests:
        test()
