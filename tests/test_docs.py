"""The reference names everything public, and the examples in docstrings and pages run."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

import retrac_scale as rs
from retrac_scale.estimators import Estimator
from retrac_scale.projections import Projection
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


def test_estimators_projections_and_rules_of_the_package_are_imported_and_named() -> None:
    for known in (Estimator.kinds, Projection.kinds):
        ours = {name for name, kind in known.items() if kind.__module__.startswith("retrac_scale.")}
        assert ours <= set(rs.__all__)
    for folder, mark in (
        ("estimators", "@dataclass"),
        ("projections", "(Projection)"),
        ("gradients/rules", "register("),
    ):
        files = [file for file in (ROOT / "retrac_scale" / folder).glob("*.py") if mark in file.read_text()]
        assert files
        for file in files:
            assert f"retrac_scale.{folder.replace('/', '.')}.{file.stem}" in sys.modules, f"{file} is not imported"


def test_every_file_that_the_architecture_page_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    questions = re.findall(r"^\| (.*\?) \| .* \| (.*) \|$", page.split("## Where it is")[1], re.M)
    assert len(questions) >= 20
    for question, files in questions:
        for file in re.findall(r"`([^`]+)`", files):
            assert (ROOT / "retrac_scale" / file).is_file(), f"{question}: {file} is not there"


def test_no_word_has_two_places_in_the_glossary() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text().split("## Words of the code")[0]
    words = [
        word for line in re.findall(r"^\| (\*\*.*?) \|", page, re.M) for word in re.findall(r"\*\*(.+?)\*\*", line)
    ]
    assert len(words) >= 50
    assert len(words) == len(set(words))


def test_there_are_examples_in_docstrings() -> None:
    assert len(WITH_EXAMPLES) >= 3


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", sorted(set(pages.with_python()) - {"README.md"}))  # which tests/test_readme.py runs
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    pages.run(page, readers.BEFORE.get(page, {}), readers.INSTEAD.get(page, {}), tmp_path)


def test_no_python_is_passed_over_and_no_exception_outlives_its_page() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        assert len(re.findall(r"^ *```py", page.read_text(), re.M)) == len(list(pages.blocks(page))), page.name
    for name, printed in ((name, text) for name, texts in readers.INSTEAD.items() for text in texts):
        assert printed in (ROOT / name).read_text()
    for name, numbers in readers.BEFORE.items():
        assert max(numbers) < len(list(pages.blocks(ROOT / name)))
