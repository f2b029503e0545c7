"""Classes that files name: known by their names alone, in every process that has imported them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")

BARE = {"__module__", "__doc__", "__dict__", "__weakref__"}
"""What a class has before anything stands in it."""


def enter(kinds: dict[str, type[T]], cls: type[T], noun: str) -> None:
    """Make a class known by its name; the same class defined again, in a notebook's cell, takes the place of the first.

    Args:
        kinds: name -> class, of one base.
        cls: that has just been made.
        noun: what one is called, for the error.

    Raises:
        ValueError: another class has the name.
    """
    known = kinds.get(cls.__name__)
    bare = vars(cls).keys() <= BARE
    if known is not None and (_module(known) != _module(cls) or (known.__qualname__ != cls.__qualname__ and not bare)):
        raise ValueError(
            f"there is {noun} named {cls.__name__} already, {_module(known)}.{known.__qualname__}, and files know one "
            f"by this name alone: give {_module(cls)}.{cls.__qualname__} another name."
        )
    if known is None or not bare:  # cloudpickle makes a bare class before it sees that the one it sent is still here
        kinds[cls.__name__] = cls


def find(kinds: Mapping[str, type[T]], name: Any, noun: str) -> type[T]:
    """The class of a name.

    Raises:
        ValueError: none that was imported here has it.
    """
    if name not in kinds:
        raise ValueError(
            f"{noun} named {name!r} is not known in this process: import the module that defines it first, on Dask's "
            "workers by client.upload_file."
        )
    return kinds[name]


def described(one: object) -> dict[str, Any]:
    """The name of an instance's class and its fields, for a file.

    Raises:
        ValueError: the class has no fields that could be written down.
    """
    cls = type(one)
    if not is_dataclass(one) or isinstance(one, type):
        raise ValueError(f"{cls.__name__} needs @dataclass(frozen=True) above it: its fields are written into files.")
    return {"kind": cls.__name__, **asdict(one)}


def _module(cls: type) -> str:
    """A program's own, also where multiprocessing has imported it anew for a worker."""
    return "__main__" if cls.__module__ == "__mp_main__" else cls.__module__
