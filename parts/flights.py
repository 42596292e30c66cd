"""What is in the air: permits, the sockets of both sides, and the deadlines.

A WSGI thread learns that its client left only at its next write, and a read timeout counts from
one packet to the next. So every request that is served is a `Flight`, which knows the client's
socket, the upstream's socket and the next deadline; one watcher thread ends flights whose client
left or whose deadline passed, by shutting the upstream's socket down.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable

from parts.errors import Full
from parts.logs import where_it_broke

log = logging.getLogger("llm_router")

TICK_S = 0.25  # how often the watcher looks at clients and deadlines
NEVER = (math.inf, "")
RESERVE = 8  # threads kept free of chats, so that /health and the admin routes always answer
MOST_UNCOUNTED = RESERVE // 2  # of which bodies of admin routes may hold so many at once
UNCOUNTED_S = 10.0  # and each so long
_LEFT = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere a read of zero bytes tells


class Flight:
    """One chat request in the air: its client, the upstream socket, and the next deadline."""

    def __init__(self, client: socket.socket | None, clock: Callable[[], float],
                 due: tuple[float, str] = NEVER):  # fmt: skip
        self.client = client
        self.clock = clock
        self.why: str | None = None  # what ended it, because a shutdown looks like a reset
        self.resent = False  # the upstream was asked before: only a fresh connection will do
        # When the watcher ends the flight, and as what. Whoever serves it sets this, in one step,
        # so that the two always agree.
        self.due = due
        self.released = False
        self.counted = True
        self._lock = threading.Lock()  # guards the two below; held during a shutdown: no wait
        self._over: threading.Event | None = None  # made by the first wait
        self._sock: socket.socket | None = None

    def end(self, why: str, due: tuple[float, str] | None = None) -> None:
        """Shut the upstream socket down; its reader wakes up and finds `why`.

        `due`: only if this deadline is still the one in force.
        """
        with self._lock:
            if self.released or self.why or (due is not None and due is not self.due):
                return
            self.why = why
            hung_up = [self._sock]
            if why == "client_left":  # or stopped reading or sending: our thread waits for it
                hung_up.append(self.client)
            for sock in filter(None, hung_up):
                with contextlib.suppress(OSError):  # the plain method: TLS would say goodbye first
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
            if self._over:
                self._over.set()

    def next_attempt(self, *, fresh: bool = False) -> None:
        """Forget a deadline that ended the last attempt, but not a client that left.

        `fresh`: it goes to the same upstream again, so no used connection will do.
        """
        with self._lock:
            self.due, self.resent = NEVER, fresh
            if self.why not in (None, "client_left", "total"):
                self.why = self._over = None

    def wait(self, seconds: float) -> None:
        """Sleep, unless the flight ends or has ended."""
        with self._lock:
            over = self._over = self._over or threading.Event()
            if self.why:
                over.set()
        over.wait(seconds)

    def attach(self, sock: socket.socket | None) -> None:
        """Note the upstream socket in use; at once shut down when the flight is over."""
        with self._lock:
            self._sock = sock
            if self.why and sock is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def detach(self) -> bool:
        """The connection goes back to the pool; False when it was shut down meanwhile."""
        with self._lock:
            self._sock = None
            return self.why is None

    def client_left(self) -> bool:
        """True when the client's socket says so; only for platforms without POLLRDHUP."""
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return self.client is not None and self.client.recv(1, flags) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


class Flights:
    """Everything in the air: a permit for each, and one thread that watches all of them."""

    def __init__(self, threads: int, clock: Callable[[], float] = time.monotonic):
        self.limit = max(1, threads - RESERVE)
        self._clock = clock
        self._lock = threading.Lock()  # guards _air and _watcher
        self._air: set[Flight] = set()
        self._uncounted = 0
        self._busy = threading.Event()
        self._watcher: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._air) - self._uncounted

    def acquire(self, flight: Flight, *, counted: bool = True) -> None:
        """Watch `flight` and give it a permit, at once; Full when all are taken.

        Not `counted`: it takes no permit, so that an operator gets in when all are taken; but only
        some threads are kept for that, and its upload has less time.
        """
        with self._lock:
            if counted and len(self) >= self.limit:
                raise Full(f"{self.limit} requests are in flight, all that ROUTER_THREADS allows")
            if not counted and self._uncounted >= MOST_UNCOUNTED:
                raise Full(f"{MOST_UNCOUNTED} changes are being sent already")
            if not counted:
                flight.due = min(flight.due, (self._clock() + UNCOUNTED_S, "client_left"))
            if self._watcher is None:  # not at import, nor before gunicorn has forked
                watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
                watcher.start()  # which may fail: then the next flight tries again
                self._watcher = watcher
            self._air.add(flight)
            self._uncounted += not counted
            flight.counted = counted
            if not self._busy.is_set():
                self._busy.set()

    def release(self, flight: Flight) -> None:
        """Give the permit back; nothing shuts the flight's sockets down after this."""
        with flight._lock:
            flight.released = True
        with self._lock:
            self._uncounted -= flight in self._air and not flight.counted
            self._air.discard(flight)

    def _watch(self) -> None:
        while True:
            self._busy.wait()
            time.sleep(TICK_S)
            try:
                self.look()
            except Exception:  # noqa: BLE001  must outlive anything: else nothing ever ends
                log.error("watcher_error", {"where": where_it_broke()})

    def look(self) -> None:
        """End every flight whose client left or whose deadline passed."""
        with self._lock:
            air = list(self._air)
            if not air:
                self._busy.clear()
        left, now = clients_that_left(air), self._clock()
        for flight in air:
            due = flight.due
            if flight in left:
                flight.end("client_left")
            elif now >= due[0]:
                flight.end(due[1], due)


def clients_that_left(air: Iterable[Flight]) -> set[Flight]:
    """The flights whose client closed its connection, or half of it."""
    by_fd: dict[int, Flight] = {}
    poll = select.poll()
    for flight in air:
        try:
            fd = flight.client.fileno()  # type: ignore[union-attr]
            poll.register(fd, _LEFT or select.POLLIN)
        except (AttributeError, OSError, ValueError):  # no socket, or closed
            continue
        by_fd[fd] = flight
    gone = {by_fd[fd] for fd, _ in poll.poll(0)}
    return gone if _LEFT else {flight for flight in gone if flight.client_left()}
