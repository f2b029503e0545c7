"""Every compiled pass has a reference, and computes what it does, at sizes that are no whole tile of anything."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from retrac_scale.gradients.rules import normalization
from retrac_scale.projections import folding
from tests import house
from tests.native.references import PASSES, Pass

DRAWS = 25


@pytest.mark.parametrize("of", PASSES, ids=lambda of: of.compiled.py_func.__qualname__)
def test_a_compiled_pass_computes_what_its_reference_does(of: Pass) -> None:
    if not of.here:
        pytest.skip("this CPU has no such instructions")
    for seed in range(DRAWS):
        arguments = of.drawn(np.random.default_rng(seed))
        given = [copy.deepcopy(arguments) for _ in range(2)]
        returned = [work(*own) for work, own in zip((of.compiled, of.plain), given, strict=True)]
        assert returned[0] == returned[1]
        for place in of.written:
            found, expected = (own[place] for own in given)
            if of.bits:
                np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}")
            else:
                scale = float(np.abs(expected).max(initial=1e-3))
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale, err_msg=f"seed {seed}")


def test_every_compiled_function_that_python_calls_has_a_reference() -> None:
    found: list[Any] = [of.compiled for of in PASSES]  # which under --plain no module has
    for name, file in house.modules().items():
        if "@compiled" in (text := file.read_text()) or "(compiled," in text:
            values = vars(importlib.import_module(f"retrac_scale.{name}")).values()
            found += [value for value in values if isinstance(value, Dispatcher) and value not in found]
    called = {id(value.py_func.__globals__.get(name)) for value in found for name in value.py_func.__code__.co_names}
    by_python = {value for value in found if id(value) not in called} - {
        folding._share,
        normalization._share,
    }  # which compute nothing
    assert {of.compiled for of in PASSES} >= by_python
