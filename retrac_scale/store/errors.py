"""What a store raises rather than answer wrongly."""

from __future__ import annotations


class IncompleteStoreError(RuntimeError):
    """Some blocks that were asked for have not been committed yet."""


class DamagedStoreError(ValueError):
    """A chunk or a metadata file is missing or is not what was written."""
