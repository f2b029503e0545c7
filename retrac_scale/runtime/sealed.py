"""Values that travel as bytes."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import cloudpickle


class Sealed:
    """A function, or any other value, as bytes that are opened where it is used, once there.

    A scheduler unpickles all that its graphs name, and would import torch for it: some 500 MB. And a worker hands on
    these bytes, whatever its tasks have done to the opened model meanwhile. This module imports nothing of ours.
    """

    def __init__(self, value: Any) -> None:
        from dask.utils import funcname

        name = funcname(value).strip("_") if callable(value) else type(value).__name__  # which Dask shows
        self.__setstate__((cloudpickle.dumps(value), name))

    def __getstate__(self) -> tuple[Any, str]:
        return pickle.PickleBuffer(self._bytes), self.__name__  # travels beside the pickle, without a copy

    def __setstate__(self, state: tuple[Any, str]) -> None:
        self._bytes, self.__name__ = state
        self._opening, self._opened = threading.Lock(), False

    def open(self) -> Any:
        """The value, the same one at every call."""
        with self._opening:
            if not self._opened:
                self._value, self._opened = pickle.loads(self._bytes), True
        return self._value

    def __call__(self, *args: Any) -> Any:
        """What the function returns; sealed arguments are opened for it."""
        return self.open()(*[arg.open() if isinstance(arg, Sealed) else arg for arg in args])


def itself(sealed: Sealed) -> Sealed:
    """A task that holds a value for others: when all workers that have it die, the scheduler runs it on another."""
    return sealed
