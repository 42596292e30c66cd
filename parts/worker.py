"""gunicorn's threaded worker, without the way through its main thread, and with refusals as JSON.

gthread hands each request from its main thread to an executor and back through a pipe, which costs
more than serving a constant answer does. Here each thread waits on one epoll for a connection that
can be read, serves its request and puts it back; the main thread accepts, and ends what is idle.
Where there is no epoll the threads are gthread's own (`Threaded`). Nothing here knows the router.

Who may touch what, and when
----------------------------
A connection is in one of three places:

1. `idle`, by its descriptor: nobody's, it waits for its client. It is new, half a head of its
   request has come, it is kept after an answer, its client takes an answer slowly (`unsent`), or
   it is leaving: our side is closed, and what the client still sends is thrown away, or the system
   would take back the end of our answer with it.
2. With the thread that took it out of `idle`. Nobody else reads from it, writes to it, changes
   what is noted on it, or closes it, until that thread puts it back or ends it.
3. Gone: closed, and no longer in `open`, which holds the others in either place.

There is no lock. What makes each step safe is that each is one call into C on a dict or a set,
which the interpreter does whole:

- To take a connection is `idle.pop(descriptor, None)`. Two who try at once, two threads or a thread
  and the main thread, do not both get it.
- A thread that puts one back first writes it into `idle` and only then arms the epoll, which
  reports it once (ONESHOT) and at once if something has come meanwhile. The other way round a
  thread could be woken for it, find nothing in `idle`, and nobody would be woken again.
- Between these two steps the main thread may close it, so that arming it fails or, if the main
  thread has accepted another one under the same number by then, wakes a thread for that one. So a
  thread may be woken for nothing: it reads without waiting, finds nothing, and puts it back.
- Only the main thread accepts. So while it looks at `idle`, no number of a descriptor there can
  come to mean another connection.
- The main thread closes connections that are nobody's and whose time is over (`end`), never one
  whose client has sent something: a thread will come for it. What it reads of them to decide may be
  a moment old: one that was past its time, and was served and put back meanwhile, is closed as a
  kept one may be at any time.

What a connection may cost before it has said anything is the time until `HEAD_S` is over: a head
is read as it comes, and what there is of it is put back with the connection (`Parser.has_head`).
It holds no thread and, since the oldest such go first when there is no room (`make_room`), no
place that others need. A whole answer that its client does not take is put back with it, too, and
has `SEND_S`; a stream is the application's and, where no carrier takes it over, holds its thread
for as long. A body is the application's: it knows who may send how much for how long.

A head is read by gunicorn, or in the same way: `read_ordinary` takes only what gunicorn reads
without a choice, and a test holds it against gunicorn and h11. While a head is incomplete gunicorn
tries anew with each piece; so it refuses one as soon as it can, and nobody decides in its place.

gunicorn.conf.py loads this file by its path, in the master, with each reload. The master would keep
whatever this file imports and hand it to new workers: at module level nothing of ours is imported.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import heapq
import io
import itertools
import json
import logging
import os
import re
import select
import socket
import ssl
import struct
import threading
import time
import types
from functools import lru_cache
from typing import Any

from gunicorn import util
from gunicorn.http import RequestParser, body, wsgi
from gunicorn.http.errors import LimitRequestHeaders
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import gthread

log = logging.getLogger("llm_router")

HEAD_S = 10.0  # for a head in all: the first from accept on, a later one from its first byte on
MAX_HEAD = 65536  # bytes of a head that comes in pieces; one header is at most 8 KB
YOUNG_S = 0.2  # so long after it was accepted or served a connection is not closed to make room
SEND_S = 30.0  # a client that takes nothing of an answer for so long has left
MAX_UNSENT = 64 << 20  # bytes of answers that their clients take slowly; beyond, the latest end
REST_S = 0.02  # for the rest of a body that nobody wanted, which is nearly always there
GOODBYE_S = 0.5  # for the client to close as well
AT_ONCE_S = 0.002  # of it in our thread: most close at once, and no other has to be woken for that
LINGER_S = 2.0  # a worker that leaves keeps idle connections so long: a request may be on its way
SHORTAGE_S = 60.0  # how often it is said that there are no descriptors
TRIM_S = 60.0  # how often freed memory is given back at the latest; what lies between is the bound
IN_A_ROW = 16  # requests of one connection, before others that wait for a thread get one
LOOK_S = 0.25  # how often the main thread looks for idle connections, and whether it may leave


class Body(body.Body):
    """A request's body of known length, received in one piece; gunicorn copies it five times."""

    def __init__(self, reader: Any, sock: socket.socket):
        super().__init__(reader)
        self._sock = sock
        self.is_broken = False  # a chunk that lied: nobody knows where the next request begins

    def read(self, size: int | None = None) -> bytes:
        """So many bytes, all of them by default; fewer when the client stops sending."""
        if not isinstance(self.reader, body.LengthReader) or isinstance(self._sock, ssl.SSLSocket):
            self.is_broken = True
            data = bytes(super().read(size))
            self.is_broken = False
            return data
        wanted = self.reader.length
        wanted = wanted if size is None or size < 0 else min(size, wanted)
        held = self.reader.unreader.buf.getvalue()
        self.reader.unreader.buf = io.BytesIO()
        self.reader.unreader.unread(held[wanted:])
        pieces, missing = [held[:wanted]], wanted - min(wanted, len(held))
        while missing and (piece := self._sock.recv(missing, socket.MSG_WAITALL)):
            pieces.append(piece)
            missing -= len(piece)
        self.reader.length -= wanted - missing
        return b"".join(pieces)


