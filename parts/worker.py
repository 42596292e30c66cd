"""gunicorn's threaded worker, without the way through its main thread, and with refusals as JSON.

gthread hands each request from its main thread to an executor and back through a pipe, which costs
more than serving a constant answer does. Here each thread waits on one epoll for a connection that
can be read, serves its request and puts it back; the main thread accepts, and ends what is idle.
Where there is no epoll the threads are gthread's own. gunicorn.conf.py loads this file anew with
each reload; it knows nothing of the router.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import re
import select
import socket
import ssl
import threading
import time
import types
from functools import lru_cache
from typing import Any

from gunicorn import util
from gunicorn.http import RequestParser, body, wsgi
from gunicorn.workers import gthread

log = logging.getLogger("llm_router")

LINGER_S = 2.0  # a worker that leaves keeps idle connections so long: a request may be on its way
DRAIN_S = 0.5  # for the rest of a body that was refused unread, and for a goodbye; threads are few
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
    if not re.fullmatch("[0-9]{1,18}", length) or connection not in ("keep-alive", "close"):
        return None
    return Ordinary(environ, int(length), connection == "close") if len(lines) <= most else None


class Parser(RequestParser):
    """The requests of a connection: ordinary ones at a seventh of gunicorn's time, others by it."""

    def __init__(self, cfg: Any, conn: Any, base: dict[str, Any]):
        super().__init__(cfg, conn.sock, conn.client)
        self._sock = conn.sock
        self._base = base | {
            "gunicorn.socket": conn.sock,
            "REMOTE_ADDR": conn.client[0],
            "REMOTE_PORT": str(conn.client[1]),
            "SERVER_NAME": conn.server[0],
            "SERVER_PORT": str(conn.server[1]),
        }

    def __next__(self) -> Any:
        """The next request; StopIteration when the client has closed the connection."""
        held = self.unreader.buf.getvalue()
        data = held or self.unreader.chunk()
        end = data.find(b"\r\n\r\n", 0, MAX_ORDINARY) + 4
        request = read_ordinary(data, end, self._base, self.cfg.limit_request_fields)
        if held:
            self.unreader.buf = io.BytesIO()
        if request is None:
            self.unreader.unread(data)
            return super().__next__()
        self.unreader.unread(data[end:])
        request.body = Body(body.LengthReader(self.unreader, request.length), self._sock)
        request.environ["wsgi.input"] = request.body
        self.mesg = request
        return request


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
        self.sock.sendall(self.head() + data)

    def close(self) -> None:
        """End the response."""
        end = self.head() + (b"0\r\n\r\n" if self.chunked else b"")
        if end:
            self.sock.sendall(end)

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


