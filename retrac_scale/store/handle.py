"""StoreHandle: a store as a task is given it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retrac_scale.store.reader import SketchStore, open_store
from retrac_scale.store.schema import Url, whereabouts


@dataclass(frozen=True, eq=False)
class StoreHandle:
    """A store here as it is; for workers where they open it, and under which measures."""

    here: SketchStore | None
    url: Url
    measure: str | list[str] | None

    @staticmethod
    def of(store: SketchStore, client: Any) -> StoreHandle:
        """For tasks here, where there is no client, or on its workers.

        Raises:
            ValueError: workers cannot open it.
        """
        if client is None:
            return StoreHandle(store, None, None)
        if store.url is None:
            raise ValueError("workers cannot reach a store in this process's memory; give it a path or URL.")
        return StoreHandle(None, whereabouts(store.url), store.fingerprint.get("measure"))

    def open(self) -> SketchStore:
        """The store."""
        return open_store(self.url, measure=self.measure) if self.here is None else self.here
