"""The notebooks run from top to bottom and print what is committed with them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"\d[\d,.]*")
LONG = ("01", "02", "03", "05", "07")
ALL = [pytest.param(one, marks=[pytest.mark.slow] * one.name.startswith(LONG), id=one.stem) for one in NOTEBOOKS]


def committed(cell: dict[str, Any]) -> str:
    return "".join(
        "".join(output["text"])
        for output in cell["outputs"]
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )


def comparable(cell: dict[str, Any], text: str) -> str:
    """Of cells tagged "measured", whose figures depend on the machine, the words; of others everything."""
    measured = "measured" in cell["metadata"].get("tags", ())
    return " ".join(NUMBER.sub("#", text).split()) if measured else text


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("notebook", ALL)
def test_a_notebook_prints_what_is_committed_with_it(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", "20000")
    matplotlib.use("agg")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
        assert comparable(cell, printed.getvalue()) == comparable(cell, committed(cell)), f"cell {number}"


def test_every_cell_was_run_in_order_without_an_error() -> None:
    assert len(NOTEBOOKS) == 7
    for notebook in NOTEBOOKS:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), notebook.name
        kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
        assert kinds <= {"stream", "display_data", "execute_result"}, notebook.name
