"""Estimators and projections are known by their names: one class has one, and who does not know it says so."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import retrac_scale as rs
from retrac_scale.estimators import Estimator, estimator_from_spec
from retrac_scale.projections import Projection, from_spec

CELL = """
from dataclasses import dataclass
import retrac_scale as rs

@dataclass(frozen=True)
class Scaled(rs.Estimator):
    by: float = {by}

    def vectors(self, sketches, norms):
        return self.by * sketches
"""


@pytest.fixture(autouse=True)
def known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test defines is forgotten after it."""
    monkeypatch.setattr(Estimator, "kinds", dict(Estimator.kinds))
    monkeypatch.setattr(Projection, "kinds", dict(Projection.kinds))


def run_cell(by: float) -> Any:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(CELL.format(by=by), names)
    return names["Scaled"]


def test_a_name_that_another_class_has_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"an estimator named ReTrac already, retrac_scale\.estimators\.inner\.ReTrac"):
        type("ReTrac", (rs.Estimator,), {"__module__": "mine", "vectors": lambda self, sketches, norms: sketches})
    with pytest.raises(ValueError, match=r"name alone: give mine\.Identity another name\.$"):
        type("Identity", (rs.projections.Projection,), {"__module__": "mine", "bind": lambda self, *_: None})
    assert Estimator.kinds["ReTrac"] is rs.ReTrac
    assert Projection.kinds["Identity"] is rs.Identity


def test_two_classes_of_one_module_do_not_share_a_name() -> None:
    def one() -> None:
        @dataclass(frozen=True)
        class Mine(rs.TRAK):
            extra: int = 1

    def other() -> None:
        @dataclass(frozen=True)
        class Mine(rs.TRAK):
            extra: int = 1

    one()
    one()  # the same again
    with pytest.raises(ValueError, match=r"one\.<locals>\.Mine, .* give .*other\.<locals>\.Mine another name") as error:
        other()
    assert "\n" not in str(error.value)


def test_a_cell_that_is_run_again_takes_the_place_of_the_first() -> None:
    run_cell(1.0)
    again = run_cell(2.0)
    assert estimator_from_spec({"kind": "Scaled", "by": 3.0}) == again(3.0)
    assert (
        estimator_from_spec(again().spec()).vectors(np.ones((1, 1, 1), np.float32), np.ones((1, 1), np.float32))[0] == 2
    )


def test_what_is_pickled_by_value_leaves_the_class_as_it_is() -> None:
    kind = run_cell(2.0)
    assert type(cloudpickle.loads(cloudpickle.dumps(kind()))) is kind
    assert Estimator.kinds["Scaled"] is kind


def test_a_class_without_fields_to_write_down_is_told_what_is_missing() -> None:
    class Plain(rs.Estimator):
        def vectors(self, sketches: Any, norms: Any) -> Any:
            return sketches

    with pytest.raises(ValueError, match=r"Plain needs @dataclass\(frozen=True\)"):
        Plain().spec()


def test_a_projection_that_is_not_known_here_and_one_that_never_was_are_told_apart() -> None:
    with pytest.raises(ValueError, match="a projection named 'Mine' is not known in this process: import the module"):
        from_spec({"kind": "Mine", "dim": 4})
    given = rs.write_store(None, {"final": np.ones((3, 1, 4), np.float32)})
    with pytest.raises(ValueError, match="given to write_store"):
        from_spec(given.fingerprint["projection"])


def test_who_has_not_imported_the_module_is_told_to_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(CELL.format(by=2.0))
    monkeypatch.syspath_prepend(tmp_path)
    store = rs.write_store(tmp_path / "store", {"final": np.ones((3, 1, 4), np.float32)})
    rs.build_index(store, importlib.import_module("mine").Scaled(), tmp_path / "index")
    del sys.modules["mine"], Estimator.kinds["Scaled"]  # as in a process that has not imported it
    index = rs.open_index(tmp_path / "index")
    with pytest.raises(ValueError, match="an estimator named 'Scaled' is not known in this process: import the module"):
        index.query(store, k=1)
    importlib.import_module("mine")
    np.testing.assert_allclose(index.query(store, k=1).scores, 2 * 2 * 4, rtol=1e-2)
    del sys.modules["mine"]