# An ordinary head. Reading any other, and refusing it, is left to gunicorn.
ORDINARY = re.compile(
    rb"(GET|POST|DELETE) (/|/[a-z][\w./~-]*) HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9-]{1,64}:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n",
    re.ASCII,
)
LENGTH = re.compile("[0-9]{1,18}")
MAX_ORDINARY = 4094  # bytes of such a head; no line in it can pass gunicorn's limits
TO_GUNICORN = {"TRANSFER_ENCODING", "EXPECT", "UPGRADE", "HTTP2_SETTINGS"}


@lru_cache(maxsize=256)
def key_of(name: str) -> str:
    """Where WSGI keeps a header; "" for one that only gunicorn may read."""
    name = name.upper().replace("-", "_")
    if name in TO_GUNICORN:
        return ""
    return name if name in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{name}"


def base_environ(cfg: Any) -> dict[str, Any]:
    """What is the same for all ordinary requests."""
    return {
        **wsgi.base_environ(cfg),
        "wsgi.multithread": True,
        "wsgi.url_scheme": "http",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SCRIPT_NAME": "",
        "QUERY_STRING": "",
    }


class Ordinary:
    """A request with an ordinary head, and what gunicorn asks of a request."""

    version = (1, 1)
    headers = ()  # none of those that gunicorn asks for again

    def __init__(self, environ: dict[str, Any], length: int, closes: bool):
        self.environ = environ
        self.length = length
        self.method: str = environ["REQUEST_METHOD"]
        self.uri: str = environ["PATH_INFO"]
        self._closes = closes
        self.body: Body

    def should_close(self) -> bool:
        """True when the client takes no other answer on this connection."""
        return self._closes


def read_ordinary(data: bytes, end: int, base: dict[str, Any], most: int) -> Ordinary | None:
    """The request whose head is `data` up to `end`; None when it is not ordinary.

    What is read is a part of what gunicorn reads, and it is read in the same way: no header twice,
    at most `most` of them, and a length that is nothing but digits.
    """
    head = ORDINARY.fullmatch(data, 0, end)
    if not head:
        return None
    environ = base.copy()
    environ["REQUEST_METHOD"] = head[1].decode()
    environ["PATH_INFO"] = environ["RAW_URI"] = head[2].decode()
    lines = head[3].decode("latin-1").split("\r\n")[:-1]
    for line in lines:
        name, _, value = line.partition(":")
        key = key_of(name)
        if not key or key in environ:
            return None
        environ[key] = value.strip(" \t")
    length = environ.get("CONTENT_LENGTH", "0")
    connection = environ.get("HTTP_CONNECTION", "keep-alive").lower()
    if not LENGTH.fullmatch(length) or connection not in ("keep-alive", "close"):
        return None
    return Ordinary(environ, int(length), connection == "close") if len(lines) <= most else None


