"""What cannot be captured, or came out wrong, and which parameters."""

from __future__ import annotations

from collections.abc import Iterable


class UncapturableError(ValueError):
    """Per-sample gradients of some parameters cannot be formed; `parameters` names them."""

    def __init__(self, message: str, parameters: Iterable[str]) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)


def used_elsewhere(name: str) -> UncapturableError:
    """Of a parameter that a gradient reaches past all layers."""
    return UncapturableError(
        f"parameter {name!r} is used outside its own layer's forward, where its per-sample gradient cannot be "
        "captured; leave it out with parameters=, or call its layer.",
        [name],
    )


class GradientMismatchError(RuntimeError):
    """The gradient of a sample in a batch is not its gradient alone."""
