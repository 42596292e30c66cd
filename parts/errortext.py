"""What an upstream's error says, whatever its envelope, and when the upstream may be asked again.

OpenAI sends {"error": {"message", "type", "code"}}; others put the same words into a text, a list,
a `detail`, an `errors[]`, a `base_resp`, a JSON text inside a JSON text, an event of a stream, a
page of HTML, plain text, gzip. Here they are found in all of them. What is looked at is bounded in
size, depth and number, so the time is too; nothing raises. Nothing here knows what the words mean.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
import time
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from parts.jsontext import decode

MOST_TEXT = 4000  # characters of one text that are looked at; real ones stay under 1,000
MOST_VALUES = 500  # members that are looked at
MAX_DEPTH = 16  # real ones stay under 12, JSON texts inside JSON texts included
MOST_UNPACKED = 64 << 10  # bytes of a compressed error


class Said(NamedTuple):
    """An error's words: `message` for a person, `text` to judge by, each part on a line."""

    message: str
    text: str
    status: int  # that the error names, of 4xx and 5xx; or 0
    hints: dict[str, Any]  # members that say when to ask again


def read_error(body: Any) -> Said:
    """The words in `body`: bytes or text as they came, or the JSON value they were."""
    if isinstance(body, bytes):
        body = _as_text(body)
    reader = _Reader()
    reader.read(_open(body) if isinstance(body, str) else body, "error", 0)
    return reader.said()


# --- envelopes -----------------------------------------------------------------------------------

FRAMES = ("data:", "event:", "error:", "id:", ":")
_FRAMED = re.compile(r"^(?:data|error):[ \t]?(.*)$", re.M)  # llama.cpp has a field of that name
_TAG = re.compile(r"<[!?/a-z]", re.I)
_TAGGED = re.compile(
    r"<(title|h1|code|message|faultstring|detail)\b[^>]{0,200}>([^<]{1,500})<", re.I
)
# The first message in JSON that was cut off, as it is when an error holds the whole request.
_FIRST_MESSAGE = re.compile(
    r'"(?:message|msg|detail|error)"\s{0,9}:\s{0,9}"((?:[^"\\]|\\.){1,2000}+)', re.S
)


def unpacked(data: bytes, coding: str = "") -> bytes:
    """What `data` was before gzip or deflate, at most `MOST_UNPACKED` of it; else `data`."""
    for _ in range(2):  # a proxy may have packed what was packed already
        raw = -zlib.MAX_WBITS if "deflate" in coding.lower() else 0
        for wbits in filter(None, (32 + zlib.MAX_WBITS, raw)):  # by its head; without any
            with contextlib.suppress(zlib.error):
                data = zlib.decompressobj(wbits).decompress(data, MOST_UNPACKED)
                break
        if data[:2] != b"\x1f\x8b":
            break
    return data


def _as_text(data: bytes) -> str:
    try:
        text = decode(data)
    except UnicodeError:
        text = data.decode("utf-8", "replace")
    return "" if "\0" in text or text.count("\ufffd") > 20 + len(text) // 50 else text


def _open(text: str) -> Any:
    """The JSON value in `text`; what a page or XML says in its title or message; else `text`."""
    text = text.strip("\ufeff \t\r\n")
    if text.startswith(FRAMES) and (lines := _FRAMED.findall(text)[:50]):
        whole = _json_at("\n".join(lines), 0)
        told = [line for line in lines if not line.startswith((*FRAMES, "[DONE]"))]
        return [_open(line) for line in told] if whole is None else whole
    if _TAG.match(text):
        tags = _TAGGED.findall(text[: 4 * MOST_TEXT])[:8]
        return [{tag.lower().replace("h1", "title"): html.unescape(said)} for tag, said in tags]
    if not text.startswith(("{", "[", '"')):
        return text
    value = _json_at(text, 0)
    if value is None and (found := _FIRST_MESSAGE.search(text)):
        value = _json_at(f'"{found[1]}"', 0)
    return text if value is None else value


def _json_at(text: str, at: int) -> Any:
    """The JSON value that begins there, whatever stands behind it; None when there is none."""
    try:
        return _DECODER.raw_decode(text, at)[0]
    except (ValueError, RecursionError):
        return None


_DECODER = json.JSONDecoder()


# --- words ---------------------------------------------------------------------------------------

