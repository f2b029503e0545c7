"""Functions that only workers unpickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle


class Sealed:
    """A function that travels as bytes and is opened where it is called.

    A scheduler unpickles all that its graphs name, and would import torch for it: some 500 MB. This module imports
    nothing of ours.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._bytes = cloudpickle.dumps(function)

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        return pickle.loads(self._bytes)(*args)
