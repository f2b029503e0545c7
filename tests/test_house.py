"""The package is a street: a room imports from rooms before it, and none is too large to be read."""

from __future__ import annotations

from tests import house


def test_the_street_names_every_room_and_there_are_few() -> None:
    assert sorted(house.street()) == sorted(house.rooms())
    assert len(house.rooms()) <= 22


def test_no_room_imports_from_one_further_along_the_street_but_by_the_declared_door() -> None:
    assert house.against_the_street() == set()
    every = {pair for pairs in house.arrows().values() for pair in pairs}
    assert every >= house.DOORS  # a door that nobody uses is none


def test_nothing_is_too_long_to_be_read() -> None:
    assert house.too_long() == []


def test_a_module_that_is_named_differently_is_found_by_its_imports() -> None:
    assert "api.sketch" in set(house.imports("demo"))  # by a public name
    assert "report" in set(house.imports("query.topk"))  # within a function
    assert "store" in {other.partition(".")[0] for other in house.imports("index.reader")}
