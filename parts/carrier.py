"""The carrier: one thread that passes on all streams that have begun.

A thread for each stream would have to be woken for each of its events and to wait for the
interpreter's lock among all the others, which costs three times what the event itself does. So the
thread that serves a stream hands its two sockets over here and sleeps until the stream has ended.
Where there is no epoll, or no socket to write to, each thread passes its own stream on.
Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

from parts.errors import Failure
from parts.exchange import READ_SIZE

HAS_EPOLL = hasattr(select, "epoll")
READ, WRITE = getattr(select, "EPOLLIN", 0), getattr(select, "EPOLLOUT", 0)


class Carried:
    """One stream: what comes from `source` goes through `take` and on to `sink`.

    `same` gets what was received, and says what to send when that is all there is to do: nearly
    always so. Otherwise it says b"" and `take` gets it, b"" at the end of it, and says what to send
    and whether that was the last; what it raises ends the stream. `wait_for` is told whom the
    stream waits for when that changes: "client" when it does not take what was sent, else
    "upstream".
    """

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        same: Callable[[bytes], bytes],
        take: Callable[[bytes], tuple[bytes, bool]],
        wait_for: Callable[[str], None],
        chunked: bool,
    ):
        self.source, self.sink = source, sink
        self._same, self._take, self._wait_for, self._chunked = same, take, wait_for, chunked
        self.is_tls = isinstance(source, ssl.SSLSocket)
        self._flags = 0 if self.is_tls else socket.MSG_DONTWAIT
        self._last = False
        self._came: bytes | None = None  # received by `hand_on`, which left it to `read`
        self.unsent = b""  # nothing is read before this is sent
        self.waits_for_client = False
        self.error: Exception | None = None
        self.over = threading.Event()

    def hand_on(self) -> bool:
        """Pass on what has come if that is quickly done; False when `read` or `write` has to."""
        if self.unsent or self._came is not None:
            return False
        try:
            data = self.source.recv(READ_SIZE, self._flags)
            self.unsent = self._same(data)
            if not self.unsent:
                self._came = data
                return False
            sent = self.sink.send(self.unsent, socket.MSG_DONTWAIT)
        except OSError:  # which one, `read` or `write` finds when it tries again
            return False
        self.unsent = self.unsent[sent:]
        return not (self.unsent or self.has_more())

    def read(self) -> bool:
        """Pass on what has come; True when that was the end of the stream."""
        data, self._came = self._came, None
        try:
            if data is None:
                data = self.source.recv(READ_SIZE, self._flags)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError:  # how it broke is in the flight; the taker looks there
            data = b""
        out, self._last = self._take(data)
        if not out:
            return self._last
        self.unsent = b"%x\r\n%b\r\n" % (len(out), out) if self._chunked else out
        return self.write()

    def write(self) -> bool:
        """Send what the client takes; True when that was the end of the stream."""
        try:
            sent = self.sink.send(self.unsent, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as e:
            raise Failure("client_left", status=200) from e
        self.unsent = self.unsent[sent:]
        return self._last and not self.unsent

    def turn(self) -> None:
        """From now on it is the other one that the stream waits for."""
        self.waits_for_client = not self.waits_for_client
        self._wait_for("client" if self.waits_for_client else "upstream")

    def has_more(self) -> bool:
        """True when TLS holds bytes that the system does not know of."""
        return self.is_tls and not self.unsent and self.source.pending() > 0  # type: ignore[attr-defined]


def carried(source: Any, sink: Any, *more: Any) -> Carried | None:
    """The stream between two sockets, or None where it cannot be carried.

    A TLS connection to the client is the server's own; so is what is no socket.
    """
    if not HAS_EPOLL or not isinstance(source, socket.socket) or type(sink) is not socket.socket:
        return None
    return Carried(source, sink, *more)


class Carrier:
    """Carries streams, all in one thread, which is started by the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the start
        self._thread: threading.Thread | None = None
        self._by_descriptor: dict[int, Carried] = {}

    def carry(self, stream: Carried) -> None:
        """Return when `stream` has ended; raise what ended it too early."""
        with self._lock:
            if self._thread is None:
                self._epoll = select.epoll()
                self._thread = threading.Thread(target=self._run, name="carrier", daemon=True)
                self._thread.start()
        with without_waiting(stream.source):
            if stream.has_more():  # of which no descriptor tells: begin with a turn of the client
                stream.turn()
            self._watch(stream)
            stream.over.wait()
        if stream.error:
            raise stream.error

    def _watch(self, stream: Carried) -> None:
        sock, what = (stream.sink, WRITE) if stream.waits_for_client else (stream.source, READ)
        self._by_descriptor[sock.fileno()] = stream
        self._epoll.register(sock, what)

    def _forget(self, stream: Carried) -> None:
        sock = stream.sink if stream.waits_for_client else stream.source
        self._by_descriptor.pop(sock.fileno(), None)
        self._epoll.unregister(sock)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                stream = self._by_descriptor.get(descriptor)
                if stream is not None:
                    self._step(stream)

    def _step(self, stream: Carried) -> None:
        """Move one stream on; whatever goes wrong ends this one and no other."""
        try:
            ended = not stream.hand_on() and self._move(stream)
        except Exception as e:  # noqa: BLE001  the thread of the stream tells what it was
            stream.error, ended = e, True
        if ended:
            with contextlib.suppress(OSError, ValueError):  # watched no more already
                self._forget(stream)
            stream.over.set()

    def _move(self, stream: Carried) -> bool:
        """One read or one write, and whom it waits for then; True when the stream has ended."""
        ended = stream.write() if stream.unsent else stream.read()
        while stream.is_tls and not ended and stream.has_more():
            ended = stream.read()
        if not ended and bool(stream.unsent) != stream.waits_for_client:
            self._forget(stream)
            stream.turn()
            self._watch(stream)
        return ended


@contextlib.contextmanager
def without_waiting(sock: socket.socket) -> Iterator[None]:
    """TLS knows no flag for one call: it must not wait at all meanwhile."""
    if isinstance(sock, ssl.SSLSocket):
        sock.setblocking(False)
    try:
        yield
    finally:
        if isinstance(sock, ssl.SSLSocket):
            sock.setblocking(True)