class Unreader(SocketUnreader):
    """What a client sends. While a head is read nothing waits: BlockingIOError, it comes later."""

    head: bytes | None = None  # all that has come, while a head is read

    def chunk(self, *wanted: Any) -> bytes:
        """The next piece."""
        if self.head is None:
            return bytes(super().chunk(*wanted))
        data: bytes = self.sock.recv(self.mxchunk, socket.MSG_DONTWAIT)
        self.head += data
        if len(self.head) > MAX_HEAD:
            raise LimitRequestHeaders(f"over {MAX_HEAD} bytes")
        return data


class Parser(RequestParser):
    """The requests of a connection: ordinary ones at a seventh of gunicorn's time, others by it."""

    req_count: int

    def __init__(self, cfg: Any, conn: Any, base: dict[str, Any] | None):
        super().__init__(cfg, conn.sock, conn.client)
        self.unreader = Unreader(conn.sock)
        self._sock = conn.sock
        self._next: Any = None  # what `has_head` has found: a request, or what is wrong with it
        self._base = base and base | {
            "gunicorn.socket": conn.sock,
            "REMOTE_ADDR": conn.client[0],
            "REMOTE_PORT": str(conn.client[1]),
            "SERVER_NAME": conn.server[0],
            "SERVER_PORT": str(conn.server[1]),
        }

    def has_head(self) -> bool:
        """True when the next request, or what is wrong with it, can be had without waiting."""
        data = self.unreader.buf.getvalue()
        try:
            data = data or self._sock.recv(8192, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as e:
            self._next = e
            return True
        end = data.find(b"\r\n\r\n", 0, MAX_ORDINARY) + 4
        request = self._base and read_ordinary(data, end, self._base, self.cfg.limit_request_fields)
        if not request:
            return self._has_odd_head(data)
        self.unreader.buf = io.BytesIO(data[end:])
        request.body = Body(body.LengthReader(self.unreader, request.length), self._sock)
        request.environ["wsgi.input"] = request.body
        self.mesg = self._next = request
        return True

    def _has_odd_head(self, data: bytes) -> bool:
        """The same by gunicorn, as far as what has come."""
        unreader, before = self.unreader, self.req_count
        unreader.head, unreader.buf = data, io.BytesIO(data)
        try:
            self._next = super().__next__()
        except BlockingIOError:  # what has come is read once more when there is more of it
            unreader.buf = io.BytesIO(unreader.head)
            self.req_count = before
            return False
        except Exception as e:  # noqa: BLE001  raised where gunicorn would have
            self._next = e
        finally:
            unreader.head = None
        return True

    def __next__(self) -> Any:
        """The next request; StopIteration when the client has closed the connection."""
        found, self._next = self._next, None
        if isinstance(found, Exception):
            try:
                raise found
            finally:
                del found  # it knows this frame
        return found


@lru_cache(maxsize=256)
def is_end_to_end(name: str) -> bool:
    """True for a well-formed header that says nothing about the connection."""
    well_formed = re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII)
    return bool(well_formed) and not util.is_hoppish(name) and name.lower() != "content-length"


@lru_cache(maxsize=1)
def date_of(second: int) -> str:
    """The value of a Date header."""
    return str(util.http_date(second))


NO_VALUE = re.compile(r"[^\t\x20-\x7e\x80-\xff]")


class Response(wsgi.Response):
    """gunicorn's response, its head in one packet with what follows: the client wakes up once."""

    headers: list[tuple[str, str]]
    headers_sent: bool
    client_left = False
    unsent = b""  # what the client did not take at once, where somebody will send it later

    def process_headers(self, headers: list[tuple[str, str]]) -> None:
        """Take the headers; gunicorn looks at each of them when one is not as usual."""
        for name, value in headers:
            if name == "Content-Length" and value.isdecimal():
                self.response_length = int(value)
            elif not is_end_to_end(name):
                return super().process_headers(headers)
        if NO_VALUE.search("".join([value for _, value in headers])):
            return super().process_headers(headers)
        self.headers = headers
        return None

    def send_headers(self) -> None:
        """Nothing yet: `write` and `close` take the head along."""

    def write(self, data: bytes) -> None:
        """Send some of the body; an empty piece would end a chunked one."""
        if not data and self.headers_sent:
            return
        if self.chunked and data:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        self.send(self.head() + data)

    def close(self) -> None:
        """End the response."""
        end = self.head() + (b"0\r\n\r\n" if self.chunked else b"")
        if end:
            self.send(end)

    def send(self, data: bytes) -> None:
        """Send it; ConnectionResetError when the client has left or takes nothing any more."""
        try:
            self.send_now(data)
        except OSError as e:
            self.client_left = True
            why = os.strerror(errno.ECONNRESET)  # which gunicorn passes over, whatever it was
            raise ConnectionResetError(errno.ECONNRESET, why) from e

    def send_now(self, data: bytes) -> None:
        """Send it, waiting for the client; OSError."""
        self.sock.sendall(data)

    def head(self) -> bytes:
        """Status line and headers, the first time."""
        if self.headers_sent:
            return b""
        self.headers_sent = True
        major, minor = self.req.version
        lines = [
            f"HTTP/{major}.{minor} {self.status}",
            f"Server: {self.version}",
            f"Date: {date_of(int(time.time()))}",
            f"Connection: {'close' if self.should_close() else 'keep-alive'}",
            *(["Transfer-Encoding: chunked"] if self.chunked else ()),
            *[f"{name}: {value}" for name, value in self.headers],
        ]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")


