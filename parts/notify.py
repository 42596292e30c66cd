"""ROUTER_NOTIFY_URL: one POST to whoever wants to be told when it matters.

A log handler: what is told is what the log says of some events, so nobody else knows of it. A
request only leaves its record here; one thread posts, at most once a minute for each matter. What
changes within that minute is told at its end, as it is then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from parts.logs import now_text

log = logging.getLogger("llm_router")

EVERY_S = 60.0
MOST_MATTERS = 100
TIMEOUT_S = 5.0
# event -> (what it is about, sentence)
EVENTS = {
    "circuit_opened": ("model", "{model} is failing ({reason}): its circuit is open"),
    "circuit_closed": ("model", "{model} answers again: its circuit is closed"),
    "limit_near": ("of", "80 % of the limit of {usd} USD a {limit} ({of}) are spent"),
    "limit_spent": ("of", "the limit of {usd} USD a {limit} ({of}) is spent"),
    "key_refused": ("upstream", "upstream {upstream} refuses the key ({key})"),
    "routes_bad": ("file", "routes.json is broken, the last good one stays in force: {why}"),
}


class Notifier(logging.Handler):
    """Posts some events to `url`. Whatever fails is one log line, without the URL."""

    def __init__(self, url: str, instance: str = "",
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        super().__init__(logging.INFO)
        self._url = url
        self._instance = instance
        self._clock = clock
        self._bell = threading.Condition()  # guards what follows; never held while posting
        self._due: dict[str, float] = {}  # matter -> not before this
        self._waiting: dict[str, dict[str, Any]] = {}  # matter -> the latest of it
        self._thread: threading.Thread | None = None
        self._failing = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Note it, if it is one of EVENTS; waits for nothing."""
        known = EVENTS.get(str(record.msg))
        if known and isinstance(record.args, dict):
            self._note(str(record.msg), known, record.args)
        return True

    def _note(self, event: str, known: tuple[str, str], facts: Mapping[str, Any]) -> None:
        about, words = known
        matter = f"{event.partition('_')[0]} {facts.get(about)} {facts.get('limit', '')}"
        text = words.format_map(facts)
        with self._bell:
            if len(self._waiting) >= MOST_MATTERS and matter not in self._waiting:
                return
            self._waiting[matter] = {"event": event, "text": text, "content": text, **facts}
            self._bell.notify()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="notify", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no thread can be had now: the next matter asks again
                    return
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._bell:
                now = self._clock()
                self._due = {m: due for m, due in self._due.items() if due > now}
                ready = [matter for matter in self._waiting if matter not in self._due]
                if not ready:
                    if not self._waiting:
                        self._thread = None
                        return
                    self._bell.wait(min(self._due[matter] for matter in self._waiting) - now)
                    continue
                message = self._waiting.pop(ready[0])
                self._due[ready[0]] = now + EVERY_S
            self._post(message)

    def _post(self, message: Mapping[str, Any]) -> None:
        import requests  # only here and once: it is loaded anyway

        title = f"llm-router{' ' + self._instance if self._instance else ''}"
        body = {"title": title, "time": now_text(), **message}
        try:
            with requests.post(
                self._url, json=body, timeout=TIMEOUT_S, allow_redirects=False, stream=True
            ) as reply:
                why = "" if reply.status_code < 300 else f"status {reply.status_code}"
        except (OSError, ValueError) as e:  # requests' own are among them; their words hold the URL
            why = type(e).__name__
        if why and not self._failing:
            log.warning("notify_failing", {"why": why})
        self._failing = bool(why)
