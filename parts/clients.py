"""ROUTER_CLIENTS_FILE: whose key a request comes with. `name: key` a line, changed live.

A bad edit keeps the last good lines in force, like one of routes.json; one log line and /health
say what is wrong. Keys are kept as digests only: nothing here could show one.
"""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from parts.errors import RoutesError
from parts.livefile import LOOK_EVERY_S, YOUNG_S, mark_of, read_file
from parts.logs import now_text
from parts.settings import SettingsError, check_key

log = logging.getLogger("llm_router")

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MOST = 1000  # clients: each request compares its key with all of theirs, 0.2 ms for so many
DEFAULT = "default"  # who comes with ROUTER_API_KEY, or with no key where none is wanted


class Clients:
    """The names behind keys. SettingsError when the file cannot be used at the start."""

    def __init__(self, path: Path | None, taken: tuple[str, ...] = (),
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        self._path = path
        self._taken = [digest_of(key) for key in taken if key]  # keys that are no client's
        self._clock = clock
        self._next_look = 0.0
        self._seen: tuple[int, ...] = ()
        self._clients: tuple[tuple[bytes, str], ...] = ()
        self.error: str | None = None
        self.since = ""
        if path:
            self._look()
            if self.error:
                raise SettingsError(f"ROUTER_CLIENTS_FILE: {path}: {self.error}")

    def __bool__(self) -> bool:
        return self._path is not None

    def name_of(self, key: str) -> str:
        """Whose `key` it is, '' for nobody's. It takes as long for a wrong one."""
        if not self._path:
            return ""
        if self._clock() >= self._next_look:  # two threads may look at once, to no harm
            self._look()
        found, digest = "", digest_of(key)
        for other, name in self._clients:
            if hmac.compare_digest(digest, other):
                found = name
        return found

    def health(self) -> dict[str, Any]:
        """For GET /health: {status: ok or stale, count, error, since}."""
        shown: dict[str, Any] = {"status": "stale" if self.error else "ok",
                                 "count": len(self._clients)}  # fmt: skip
        return shown | ({"error": self.error, "since": self.since} if self.error else {})

    def _look(self) -> None:
        self._next_look = self._clock() + LOOK_EVERY_S
        path = self._path
        assert path is not None
        try:
            seen = mark_of(path)
            if seen == self._seen and time.time() - max(seen[:2]) / 1e9 > YOUNG_S:
                return
            self._clients = self._read(read_file(path))
            self._seen, self.error = seen, None
            return
        except OSError as e:
            why = f"cannot be read: {e.strerror}"
        except (RoutesError, SettingsError) as e:
            why = str(e)
        self._seen = ()
        if why != self.error:
            self.error, self.since = why, now_text()
            log.error("clients_bad", {"file": str(path), "why": why})

    def _read(self, text: str) -> tuple[tuple[bytes, str], ...]:
        """(digest, name) of each line; SettingsError with the line's number, never with a key."""
        found: dict[str, bytes] = {}
        for n, line in enumerate(text.splitlines(), 1):
            name, colon, key = (part.strip() for part in line.partition(":"))
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            if not colon or not NAME.fullmatch(name) or not key:
                why = "expected `name: key`, the name of lower-case letters, digits, - and _"
                raise SettingsError(f"line {n}: {why}")
            check_key(key, f"line {n}")
            digest = digest_of(key)
            if name in found or name == DEFAULT:
                raise SettingsError(f"line {n}: the name {name} is taken")
            if digest in found.values() or digest in self._taken:
                raise SettingsError(f"line {n}: this key is another's already")
            found[name] = digest
        if len(found) > MOST:
            raise SettingsError(f"more than {MOST} clients")
        return tuple((digest, name) for name, digest in found.items())


def digest_of(key: str) -> bytes:
    """What is compared and kept instead of a key."""
    return sha256(key.encode()).digest()
