"""What cannot be captured, and which parameters."""

from __future__ import annotations

from collections.abc import Iterable


class UncapturableError(ValueError):
    """Per-sample gradients of some parameters cannot be formed; `parameters` names them."""

    def __init__(self, message: str, parameters: Iterable[str]) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)
