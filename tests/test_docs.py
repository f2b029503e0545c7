"""The reference names everything public, and the examples in docstrings and pages run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import retrac_scale as rs
from tests import pages, readers

ROOT = Path(__file__).parent.parent
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "retrac_scale").rglob("*.py")
    if ">>> " in file.read_text()
)


def test_the_reference_names_everything_public() -> None:
    named = re.findall(r"^::: retrac_scale\.(\w+)", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(rs.__all__)


def test_there_are_examples_in_docstrings() -> None:
    assert len(WITH_EXAMPLES) >= 3


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("page", sorted(set(pages.with_python()) - {"README.md"}))  # which tests/test_readme.py runs
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    pages.run(page, readers.BEFORE.get(page, {}), readers.INSTEAD.get(page, {}), tmp_path)
