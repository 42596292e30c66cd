"""Server-sent events: put together from bytes as they come, each with what it holds.

Nothing here knows what an answer means; where an event keeps the words it adds is told by who does.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from parts.errors import Failure
from parts.exchange import MAX_ANSWER
from parts.jsontext import IN_STRING, LARGE, is_utf8, parse_lean, without_words

MAX_EVENT = MAX_ANSWER  # bytes of one event: it may hold a whole answer, a picture say
MOST_LINES = 10_000  # of a large event; real ones have one or two


class Event(NamedTuple):
    """One event: its bytes, and what it holds: comment, done, data, error or malformed."""

    raw: bytes
    kind: str
    data: dict[str, Any]


_EVENT_END = re.compile(rb"\r?\n\r?\n|\r\r")


class EventReader:
    """Puts server-sent events together from bytes as they come.

    `words`: what may stand before the words that an event adds to an answer. `adds_words`: whether
    those that are like an event may be passed on unread.
    """

    def __init__(self, words: tuple[bytes, ...] = (),
                 adds_words: Callable[[dict[str, Any]], bool] = bool):  # fmt: skip
        self._words, self._adds_words = words, adds_words
        self._buffer = bytearray()  # appending to bytes would copy a trickled event each time
        self._like: tuple[bytes, bytes] | None = None  # of the last event: `shape_of`

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are complete with `chunk`; Failure when one is beyond all measure."""
        buffer = self._buffer
        if not buffer and chunk[-2:] == b"\n\n" and b"\r" not in chunk:  # nearly always so
            return [self._event(part + b"\n\n") for part in chunk[:-2].split(b"\n\n")]
        at, seen, events = 0, max(0, len(buffer) - 3), []
        buffer += chunk
        for end in [match.end() for match in _EVENT_END.finditer(buffer, seen)]:
            with memoryview(buffer) as view:  # a slice of the buffer would be a second copy
                raw = bytes(view[at:end])
            events.append(self._event(raw))
            at = end
        del buffer[:at]
        if len(buffer) > MAX_EVENT:
            raise Failure("not_an_answer", f"an event over {MAX_EVENT} bytes")
        return events

    def rest(self) -> list[Event]:
        """The tail, which counts although its blank line is missing."""
        tail = bytes(self._buffer)
        self._buffer.clear()
        return [parse_event(tail.rstrip(b"\r\n") + b"\n\n")] if tail.strip() else []

    def is_more(self, chunk: bytes) -> bool:
        """True when `chunk` is one event that differs from the last in the words it adds alone.

        Nearly every event of a stream is: all that is asked of it has the answer of the last one,
        and for the words nobody asks. Reading it as JSON would take half of its time.
        """
        if self._like is None or self._buffer:
            return False
        before, behind = self._like
        if not (chunk.startswith(before) and chunk.endswith(behind)):
            return False
        return are_words(chunk[len(before) : -len(behind)])

    def _event(self, raw: bytes) -> Event:
        event = parse_event(raw)
        if event.kind == "data":
            self._like = shape_of(raw, self._words) if self._adds_words(event.data) else None
        return event


PLAIN = bytes(n for n in range(32, 127) if n not in b'"\\')  # in a JSON string as it is


def are_words(text: bytes) -> bool:
    """True when `text` between quotes is a JSON string that is not empty."""
    if not text.translate(None, PLAIN):
        return bool(text)
    return IN_STRING.fullmatch(text) is not None and is_utf8(text)


def shape_of(raw: bytes, words: tuple[bytes, ...]) -> tuple[bytes, bytes] | None:
    """What stands before and behind the words that an event adds to an answer."""
    for key in words:
        start = raw.find(key) + len(key)
        end = IN_STRING.match(raw, start)
        if start >= len(key) and end and raw[end.end() : end.end() + 1] == b'"':
            return raw[:start], raw[end.end() :]
    return None


_scan_json: Any = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def parse_event(raw: bytes) -> Event:
    """One event; several `data:` lines are joined as the standard says."""
    lean = raw if len(raw) <= LARGE else without_words(raw)
    at = lean.find(b"\n") + 1 if lean[:7] == b"event: " and lean[7:12] != b"error" else 0
    # One line of data, perhaps behind a name: nearly always so.
    if lean[at : at + 7] == b"data: {" and lean.find(b"\n", at) == len(lean) - 2:
        if len(lean) > LARGE:
            return _event_of(raw, lean[at + 6 : -2])
        with contextlib.suppress(ValueError, StopIteration, RecursionError):
            text = lean[at + 6 : -2].decode()
            data, end = _scan_json(text, 0)
            if end == len(text):
                return Event(raw, "data", data)
    if not lean or (len(lean) > LARGE and lean.count(b"\n") + lean.count(b"\r") > MOST_LINES):
        return Event(raw, "malformed", {})
    lines, name = lean.splitlines(), b""
    payload = b"\n".join([line[5:].strip() for line in lines if line.startswith(b"data:")])
    for line in lines:
        if line.startswith(b"event:"):
            name = line[6:].strip().lower()
        elif line.startswith(b"error:"):  # llama.cpp's own field
            name, payload = b"error", line[6:].strip()
    if not payload:
        fields = (b":", b"event:", b"id:", b"retry:")
        is_comment = lean.strip().startswith(fields) or not lean.strip()
        return Event(raw, "comment" if is_comment else "malformed", {})
    return _event_of(raw, payload, name == b"error")


def _event_of(raw: bytes, payload: bytes, is_error: bool = False) -> Event:
    if payload == b"[DONE]":
        return Event(raw, "done", {})
    data = parse_lean(payload)
    if is_error:
        told = data if isinstance(data, dict) else {"message": payload.decode(errors="replace")}
        return Event(raw, "error", told)
    return Event(raw, "data", data) if isinstance(data, dict) else Event(raw, "malformed", {})
