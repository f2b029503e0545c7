"""What the indexes of a service are to their stores now, and new ones at their places taken in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from retrac_scale.index.reader import StaleIndexError
from retrac_scale.report.content import Json
from retrac_scale.serve.library import Library

logger = logging.getLogger(__name__)

LOOK, AFTER_FAILURE = 2.0, 30.0
"""Seconds between two looks at the indexes' places, and after one that could not be loaded."""
KEPT = 2.0
"""Seconds for which what was seen is told again."""


class Follower:
    """Looks whether an index was built again at its place, and loads it while the old one answers.

    Args:
        library: what is served.
        renew: opens everything anew; None to stay with what is there.
        take: is given each new library, with what it says about itself.
    """

    def __init__(
        self, library: Library, renew: Callable[[], Library] | None, take: Callable[[Library, Json], object]
    ) -> None:
        self._library, self._renew, self._take = library, renew, take
        self._failed = False
        self._look: asyncio.Future[dict[str, str]] | None = None
        self._looked = 0.0

    async def state(self) -> dict[str, str]:
        """Of each index "ready", "behind" its store, with new samples, "loading", "not loaded", or "refused".

        As it was a few seconds ago at most: a look reads all commits of a store elsewhere, and anybody may ask.
        """
        now = time.monotonic()
        if self._look is None or (self._look.done() and now >= self._looked + KEPT):
            self._looked = now
            self._look = asyncio.ensure_future(asyncio.to_thread(self._states))
        return await asyncio.shield(self._look)  # others wait for it too, when one of them leaves

    def _states(self) -> dict[str, str]:
        return {name: self._state(name) for name in self._library.indexes}

    def _state(self, name: str) -> str:
        index = self._library.indexes[name]
        if not index.is_current:
            return "not loaded" if self._failed or self._renew is None else "loading"
        try:
            index.check_store()
        except StaleIndexError:
            return "refused"
        return "behind" if index.lacks else "ready"

    async def follow(self) -> None:
        """Look for ever."""
        while self._renew is not None:
            await asyncio.sleep(AFTER_FAILURE if self._failed else LOOK)
            try:
                if await asyncio.to_thread(lambda: self._library.is_current):
                    continue
                found = await asyncio.to_thread(self._loaded)
            except Exception as error:  # whatever it is, the old one goes on answering
                logger.warning("an index was built again and cannot be loaded: %s", error)
                self._failed = True
                continue
            self._failed = False
            self._library, self._look = found[0], None
            self._take(*found)

    def _loaded(self) -> tuple[Library, Json]:
        assert self._renew is not None
        library = self._renew()
        library.keep_uploads(self._library)
        for index in library.indexes.values():
            for number in range(len(index.chunks)):
                index.chunk(number)  # mapped and checked before anybody waits for it
        return library, library.about()