class Unhurried(Response):
    """A response that waits for its client only when it is a stream, or over TLS."""

    def send_now(self, data: bytes) -> None:
        """Send what the client takes at once, of a whole answer."""
        if self.response_length is None or type(self.sock) is not socket.socket:
            self.sock.sendall(data)
        else:
            data = self.unsent + data
            self.unsent = data[send_some(self.sock, data) :]


def send_some(sock: socket.socket, data: bytes | memoryview) -> int:
    """Send what the client takes at once; how many bytes that were. OSError when it has left."""
    try:
        return sock.send(data, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return 0


class Bug(Exception):
    """An OSError that came out of the application: gunicorn would take it for the client's."""


class Threaded(gthread.ThreadWorker):
    """gthread whose own refusals (a malformed head, 100 KB of headers) are JSON like all others."""

    response_class = Response

    def __init__(self, *args: Any):
        self.accept_at = self.complain_at = 0.0  # when that may be done again
        super().__init__(*args)

    def init_process(self) -> None:
        """Read each setting once: looking one up costs a microsecond, 22 times a request."""
        settings = {name: told.get() for name, told in self.cfg.settings.items()}
        self.cfg.__dict__.update(settings)
        super().init_process()

    def accept(self, listener: Any) -> None:
        """Take a new connection. One that cannot be taken waits; those that are served go on."""
        try:
            super().accept(listener)
        except OSError as e:
            shortage = e.errno in (errno.EMFILE, errno.ENFILE)
            now = time.monotonic()
            if now >= self.complain_at:
                self.complain_at = now + SHORTAGE_S
                log.warning("accept_failed", {"why": e.strerror, "connections": self.nr_conns})
            if not (shortage and self.make_room()):
                self.accept_at = now + LOOK_S
                self.set_accept_enabled(False)

    def make_room(self) -> bool:
        """True when connections could be closed to make room for others."""
        return False

    def set_accept_enabled(self, enabled: bool) -> None:
        """On leaving, close the listener: a backlog nobody reads would hold clients for 60 s."""
        super().set_accept_enabled(enabled and time.monotonic() >= self.accept_at)
        if not enabled and not self.alive:
            for listener in self.sockets:
                listener.close()

    def handle_request(self, req: Any, conn: Any) -> bool:
        """Serve one request; True when its connection can take another one.

        gunicorn's hooks for each request and its access log are left out: the router has its own.
        """
        if isinstance(req, Ordinary):
            environ = req.environ
        else:
            _, environ = wsgi.create(req, conn.sock, conn.client, conn.server, self.cfg)
            environ["wsgi.multithread"] = True
            req.body = environ["wsgi.input"] = Body(req.body.reader, conn.sock)
        response = self.response_class(req, conn.sock, self.cfg)
        if not self.alive or not self.cfg.keepalive or self.is_crowded():
            response.force_close()
        self.respond(environ, response)
        if response.unsent:
            conn.unsent = memoryview(response.unsent)
        return not response.should_close() and self.has_read(req, conn)

    def respond(self, environ: dict[str, Any], response: Response) -> None:
        """Have the application answer. A bug behind the head can only end the connection."""
        try:
            pieces = self.wsgi(environ, response.start_response)
            try:
                for piece in pieces:
                    response.write(piece)
                response.close()
            finally:
                pieces.close()
        except Exception as e:
            if response.client_left:
                raise
            if not response.headers_sent:
                if isinstance(e, OSError):
                    raise Bug(e.strerror).with_traceback(e.__traceback__) from e
                raise
            from parts.logs import where_it_broke

            log.error("internal_error", {"where": where_it_broke()})
            raise StopIteration from None  # gunicorn's word for it

    def is_parent_alive(self) -> bool:
        """False when the master has died; then this worker leaves as if it had been told to."""
        if super().is_parent_alive():
            return True
        self.alive = False
        return False

    def is_crowded(self) -> bool:
        """True when there is no room for one more idle connection."""
        return len(self.keepalived_conns) >= self.max_keepalived

    def has_read(self, req: Any, conn: Any) -> bool:
        """True when nothing is left of the request's body, or what was left came in time."""
        if req.body.is_broken:
            return False
        if getattr(req.body.reader, "length", 1) == 0:
            return True
        return bool(conn.parser.finish_body(deadline=time.monotonic() + REST_S))

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        """gunicorn would read the rest of the body here; `handle_request` has."""
        return keepalive

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Let gunicorn word the refusal, then send it as JSON instead of HTML.

        gunicorn would log what the client sent, which may be a key or a prompt; we log the place.
        It gets no request to look at, which it wants only for its access log.
        """
        from parts.logs import where_it_broke

        where = {"where": where_it_broke(), "address": addr[0] if addr else ""}
        page = Envelope(client)
        quiet = types.SimpleNamespace(cfg=self.cfg, log=Silence())
        gthread.ThreadWorker.handle_error(quiet, None, page, addr, exc)
        if page.status == 500:
            log.error("internal_error", where)
        else:
            log.warning("request_refused", where)


class Direct(Threaded):
    """Threads that find their requests themselves; the head of this file says what keeps order."""

    response_class = Unhurried
    ONCE = getattr(select, "EPOLLONESHOT", 0)
    READABLE = getattr(select, "EPOLLIN", 0) | ONCE
    WRITABLE = getattr(select, "EPOLLOUT", 0) | ONCE

    def __init__(self, *args: Any):
        self.open: set[Any] = set()  # the connections
        self.idle: dict[int, Any] = {}  # by descriptor, those that wait for their client
        self.is_untidy = True  # something was done since memory was given back
        self.trim_at = time.monotonic() + TRIM_S  # when that is done although something is served
        self.look_at = 0.0  # when the main thread next looks for those that are idle for too long
        self.full_of_kept = False  # there was no room for more of those when it last looked
        super().__init__(*args)

    def init_process(self) -> None:
        """Make what only this process may have: the master made the worker before it forked."""
        self.ready = select.epoll()  # wakes one thread for each connection that can be read
        self.base = base_environ(self.cfg)
        super().init_process()

    def run(self) -> None:
        """Serve until told to leave."""
        for n in range(self.cfg.threads):
            threading.Thread(target=self.serve, name=f"serve-{n}", daemon=True).start()
        super().run()

    # --- the main thread: new connections, and the end of idle ones

    def enqueue_req(self, conn: Any) -> None:
        """A connection was accepted: wait for its first request, holding no thread."""
        self.open.add(conn)
        conn.data_ready = True
        conn.is_kept = conn.is_leaving = conn.is_last = False
        conn.unsent = b""
        conn.since = time.monotonic()
        conn.timeout = conn.since + HEAD_S
        conn.sock.setblocking(True)
        with contextlib.suppress(OSError):  # a system that cannot: only a slow reader costs more
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SEND_TIMEOUT)
        self.idle[conn.sock.fileno()] = conn
        with contextlib.suppress(OSError, ValueError):
            self.ready.register(conn.sock, self.READABLE)

    def murder_keepalived(self, force: bool = False) -> None:
        """Close what has been idle for too long, and soon all that is idle when told to leave."""
        if len(self.open) >= self.worker_connections:
            self.make_room()
        now = time.monotonic()
        if now < self.look_at and not force:
            return
        self.look_at = now + LOOK_S
        is_idle = len(self.idle) == len(self.open)
        if self.is_untidy and (is_idle or now >= self.trim_at):
            self.is_untidy, self.trim_at = False, now + TRIM_S
            give_back_memory(collect=is_idle)
        idle = self.idle.copy()
        self.full_of_kept = sum(c.is_kept for c in idle.values()) >= self.max_keepalived
        room = MAX_UNSENT
        for descriptor, conn in idle.items():
            room -= len(conn.unsent)
            if not self.alive and not conn.unsent:
                conn.timeout = min(conn.timeout, now + LINGER_S)
            if force or conn.timeout <= now or (room < 0 and conn.unsent):
                self.end(descriptor, conn, force)

    def make_room(self) -> bool:
        """Close some of the oldest that wait for their client, at first those that never asked.

        Those whose answer is still on its way go last.
        """
        idle, before = self.idle.copy().items(), time.monotonic() - YOUNG_S
        old = [
            (bool(conn.unsent), conn.is_kept, conn.since, n)
            for n, conn in idle
            if conn.since <= before
        ]
        oldest = heapq.nsmallest(1 + len(idle) // 64, old)
        return any([self.end(at, self.idle.get(at)) for *_, at in oldest])

    def end(self, descriptor: int, conn: Any, force: bool = False) -> bool:
        """Close an idle connection; False when it is none any more or waits for a thread."""
        if conn is None or not (force or conn.is_leaving or conn.unsent or not has_unread(conn)):
            return False
        if self.idle.pop(descriptor, None) is None:
            return False
        conn.close()
        self.forget(conn)
        return True

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """The main thread's wait: it has to look again soon when it is to leave or out of room."""
        soon = not (self.alive and self._accepting)
        super().wait_for_and_dispatch_events(min(timeout, LOOK_S) if soon else timeout)

    # --- the threads

    def serve(self) -> None:
        """A thread's life: take a connection that can be read, serve it, put it back."""
        while True:
            for descriptor, _ in self.ready.poll(-1, 1):
                conn = self.idle.pop(descriptor, None)
                if conn is not None:
                    self.serve_one(conn)

    def serve_one(self, conn: Any) -> None:
        """Serve what a client has sent, then put its connection back or end it."""
        self.is_untidy = True
        try:
            keep = not conn.is_leaving and self.serve_all(conn)
        except BaseException:  # noqa: BLE001  a thread that dies here is missed by all who come
            from parts.logs import where_it_broke

            log.error("internal_error", {"where": where_it_broke()})
            keep = False
        if keep:
            self.park(conn)
        elif is_gone(conn):
            self.forget(conn)
        else:
            self.park(conn)

    def serve_all(self, conn: Any) -> bool:
        """Serve the requests that are there; False when the connection is to be closed."""
        if conn.unsent:
            self.send_rest(conn)
        for served in itertools.count():
            if conn.unsent or conn.is_last or not self.has_request(conn, served):
                break
            conn.is_last = not self.handle(conn)
            conn.is_kept, conn.since = True, time.monotonic()
            conn.timeout = conn.since + (SEND_S if conn.unsent else self.cfg.keepalive)
        if conn.unsent or conn.is_last:
            return bool(conn.unsent)
        if conn.is_kept and held_by(conn):  # half a head; for the first one the time runs already
            conn.timeout = min(conn.timeout, time.monotonic() + HEAD_S)
        return True

    def send_rest(self, conn: Any) -> None:
        """Send more of an answer to a client that takes it slowly."""
        try:
            conn.unsent = conn.unsent[send_some(conn.sock, conn.unsent) :]
            conn.timeout = time.monotonic() + (SEND_S if conn.unsent else self.cfg.keepalive)
        except OSError:
            conn.unsent, conn.is_last = b"", True

    def has_request(self, conn: Any, served: int) -> bool:
        """True when the next request, or what is wrong with it, can be had without waiting.

        After some in a row only what has been received counts: others wait for a thread.
        """
        if conn.parser is None and self.is_plain(conn):
            conn.parser = Parser(self.cfg, conn, self.base if self.is_ordinary(conn) else None)
        if not isinstance(conn.parser, Parser):  # gunicorn reads it, in this thread
            return not served or bool(held_by(conn))
        if served >= IN_A_ROW and b"\r\n\r\n" not in held_by(conn):
            return False
        return conn.parser.has_head()

    def is_plain(self, conn: Any) -> bool:
        """True when what comes is read as HTTP/1, by nobody but the parser."""
        return type(conn.sock) is socket.socket and not (
            self.cfg.is_ssl or "h2" in self.cfg.http_protocols
        )

    def is_ordinary(self, conn: Any) -> bool:
        """True when nothing that was set changes how a request is read."""
        changed = os.environ.get("SCRIPT_NAME") or self.cfg.secure_scheme_headers
        changed = changed or self.cfg.is_ssl or self.cfg.proxy_protocol not in ("off", False)
        return not changed and isinstance(conn.client, tuple) and isinstance(conn.server, tuple)

    def park(self, conn: Any) -> None:
        """The connection is nobody's until it can be read, or takes more of its answer."""
        wanted = self.WRITABLE if conn.unsent else self.READABLE
        self.idle[conn.sock.fileno()] = conn
        with contextlib.suppress(OSError, ValueError):  # the main thread has closed it
            self.ready.modify(conn.sock, wanted)

    def forget(self, conn: Any) -> None:
        """A connection was closed; the main thread has to know when it waits for that."""
        self.open.discard(conn)
        if not self._accepting:
            self.method_queue.defer(lambda: None)

    # --- what gunicorn asks

    @property
    def nr_conns(self) -> int:
        """How many connections there are."""
        return len(self.open)

    @nr_conns.setter
    def nr_conns(self, _: int) -> None:
        """gunicorn counts up in `accept`; here that is `enqueue_req`."""

    def is_crowded(self) -> bool:
        """True when there is no room for one more idle connection."""
        return self.full_of_kept


SEND_TIMEOUT = struct.pack("ll", int(SEND_S), 0)  # a struct timeval


def held_by(conn: Any) -> bytes:
    """What a connection's parser has received and not read."""
    return bytes(conn.parser.unreader.buf.getvalue())


def has_unread(conn: Any) -> bool:
    """True when the client has sent something that no thread has come for yet."""
    try:
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
        return bool(socket.socket.recv(conn.sock, 1, flags))  # TLS knows no flags
    except OSError:
        return False


def is_gone(conn: Any) -> bool:
    """Close a connection as far as can be done at once; False while the client has not closed it.

    Closed at once, the system would take back what the client has not read of our answer, if it
    has sent more than we have read.
    """
    sock = conn.sock
    if type(sock) is not socket.socket:
        util.close_graceful(sock, timeout=GOODBYE_S)
        return True
    try:
        if not conn.is_leaving:
            conn.is_leaving, conn.parser = True, None
            conn.timeout = time.monotonic() + GOODBYE_S
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(AT_ONCE_S)
        by = time.monotonic() + AT_ONCE_S
        while sock.recv(65536):
            if time.monotonic() > by:  # it sends on; the main thread ends that
                return False
    except TimeoutError:
        return False
    except OSError:
        pass
    sock.close()
    return True


def give_back_memory(collect: bool = True) -> None:
    """Collect garbage, and have the C library give back what is free, not only at a heap's end.

    The latter takes up to 3 ms, without the interpreter's lock; all streams wait for the former.
    """
    if collect:
        gc.collect()
    # Another C library has no such function; systemd's MemoryDenyWriteExecute keeps ctypes out.
    with contextlib.suppress(ImportError, AttributeError, OSError, MemoryError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


Worker = Direct if hasattr(select, "epoll") else Threaded


class Silence:
    """A log that keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


class Envelope:
    """Stands in for the client's socket while gunicorn writes its HTML page."""

    status = 0

    def __init__(self, sock: socket.socket):
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, page: bytes) -> None:
        """Send the status of gunicorn's page with our envelope as its body."""
        head = page.split(b"\r\n", 1)[0]
        if head.endswith(b"Bad Request"):  # also said with a 500 or 501, but never our fault
            head = b"HTTP/1.1 400 Bad Request"
        self.status = int(head.split(b" ")[1])
        kind = "internal_error" if self.status == 500 else "bad_request"
        said = head.split(b" ", 2)[2].decode("latin1")
        text = f"the request is malformed: {said}"
        if self.status == 500:
            text = "the router has a bug; its log says where"
        error = {"message": text, "type": kind, "param": None, "code": kind}
        said_so = json.dumps({"error": error}).encode()
        self._sock.sendall(
            head
            + b"\r\nConnection: close\r\nContent-Type: application/json\r\n"
            + b"Content-Length: %d\r\n\r\n" % len(said_so)
            + said_so
        )
