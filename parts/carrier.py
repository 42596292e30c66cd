"""The carrier: one thread that passes on all streams that have begun.

A thread for each stream would have to be woken for each of its events and to wait for the
interpreter's lock among all the others: twice the CPU time an event, and at 256 streams a p99 of
128 ms instead of 9. So the thread that serves a stream hands its two sockets over and sleeps.

Who may touch what, when:

- `carry` and `through` are called by the threads that serve. They put the stream into `_new`,
  ring the bell, and touch it no more until its `over` is set.
- `give_way` is called by them, too, before the work that a request begins with. While the carrier
  is behind, they wait there: each of them would take the interpreter's lock between two steps of a
  round, and 200 streams that need 20 ms waited 270 for a burst of new ones. The carrier lets some
  of them in after each round, and all once it has caught up. It says so in `_is_behind` before it
  looks into `_waiting`; they look at `_is_behind` again after they put themselves there. So nobody
  is forgotten, and a round never waits for them.
- Everything else belongs to the carrier's thread: the selector, and each stream from the bell on
  until it sets `over`. So no step needs a lock; `_lock` guards the start of the thread alone.
- The watcher may shut both sockets down at any moment (flights.py): the next recv or send tells,
  and the taker looks into the flight for why. It closes no descriptor, and nor does anybody else
  before `over` is set: what is registered in the selector stays open.
- Nothing here knows what the bytes mean; `same` and `take` are the relay's, called in this thread.
  Whatever they raise ends their own stream and no other.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator

from parts.errors import Failure

READ_SIZE = 65536
BEHIND = 16  # streams that can be moved on at once; with fewer, nobody has to wait
FOR_ONE = 16  # streams moved on for each request that may begin; with 8, pauses came back
WAY_S = 2.0  # however far behind the carrier is, a request begins after this
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
Source = socket.socket | ssl.SSLSocket


class Carried:
    """One stream: what comes from `source` goes through `take` and on to `sink`.

    `same` gets what was received, and says what to send when that is all there is to do: nearly
    always so. Otherwise it says b"" and `take` gets it, b"" at the end of it, and says what to send
    and whether that was the last; what it raises ends the stream. `wait_for` is told whom the
    stream waits for when that changes: "client" when it does not take what was sent, else
    "upstream". `chunked`: what is sent goes as one chunk.
    """

    def __init__(
        self,
        source: Source,
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
        self._unread: bytes | None = None  # received by `hand_on`, which left it to `move`
        self.unsent = b""  # nothing is read before this is sent
        self.waits_for_client = False
        self.is_pair = False  # the sink is one end of a socket pair
        self.error: Exception | None = None
        self.over = threading.Event()

    def hand_on(self) -> bool:
        """Pass on what has come if that is quickly done; False when `move` has to."""
        if self.unsent:
            return False
        try:
            data = self.source.recv(READ_SIZE, self._flags)
            self.unsent = self._same(data)
            if not self.unsent:
                self._unread = data
                return False
            sent = self.sink.send(self.unsent, socket.MSG_DONTWAIT)
        except OSError:  # which one, `move` finds when it tries again
            return False
        self.unsent = self.unsent[sent:]
        return not (self.unsent or self.has_more())

    def move(self) -> bool:
        """One read or one write; True when the stream has ended."""
        if not self.unsent:
            data, self._unread = self._unread, None
            try:
                if data is None:
                    data = self.source.recv(READ_SIZE, self._flags)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            except OSError:  # how it broke is in the flight; the taker looks there
                data = b""
            out, self._last = self._take(data)
            self.unsent = b"%x\r\n%b\r\n" % (len(out), out) if out and self._chunked else out
        if self.unsent:
            try:
                self.unsent = self.unsent[self.sink.send(self.unsent, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
            except OSError as e:
                raise Failure("client_left", status=200) from e
        return self._last and not self.unsent

    def turn(self) -> None:
        """From now on it is the other one that the stream waits for."""
        self.waits_for_client = not self.waits_for_client
        self._wait_for("client" if self.waits_for_client else "upstream")

    def has_more(self) -> bool:
        """True when TLS holds bytes that the system does not know of."""
        return self.is_tls and not self.unsent and self.source.pending() > 0  # type: ignore[union-attr]


class Carrier:
    """Carries streams, all in one thread, which is started by the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the start
        self._thread: threading.Thread | None = None
        self._new: deque[Carried] = deque()
        self._is_behind = False
        self._waiting: deque[threading.Lock] = deque()  # released to let one in

    def give_way(self) -> None:
        """Return when a request may begin: at once, unless many streams wait to be moved on."""
        if self._is_behind:
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
            if not (self._is_behind and gate.acquire(timeout=WAY_S)):
                with contextlib.suppress(ValueError):  # let in meanwhile
                    self._waiting.remove(gate)  # or it would take the place of one that waits

    def carry(self, stream: Carried) -> None:
        """Return when `stream` has ended; raise what ended it too early."""
        with without_waiting(stream.source):
            self._hand_over(stream)
            stream.over.wait()
        if stream.error:
            raise stream.error

    def through(self, stream: Carried, ours: socket.socket, sign: bytes = b"",
                every_s: float = 0.0) -> Iterator[bytes]:  # fmt: skip
        """What `stream` writes to its sink, which is the other end of `ours`; raises as `carry`.

        After each `every_s` seconds of silence, a `sign`: what is written is whole events.
        Whoever closes this generator early ends the stream.
        """
        stream.is_pair = True
        with without_waiting(stream.source):
            try:
                self._hand_over(stream)
            except RuntimeError:
                stream.sink.close()
                raise
            ours.settimeout(every_s or None)
            try:
                while data := received(ours, sign):
                    yield data
            finally:
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)
                    socket.socket.shutdown(stream.source, socket.SHUT_RD)
                stream.over.wait()
                stream.sink.close()
        if stream.error:
            raise stream.error

    def _hand_over(self, stream: Carried) -> None:
        with self._lock:
            if self._thread is None:
                self._selector = selectors.DefaultSelector()
                self._bell, heard = socket.socketpair()
                heard.setblocking(False)
                self._selector.register(heard, READ)
                thread = threading.Thread(
                    target=self._run, args=(heard,), name="carrier", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no thread can be had: the next stream tries again
                    for opened in (self._selector, self._bell, heard):
                        opened.close()
                    raise
                self._thread = thread
        self._new.append(stream)
        self._bell.send(b"!")

    def _run(self, heard: socket.socket) -> None:
        while True:
            self._round(heard)

    def _round(self, heard: socket.socket) -> None:
        """Wait, then move on whatever can be; nothing here outlives it."""
        ready = self._selector.select(0 if self._is_behind else None)
        self._is_behind = len(ready) >= BEHIND
        for key, _ in ready:
            if key.data is not None:
                self._step(key.data)
                continue
            heard.recv(READ_SIZE)
            while self._new:
                self._begin(self._new.popleft())
        most = len(ready) // FOR_ONE if self._is_behind else len(self._waiting)
        with contextlib.suppress(IndexError):  # nobody waits any more
            for _ in range(most):
                self._waiting.popleft().release()

    def _begin(self, stream: Carried) -> None:
        if stream.has_more():  # of which no descriptor tells: begin with a turn of the client
            stream.turn()
        self._watch(stream)

    def _watch(self, stream: Carried) -> None:
        sock, what = (stream.sink, WRITE) if stream.waits_for_client else (stream.source, READ)
        self._selector.register(sock, what, stream)

    def _forget(self, stream: Carried) -> None:
        self._selector.unregister(stream.sink if stream.waits_for_client else stream.source)

    def _step(self, stream: Carried) -> None:
        """Move one stream on; whatever goes wrong ends this one and no other."""
        ended = False
        try:
            if not stream.hand_on():
                ended = stream.move()
                while stream.has_more() and not ended:
                    ended = stream.move()
                if not ended and bool(stream.unsent) != stream.waits_for_client:
                    self._forget(stream)
                    stream.turn()
                    self._watch(stream)
        except Exception as e:  # noqa: BLE001  the thread of the stream tells what it was
            stream.error, ended = e, True
        if ended:
            with contextlib.suppress(OSError, ValueError, KeyError):  # watched no more already
                self._forget(stream)
            if stream.is_pair:  # its reader has to learn that nothing more comes
                with contextlib.suppress(OSError):
                    stream.sink.shutdown(socket.SHUT_WR)
            stream.over.set()


def received(sock: socket.socket, sign: bytes) -> bytes:
    """What has come, b"" at the end, or `sign` when nothing came in time."""
    try:
        return sock.recv(READ_SIZE)
    except TimeoutError:
        return sign


@contextlib.contextmanager
def without_waiting(sock: Source) -> Iterator[None]:
    """TLS knows no flag for one call: it must not wait at all meanwhile."""
    if isinstance(sock, ssl.SSLSocket):
        sock.setblocking(False)
    try:
        yield
    finally:
        if isinstance(sock, ssl.SSLSocket):
            sock.setblocking(True)
