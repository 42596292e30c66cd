"""What was used lately, and no more than that."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any


class Lru:
    """A dictionary of the `most` entries that were put or looked up last; for all threads."""

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()  # guards _entries
        self._entries: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any) -> Any:
        """The value, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: Any, value: Any) -> None:
        """Remember it; the one that was used longest ago may be forgotten."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)