# Names without _ and -, in lower case. What stands under other names is not looked at: it may be
# the request, which must neither decide anything nor be told to anybody.
MESSAGES = frozenset(
    "message msg errormessage errormsg errmsg statusmsg statusmessage resultmsg error errors "
    "detail details title errordescription description faultstring reason raw cause exception "
    "summary".split()
)  # fmt: skip
CODES = frozenset(
    "code type status errorcode errortype errcode statuscode httpcode httpstatus name".split()
)
HOLDERS = frozenset(
    "metadata fault baseresp innererror response data body result output param headers".split()
)
ENVELOPES = frozenset("error errors message msg detail".split())
_JSON_IN_TEXT = re.compile(r'\{\s{0,9}"|\[\s{0,9}\{|\A(?:data|event):')
_SLUG = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_HINT = re.compile(r"retry.?(after|delay|in\b)|reset|estimated.?time")
# What is the client's in a message, and so says nothing of what the upstream means: the values that
# a checker did not like, and the names of tools.
_QUOTED = re.compile(r"""'input': |\binput_value=|\{\s{0,9}\"""")
_NAMED = re.compile(r"""\b(tool|function|name)\W{1,3}['"`][^'"`\n]{1,80}['"`]""", re.I)


class _Reader:
    """Collects the words of one error."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.codes: list[str] = []
        self.others: list[str] = []  # texts under names that say nothing to us
        self.hints: dict[str, Any] = {}
        self.status = 0
        self.left = MOST_VALUES

    def read(self, value: Any, name: str, depth: int) -> None:
        """Take in `value`, which stood under `name`."""
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                plain = re.sub(r"[_\W]", "", str(key)[:64].lower())
                self._member(str(key), plain, inner, name, depth + 1)
        elif isinstance(value, list):
            for inner in value[:50]:
                self.read(inner, "error" if name == "errors" else name, depth + 1)
        elif isinstance(value, str) and value.strip():
            self._text(value[: 16 * MOST_TEXT].strip(), name, depth)

    def _member(self, key: str, plain: str, value: Any, holder: str, depth: int) -> None:
        nested = isinstance(value, dict | list) or str(value)[:2] in ('{"', "[{")
        if _HINT.search(key.lower()) and not isinstance(value, bool):
            self.hints.setdefault(key.lower(), value)
        if plain == "reasons" and value:  # OpenRouter: what a prompt was flagged for
            self.codes.append("flagged")
        elif plain in CODES and not nested:
            self._code(value)
        elif plain in MESSAGES or (nested and plain in HOLDERS | CODES):
            self.read(value, plain, depth)
        elif holder == "errors" and not plain.endswith("input"):  # by the field they are about
            self.read(value, "errors", depth)
        elif isinstance(value, str) and " " in value.strip() and depth <= 2:
            self.others.append(value[:500].strip())

    def _code(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, str | int):
            return
        code = str(value)[:200].strip() if isinstance(value, str) or 0 <= value < 1 << 31 else ""
        if re.fullmatch("[45][0-9][0-9]", code):
            self.status = self.status or int(code)
        elif code:
            self.codes.append(code)

    def _text(self, text: str, name: str, depth: int) -> None:
        at = _JSON_IN_TEXT.search(text)
        inner = _open(text[at.start() :]) if at else None
        first = inner[0] if isinstance(inner, list) and inner else inner
        if at and isinstance(first, dict) and ENVELOPES & {str(key).lower() for key in first}:
            self._note(text[: at.start()].rstrip(" :-"))
            self.read(inner, "error", depth + 1)
        elif at and isinstance(inner, str) and inner != text[at.start() :]:  # it was cut off
            self._note(text[: at.start()].rstrip(" :-"))
            self._note(inner)
        elif _SLUG.fullmatch(text) and name in ("error", "reason", "title", "detail"):
            self.codes.append(text)
        else:
            self._note(text)

    def _note(self, text: str) -> None:
        text = " ".join(text[:MOST_TEXT].split())
        if text and not any(text in other for other in self.messages):
            self.messages.append(text)

    def said(self) -> Said:
        """What was collected; a lone code stands for the message that is missing."""
        words = [*self.codes[:50], *(self.messages or self.others)]
        text = "\n".join(_NAMED.sub(r"\1", _QUOTED.split(word, maxsplit=1)[0]) for word in words)
        message = "; ".join(self.messages or self.others or self.codes[-1:])
        return Said(message[:MOST_TEXT], text[: 4 * MOST_TEXT], self.status, self.hints)


# --- when to ask again ---------------------------------------------------------------------------

MOST_S = 1e10  # so that sums with it stay sound; whoever waits has a limit of their own
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SPAN = (
    r"\d{1,12}(?:\.\d{1,12})?\s?(?:ms|milliseconds?|[dhms](?![a-z])|(?:sec|min|hr|hour|day)\w{0,6})"
)
_PART = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s?(ms|mil|[dhms])", re.I)
_IN_WORDS = re.compile(
    rf"(?:again|retry\w{{0,9}}|wait|resets?|available|after|within)\W{{1,5}}(?:\w{{1,20}}\W{{1,5}}){{0,3}}?"
    rf"((?:{_SPAN}[\s,]{{0,2}}(?:and )?){{1,4}})", re.I
)  # fmt: skip
_BARE = re.compile(
    r"retry[ _-]?after[\W_]{1,3}(?:(?:in[ _])?sec\w{0,4}\W{1,4})?(\d{1,9}(?:\.\d{1,9})?)\b(?![-:/])"
    r"|(\d{1,9}) ?秒", re.I
)  # fmt: skip
_AT = re.compile(
    r"(?:reset|retry|again|until|available)\w{0,9}\W{1,5}(?:\w{1,20}\W{1,5}){0,2}?"
    r"(\d{4}-\d\d-\d\d[T ][\d:.]{5,20}(?:Z|[+-][\d:]{4,5})?)", re.I
)  # fmt: skip


def wait_of(headers: Mapping[str, str], said: Said) -> float | None:
    """Seconds until the upstream wants to be asked again, or None when it does not say.

    What is said of a retry outranks what is said of a limit: a limit may have room before it ends.
    """
    told = {name.lower(): value for name, value in headers.items()}
    for source in (told, said.hints):
        for name, value in sorted(source.items(), key=lambda item: not item[0].endswith("ms")):
            if "retry" in name and _HINT.search(name):
                seconds = seconds_of(value, 0.001 if name.endswith("ms") else 1)
                if seconds is not None:
                    return seconds
    in_words = _wait_in_words(said.text)
    return in_words if in_words is not None else _soonest_reset({**said.hints, **told})


def _wait_in_words(text: str) -> float | None:
    if found := _IN_WORDS.search(text):
        return _sum(found[1])
    if found := _BARE.search(text):
        return float(found[1] or found[2])
    found = _AT.search(text)
    return _until(found[1]) if found else None


def _soonest_reset(told: Mapping[str, Any]) -> float | None:
    """Of several limits that end, the one that is used up, else the soonest."""
    waits = {n: seconds_of(v) for n, v in told.items() if "reset" in n or "estimated" in n}
    ends = {name: seconds for name, seconds in waits.items() if seconds}  # 0: long over
    left = {name: str(told.get(name.replace("reset", "remaining"))).strip() for name in ends}
    gone = [seconds for name, seconds in ends.items() if left[name] == "0"]
    return max(gone) if gone else min(ends.values(), default=None)


def seconds_of(value: Any, unit: float = 1) -> float | None:
    """Seconds from now that a number, a span ("6m0s"), a date or a stamp means; None if unclear."""
    if isinstance(value, Mapping):  # google.rpc.Duration
        value = value.get("seconds")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value)[:100].strip()
    try:
        seconds = float(text) * unit
    except (ValueError, OverflowError):
        seconds_or_none = _read_span(text)
    else:
        seconds_or_none = _from_now(seconds)
    if seconds_or_none is None and "," in text:  # a header that came twice
        parts = [seconds_of(part, unit) for part in text.split(",")]
        return max((part for part in parts if part is not None), default=None)
    return seconds_or_none


def _from_now(seconds: float) -> float | None:
    """`seconds`, or until the moment that they are since 1970, in milliseconds even."""
    if seconds != seconds:  # NaN
        return None
    if 1e11 < seconds < 1e14:
        seconds /= 1000
    if 1e9 < seconds < 1e11:
        seconds -= time.time()
    return min(max(0.0, seconds), MOST_S)


def _read_span(text: str) -> float | None:
    if re.fullmatch(rf"(?:{_SPAN}\s?){{1,4}}", text, re.I):
        return _sum(text)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return min(max(0.0, parsedate_to_datetime(text).timestamp() - time.time()), MOST_S)
    return _until(text)


def _sum(span: str) -> float:
    parts = _PART.findall(span)
    return min(
        sum(float(n) * _UNITS[unit.lower().replace("mil", "ms")] for n, unit in parts), MOST_S
    )


def _until(text: str) -> float | None:
    """Seconds until an ISO date; UTC when it names no zone. None when it is over."""
    try:
        moment = datetime.fromisoformat(text.rstrip("."))
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    seconds = moment.timestamp() - time.time()
    return min(seconds, MOST_S) if seconds > 0 else None
