"""A file that people and programs edit at once: reading, watching, changing it.

`Store.current` gives the last good table; a bad edit never takes that away. `Store.change` applies
one change to the text on disk and touches no other byte of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Generic, Protocol, TypeVar

from parts.errors import Refused, RoutesError, Unreadable
from parts.jsontext import SMALL, decode
from parts.logs import now_text

log = logging.getLogger("llm_router")


class Text(Protocol):
    """What is made of the file: it keeps the text it was made of, and a name for that."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def etag(self) -> str: ...  # noqa: D102


T = TypeVar("T", bound=Text)
# Called with (text on disk, new text) when only the rename is left; may raise Refused.
Agree = Callable[[str, str], None]


LOOK_EVERY_S = 0.5  # how often a request looks at routes.json; a change is seen within 1 s


YOUNG_S = 2.0  # a file this young may change again within one tick of its timestamps


class Store(Generic[T]):
    """The routes file and the table read from it. `current` gives the last good one."""

    def __init__(
        self,
        path: Path,
        load: Callable[[str], T],
        clock: Callable[[], float] = time.monotonic,
        agree: Agree | None = None,
    ):
        self._load = load  # a text's table; RoutesError when it is none
        self._given = path.absolute()  # perhaps a symlink, which may be swapped for another
        self._last_good = self._beside("last-good")
        self._clock = clock
        self._agree = agree  # the peers' word on a change; None: there are none
        self._lock = threading.Lock()  # guards the look at the file and the swap
        self._seen: tuple[int, ...] = ()
        self._next_look = 0.0
        self._kept = ""  # the text in the last-good copy
        self.error: str | None = None
        self.error_since: str | None = None
        self._table = self._first_table()

    @property
    def path(self) -> Path:
        """The file itself, behind any symlinks."""
        return Path(os.path.realpath(self._given))

    def current(self) -> T:
        """The table in force; looks at the file at most every half second."""
        if self._clock() >= self._next_look and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._table

    def _first_table(self) -> T:
        try:
            table = self._load(read_file(self.path))
        except RoutesError as bad:
            try:
                table = self._load(read_file(self._last_good))
            except RoutesError:
                raise bad from None
            self._complain(bad)
        self._keep(table.text)
        return table

    def _look(self) -> None:
        self._next_look = self._clock() + LOOK_EVERY_S
        try:
            seen = mark_of(self.path)
            young = time.time() - max(seen[:2]) / 1e9 <= YOUNG_S
            if seen != self._seen or young:
                self._take_up(read_file(self.path))
                self._seen = seen
        except OSError as e:
            self._seen = ()
            self._complain(RoutesError(f"cannot be read: {e.strerror}"))
        except RoutesError as e:
            self._seen = () if isinstance(e, Unreadable) else seen
            self._complain(e)
        self._keep(self._table.text)

    def _take_up(self, text: str) -> None:
        if text != self._table.text:
            self._table = self._load(text)
            log.info("routes_loaded", {"version": self._table.etag})
        self.error = self.error_since = None

    def _complain(self, bad: RoutesError) -> None:
        if str(bad) != self.error:
            self.error, self.error_since = str(bad), now_text()
            log.error("routes_bad", {"file": str(self.path), "why": str(bad)})

    def _keep(self, text: str) -> None:
        """Copy the table in force for a worker that boots while the file is bad."""
        if text == self._kept:
            return
        with contextlib.suppress(OSError):  # not writable, or a writer is busy: at the next look
            with locked(self._last_good.parent, wait=False):
                if not holds(self._last_good, text):  # nor when that cannot be read
                    replace_file(self._last_good, text, like=self.path)
            self._kept = text

    def change(self, edit: Callable[[T], str], if_match: str | None = None) -> T:
        """The table after `edit` (table -> new text) was checked and written, or Refused.

        Writers of all threads and processes take turns: the folder itself carries the lock, so no
        lock file is left behind. Nothing is written unless everything fits: 409 while the file on
        disk is bad, 412 when `if_match` names another version, 503 when it cannot be written.
        """
        return self._change(edit, if_match, self._agree)

    # What follows is for the peers' thread, which writes what was agreed on already.

    def adopt(self, edit: Callable[[T], str], spare: Agree) -> T:
        """As `change`, for a text of the peers; `spare` may keep what it replaces."""
        return self._change(edit, None, spare)

    def writing(self) -> contextlib.AbstractContextManager[int]:
        """The writers' lock, for more than one step; OSError."""
        return locked(self.path.parent, wait=True)

    def settled_text(self) -> str | None:
        """The text in force, under the lock; None while the file holds an edit yet to be seen."""
        text = self.current().text
        return text if self.error or holds(self.path, text) else None

    def keep_beside(self, ending: str, text: str) -> Path:
        """Write a note of ours beside the file, under the lock; OSError."""
        path = self._beside(ending)
        replace_file(path, text, like=self.path)
        return path

    def read_beside(self, ending: str) -> str:
        """That note, or ''."""
        with contextlib.suppress(RoutesError):
            return read_file(self._beside(ending))
        return ""

    def _beside(self, ending: str) -> Path:
        return self._given.with_name(f".{self._given.name}.{ending}")

    def _change(self, edit: Callable[[T], str], if_match: str | None,
                agree: Agree | None) -> T:  # fmt: skip
        try:
            with self.writing() as folder:
                after = self._write(edit, if_match, agree)
                with contextlib.suppress(OSError):  # in place; only a power cut could undo it
                    os.fsync(folder)
        except OSError as e:
            why = f"{self.path} cannot be written: {e.strerror}; nothing changed"
            raise Refused(503, "routes_not_writable", why) from e
        with self._lock:
            self._table, self.error, self._next_look = after, None, 0.0
        self._keep(after.text)
        return after

    def _write(self, edit: Callable[[T], str], if_match: str | None,
               agree: Agree | None) -> T:  # fmt: skip
        for _ in range(20):  # a hand edit in between is read again, not overwritten
            before, after = self._prepare(edit, if_match)
            same = after.text == before.text
            if same or replace_file(self.path, after.text, self.path, before.text, agree):
                return after
        raise Refused(409, "conflict", f"{self.path} keeps changing; try again")

    def _prepare(self, edit: Callable[[T], str], if_match: str | None) -> tuple[T, T]:
        """The table as the file on disk has it, and as `edit` would have it."""
        before = self._table
        try:
            text = read_file(self.path)
            before = before if text == before.text else self._load(text)
        except RoutesError as e:
            why = f"{self.path} is broken; mend it first: {e}"
            raise Refused(409, "routes_file_bad", why) from e
        tags = [tag.strip().removeprefix("W/").strip('"') for tag in (if_match or "*").split(",")]
        if not {before.etag, "*"} & set(tags):
            raise Refused(412, "stale_version", "routes.json has changed; GET /config, try again")
        try:
            text = edit(before)
            text.encode()
            return before, before if text == before.text else self._load(text)
        except Refused:
            raise
        except UnicodeEncodeError as e:
            raise Refused(422, "invalid_request_error", "a lone surrogate is no text") from e
        except RoutesError as e:
            raise Refused(422, "invalid_request_error", str(e)) from e


