"""One line per event on stderr, and one per refused body in a file; no value from outside raw."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import re
import select
import stat
import sys
import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger("llm_router")

READER_S = 1.0  # for whoever reads our log to make room in its pipe
STUCK_S = 60.0  # and so long after it did not there is no waiting again


class EventFormatter(logging.Formatter):
    """Log records as one line of logfmt or JSON: `log.info("event", {"key": value})`.

    Values with spaces or control characters are quoted and escaped, so that nothing from outside
    can begin a line of its own.
    """

    def __init__(self, as_json: bool):
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """The line for `record`."""
        fields = record.args if isinstance(record.args, dict) else {}
        entry = {
            "time": now_text(),
            "level": record.levelname.lower(),
            "event": record.msg if fields else record.getMessage(),
            **fields,
        }
        if self._as_json:
            return json.dumps(entry)
        said = []
        for key, value in entry.items():
            if value is None or value == "" or value == []:  # which tell nothing
                continue
            if type(value) in NUMBERS:
                said.append(f"{key}={value}")
                continue
            if isinstance(value, list):
                value = ",".join([f"{item['model']}:{item['outcome']}" for item in value])
            said.append(_field(key, value if isinstance(value, bool) else str(value)))
        return " ".join(said)


NUMBERS = (int, float)
PLAIN = re.compile(r"[!#-<>-~]*")  # printable ASCII without blank, quote and equals sign


@lru_cache(maxsize=512)  # nearly all but ids were told before
def _field(key: str, value: bool | str) -> str:
    plain = isinstance(value, str) and PLAIN.fullmatch(value)
    return f"{key}={value if plain else json.dumps(value)}"


class EventLogger(logging.Logger):
    """A logger whose lines name no source, thread or process: to look them up is a third of one."""

    def _log(self, level: int, msg: object, args: Any, *more: Any, **others: Any) -> None:
        record = logging.LogRecord.__new__(logging.LogRecord)
        record.__dict__.update(_NOTHING_KNOWN)
        record.levelno, record.levelname = level, logging.getLevelName(level)
        record.msg, record.args = msg, args[0] if args and isinstance(args[0], dict) else args
        record.created = time.time()
        self.handle(record)


_NOTHING_KNOWN = vars(logging.LogRecord(log.name, 0, "", 0, "", None, None))


class Stderr(logging.StreamHandler[Any]):
    """Writes to stderr. When it is closed or its disk is full there is nowhere to say so.

    Whoever reads a pipe may stop doing so; once it is full, each thread that logs would wait for
    ever. So there a line that finds no room is lost, and how many were is told as soon as there is
    some. A reader that is only slow is waited for. A file or a terminal loses nothing.
    """

    def __init__(self, stream: Any = None):
        super().__init__(stream)
        self._lost, self._is_cut, self._wait_at = 0, False, 0.0
        self._pipe: select.poll | None = None
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no file
            self._fd = self.stream.fileno()
            mode = os.fstat(self._fd).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):  # systemd's is a socket
                self._pipe = select.poll()
                self._pipe.register(self._fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if self._pipe is None:
            super().emit(record)
            return
        try:
            if self._lost and self._write(self._loss()):
                self._lost = 0
            if self._lost or not self._write(self.format(record)):
                self._lost += 1
        except OSError:
            self.handleError(record)

    def _loss(self) -> str:
        args = {"lines": self._lost}
        lost = {"levelname": "WARNING", "msg": "log_lines_lost", "args": args}
        return "\n" * self._is_cut + self.format(logging.makeLogRecord(lost))

    def _write(self, line: str) -> bool:
        """Write it, in pieces for which a pipe that has any room has enough; False without room."""
        data = f"{line}\n".encode(errors="backslashreplace")
        for at in range(0, len(data), select.PIPE_BUF):
            if not self._has_room():
                self._is_cut = self._is_cut or at > 0
                return False
            os.write(self._fd, data[at : at + select.PIPE_BUF])
        self._is_cut = False
        return True

    def _has_room(self) -> bool:
        """True when a piece can be written at once, or soon, unless that was hoped for lately."""
        assert self._pipe
        if self._pipe.poll(0):
            return True
        if time.monotonic() < self._wait_at:
            return False
        has_room = bool(self._pipe.poll(READER_S * 1000))
        self._wait_at = 0.0 if has_room else time.monotonic() + STUCK_S
        return has_room

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a traceback for each line would go the same way."""


def log_to_stderr(log_format: str) -> None:
    """One line per event on stderr; again with another format for another app in a process."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = Stderr()
    handler.setFormatter(EventFormatter(log_format == "json"))
    log.addHandler(handler)
    log.propagate = False
    log.__class__ = EventLogger  # whoever asked for it by name has this object already
    log.setLevel(logging.INFO)


def log_rejections(path: Path) -> logging.Logger:
    """A logger for one JSON line per 422, in `path`, rotating; places and rules, never values."""
    logger = logging.Logger("validation")
    logger.addHandler(
        RejectionFile(path, maxBytes=1_000_000, backupCount=1, encoding="utf-8", delay=True)
    )
    return logger


class RejectionFile(logging.handlers.RotatingFileHandler):
    """Opens its file for each line, of which there are few; a failure is one warning."""

    warned = False

    def _open(self) -> Any:
        """A pipe that nobody reads is a failure, too, nothing to wait for."""

        def without_waiting(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NONBLOCK, 0o666)

        return open(self.baseFilename, "a", encoding=self.encoding, opener=without_waiting)

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line; what a full disk refused comes up once more as the file is closed."""
        super().emit(record)
        try:
            self.close()
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say it once instead of printing a traceback with every line."""
        if not self.warned:
            self.warned = True
            log.warning("validation_log_unwritable", {"file": self.baseFilename})


def where_it_broke() -> str:
    """The current exception's type and frames; not its message, which may hold a prompt."""
    kind, _, trace = sys.exc_info()
    frames = [
        f"{Path(f.filename).name}:{f.lineno}:{f.name}" for f in traceback.extract_tb(trace)[-6:]
    ]
    return f"{kind.__name__ if kind else 'unknown'}@{'<'.join(reversed(frames))}"


def now_text() -> str:
    """The time of day for people: UTC, ISO 8601, whole seconds."""
    return _text_of_second(int(time.time()))


@lru_cache(maxsize=8)
def _text_of_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