class Threaded(gthread.ThreadWorker):
    """gthread whose own refusals (a malformed head, 100 KB of headers) are JSON like all others."""

    def init_process(self) -> None:
        """Read each setting once: looking one up costs a microsecond, 22 times a request."""
        settings = {name: told.get() for name, told in self.cfg.settings.items()}
        self.cfg.__dict__.update(settings)
        super().init_process()

    def set_accept_enabled(self, enabled: bool) -> None:
        """On leaving, close the listener: a backlog nobody reads would hold clients for 60 s."""
        super().set_accept_enabled(enabled)
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
        response = Response(req, conn.sock, self.cfg)
        if not self.alive or not self.cfg.keepalive or self.is_crowded():
            response.force_close()
        self.respond(environ, response)
        return not response.should_close() and self.has_read(req, conn)

    def respond(self, environ: dict[str, Any], response: Response) -> None:
        """Have the application answer. A bug behind the head can only end the connection."""
        pieces = self.wsgi(environ, response.start_response)
        try:
            try:
                for piece in pieces:
                    response.write(piece)
                response.close()
            finally:
                pieces.close()
        except OSError:
            raise
        except Exception:
            if not response.headers_sent:
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
        return bool(conn.parser.finish_body(deadline=time.monotonic() + DRAIN_S))

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        """gunicorn would read the rest of the body here; `handle_request` has."""
        return keepalive

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Let gunicorn word the refusal, then send it as JSON instead of HTML.

        gunicorn would log what the client sent, which may be a key or a prompt; we log the place.
        """
        from parts.logs import where_it_broke

        where = {"where": where_it_broke(), "address": addr[0] if addr else ""}
        log.warning("request_refused", where)
        quiet = types.SimpleNamespace(cfg=self.cfg, log=Silence())
        gthread.ThreadWorker.handle_error(quiet, req, Envelope(client), addr, exc)


class Direct(Threaded):
    """Threads that find their requests themselves; see the head of this file.

    A connection belongs to whoever took it out of `idle`, which is one step and needs no lock.
    """

    READABLE = getattr(select, "EPOLLIN", 0) | getattr(select, "EPOLLONESHOT", 0)

    def __init__(self, *args: Any):
        self.open: set[Any] = set()  # the connections
        super().__init__(*args)

    def init_process(self) -> None:
        """Make what the threads share."""
        self.ready = select.epoll()  # wakes one thread for each connection that can be read
        self.idle: dict[int, Any] = {}  # by descriptor, those that wait for their next request
        self.is_untidy = True  # something was done since memory was given back
        self.look_at = 0.0  # when the main thread next looks for those that are idle for too long
        self.base = base_environ(self.cfg)
        super().init_process()

    def run(self) -> None:
        """Serve until told to leave."""
        for n in range(self.cfg.threads):
            threading.Thread(target=self.serve, name=f"serve-{n}", daemon=True).start()
        super().run()

    def enqueue_req(self, conn: Any) -> None:
        """A connection was accepted: wait for its first request, holding no thread."""
        self.open.add(conn)
        conn.data_ready = True
        conn.sock.setblocking(True)
        if self.is_ordinary(conn):
            conn.parser = Parser(self.cfg, conn, self.base)
        self.park(conn)
        with contextlib.suppress(OSError, ValueError):  # a thread has closed it already
            self.ready.register(conn.sock, self.READABLE)

    def is_ordinary(self, conn: Any) -> bool:
        """True when nothing that was set changes how a request is read."""
        changed = os.environ.get("SCRIPT_NAME") or self.cfg.secure_scheme_headers
        changed = changed or self.cfg.is_ssl or self.cfg.proxy_protocol not in ("off", False)
        return not changed and isinstance(conn.client, tuple) and isinstance(conn.server, tuple)

    def park(self, conn: Any) -> None:
        """The connection is nobody's until it can be read."""
        conn.set_timeout()
        self.idle[conn.sock.fileno()] = conn

    def serve(self) -> None:
        """A thread's life: take a connection that can be read, serve it, put it back."""
        while True:
            for descriptor, _ in self.ready.poll(-1, 1):
                conn = self.idle.pop(descriptor, None)
                if conn is not None:
                    self.serve_one(conn)

    def serve_one(self, conn: Any) -> None:
        """Serve what a client has sent; its next request may have come along, or meanwhile."""
        keep, self.is_untidy, served = False, True, 1
        try:
            keep = self.handle(conn)
            while keep and (
                conn.parser.unreader.buf.getvalue() or (served < IN_A_ROW and has_more(conn))
            ):
                keep = self.handle(conn)
                served += 1
        finally:
            if keep:
                self.park(conn)
                with contextlib.suppress(OSError, ValueError):  # the main thread has closed it
                    self.ready.modify(conn.sock, self.READABLE)
            else:
                util.close_graceful(conn.sock, timeout=DRAIN_S)
                self.forget(conn)

    def forget(self, conn: Any) -> None:
        """A connection was closed; the main thread has to know when it waits for that."""
        self.open.discard(conn)
        if not self._accepting:
            self.method_queue.defer(lambda: None)

    @property
    def nr_conns(self) -> int:
        """How many connections there are."""
        return len(self.open)

    @nr_conns.setter
    def nr_conns(self, _: int) -> None:
        """gunicorn counts up in `accept`; here that is `enqueue_req`."""

    def is_crowded(self) -> bool:
        """True when there is no room for one more idle connection."""
        return len(self.idle) >= self.max_keepalived

    def murder_keepalived(self, force: bool = False) -> None:
        """Close what has been idle for too long, and soon all that is idle when told to leave."""
        now = time.monotonic()
        if now < self.look_at and not force:
            return
        self.look_at = now + LOOK_S
        if self.is_untidy and len(self.idle) == len(self.open):
            self.is_untidy = False
            give_back_memory()
        for descriptor, conn in self.idle.copy().items():
            if not self.alive:
                conn.timeout = min(conn.timeout, now + LINGER_S)
            if (force or conn.timeout <= now) and self.idle.pop(descriptor, None):
                conn.close()
                self.forget(conn)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """The main thread's wait: it has to look again soon when it is to leave."""
        super().wait_for_and_dispatch_events(timeout if self.alive else min(timeout, LOOK_S))


def has_more(conn: Any) -> bool:
    """True when the client has sent more, which its parser then holds, or has left.

    To have another thread woken for it costs as much as a tenth of a request.
    """
    if type(conn.sock) is not socket.socket:
        return False  # TLS knows no flag for one call
    try:
        data = conn.sock.recv(8192, socket.MSG_DONTWAIT)
    except OSError:  # nothing has come, or whoever reads next will see what is wrong
        return False
    conn.parser.unreader.unread(data)
    return True


def give_back_memory() -> None:
    """Collect garbage, and have the C library give back what is free, not only at a heap's end.

    The latter takes up to 3 ms, without the interpreter's lock.
    """
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

    def __init__(self, sock: socket.socket):
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, page: bytes) -> None:
        """Send the status of gunicorn's page with our envelope as its body."""
        head = page.split(b"\r\n", 1)[0]
        if head.endswith(b"Bad Request"):  # also said with a 500 or 501, but never our fault
            head = b"HTTP/1.1 400 Bad Request"
        status = int(head.split(b" ")[1])
        kind = "internal_error" if status == 500 else "bad_request"
        said = head.split(b" ", 2)[2].decode("latin1")
        text = f"the request is malformed: {said}"
        error = {"message": text, "type": kind, "param": None, "code": kind}
        said_so = json.dumps({"error": error}).encode()
        self._sock.sendall(
            head
            + b"\r\nConnection: close\r\nContent-Type: application/json\r\n"
            + b"Content-Length: %d\r\n\r\n" % len(said_so)
            + said_so
        )