def read_file(path: Path) -> str:
    """The text of a routes file, line ends as they are; Unreadable or RoutesError."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not S_ISREG(found.st_mode):
                raise Unreadable("cannot be read: not a regular file")
            data = file.read(SMALL + 1) if found.st_size <= SMALL else b""  # it may be growing
        if max(found.st_size, len(data)) > SMALL:
            raise RoutesError(f"over {SMALL >> 20} MB, which no routes file needs")
        return decode(data)
    except IsADirectoryError as e:
        raise Unreadable("cannot be read: not a regular file") from e
    except OSError as e:
        raise Unreadable(f"cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise RoutesError(f"byte {e.start} is not UTF-8: save the file as UTF-8") from e


def _open_at_once(path: str, flags: int) -> int:
    """A pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[int]:
    """The folder's descriptor, while no other thread or process holds its lock; else OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str, like: Path, instead_of: str | None = None,
                 agree: Agree | None = None) -> bool:  # fmt: skip
    """Replace `path` in one step, so that a crash leaves the old or the new file, never half.

    False when it does not hold `instead_of` any more: somebody edited it meanwhile. `agree` is
    asked last, when nothing but the rename is left that could fail; an edit while it was asked is
    a 409, for it agreed on another text than the one to be made now. The name of the temporary
    file is fixed, so that a crash leaves at most one; call this under the lock.
    """
    temp = path.with_name(f".{path.name.lstrip('.')}.tmp")
    try:
        write_beside(temp, text, like)
        if instead_of is not None and not holds(path, instead_of):
            return False
        if agree and instead_of is not None:
            agree(instead_of, text)
            if not holds(path, instead_of):
                raise Refused(409, "conflict", f"{path} was edited meanwhile; try again")
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    return True


def holds(path: Path, text: str) -> bool:
    """True when `path` holds `text`, and nobody wrote to it while it was read."""
    with contextlib.suppress(RoutesError, OSError):  # gone for a moment: an editor is at it
        mark = mark_of(path)
        return read_file(path) == text and mark_of(path) == mark
    return False


def mark_of(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to the file, but for two writes within one tick."""
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def write_beside(temp: Path, text: str, like: Path) -> None:
    """Write and fsync `temp`, with the mode and, where allowed, the owner of `like`."""
    stat = like.stat()
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        with contextlib.suppress(PermissionError):
            os.fchown(fd, stat.st_uid, stat.st_gid)
        os.fchmod(fd, stat.st_mode & 0o7777)
        file.write(text.encode())
        file.flush()
        os.fsync(fd)
