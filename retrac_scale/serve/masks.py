"""Which samples count for expressions: the masks that were asked for last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from retrac_scale.arrays import Bools


class Masks:
    """Masks `[n]` by index and expression; any thread may ask.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[str, str], Bools] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._kept

    def get(self, key: tuple[str, str], make: Callable[[], Bools]) -> Bools:
        """The mask of a key, made unless it is kept; no thread waits for another's."""
        with self._lock:
            found = self._kept.get(key)
        made = make() if found is None else found
        with self._lock:
            self._kept[key] = made
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made
