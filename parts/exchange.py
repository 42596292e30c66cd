"""One HTTP exchange with an upstream: a connection, a request, the head of the reply.

`requests` and urllib3 keep what they are good at: pools, proxies, certificates. Sending a request
and reading a reply is ours, since a flight must be able to end it at any moment (flights.py), and
since http.client reads a head as an email, which costs more than the exchange itself.

Who may touch what, when:

- An exchange belongs to the thread that made it, from `Endpoint.send` until `Reply.close`; after
  the commit the carrier's thread reads from the reply's socket instead, never both.
- The flight is handed over with the body (`Outgoing`), noted in the connection, and told of each
  socket that the thread waits on. The watcher may shut that socket down: reading then ends like a
  reset, and `flight.why` says that it was none.
- Before a connection goes back into its pool the flight lets go of it under its own lock
  (`_put_conn`). A late shutdown would else hit the next request on that connection.
- A pooled connection is nobody's. What comes on it unasked, or too long a rest, closes it
  (`_pooled`). Its own fault, a reset or silence before any byte, is not the model's: the request is
  sent once more on a fresh one, and the rest of that pool is dropped.
- `as_failure` is the one place that turns a library's exception into an outcome.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import math
import os
import queue
import re
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import requests
import urllib3
import urllib3.connection
from requests.adapters import HTTPAdapter
from urllib3.util.ssl_match_hostname import CertificateError

from parts.addresses import is_loopback
from parts.errors import Failure
from parts.flights import Flight
from parts.settings import SettingsError, path_in

MAX_ANSWER = 32 << 20  # bytes of one whole answer, or of one held stream
MAX_ERROR = 64 << 10  # bytes read of an error page
READ_SIZE = 65536
MAX_HEAD = 65536  # of a reply, in bytes
MAX_HEADERS, MAX_LINE = 100, 65536  # of a reply's head, and of a line in it or its chunks
REST_S = 30.0  # a pooled connection that rested longer is not used again: NATs forget it
AGE_S = 600.0  # nor one that is older
SILENCE_S = 3.0  # the least that a used connection may say nothing, before a fresh one is tried
Pieces = Sequence[bytes | memoryview]  # of a request's body

LENGTH = re.compile("0{0,99}[0-9]{1,15}")
HEX = re.compile(rb"[0-9a-fA-F]{1,15}(?=[ \t]*(?:;|$))")
SIZE = re.compile(rb"([1-9a-f][0-9a-f]{0,6})\r\n")  # as it is nearly always written
TRAILER, BROKEN = -1, -2  # instead of a number of bytes: after the last chunk; no chunk at all
HEAD_END = re.compile(rb"\r?\n\r?\n")
STATUS_LINE = re.compile(r"HTTP/1\.(\d+)\s+([1-9]\d\d)(?:\s.*)?")


class Outgoing(NamedTuple):
    """A request's body on its way through `requests`, and for whom it goes."""

    pieces: Pieces
    flight: Flight
    silence_s: float  # what a used connection may say nothing


class Reply:
    """An upstream's reply: its head, then its body as it comes. Whatever breaks is a Failure."""

    def __init__(self, sock: socket.socket, flight: Flight, pool: Any = None, conn: Any = None):
        self.sock, self.flight = sock, flight
        self._pool, self.conn = pool, conn  # while it may have to be closed or given back
        self.status_code = 0
        self.headers: dict[str, str] = {}  # by name in lower case; several of a name in one
        self.length: int | None = None  # what is missing of a body whose length was told
        self.chunked = False
        self.will_close = False
        self.ended = False  # the last chunk, or the end of what has neither length nor chunks
        self._chunk_left = 0  # of a chunk and the line end behind it, or what comes next
        self._rest = b""  # received and not looked at yet

    @property
    def has_come(self) -> bool:
        """True once any byte of it was received."""
        return bool(self._rest or self.status_code)

    def begin(self) -> None:
        """Read the head."""
        status, lines, looked_at, is_old = 100, [""], 0, False
        while 100 <= status < 200:  # only says that the reply will come
            while not (end := HEAD_END.search(self._rest, max(0, looked_at - 3))):
                looked_at = len(self._rest)
                if looked_at > MAX_HEAD:
                    raise Failure("not_an_answer", "an endless head")
                data = self.sock.recv(READ_SIZE)
                if not data:
                    raise http.client.RemoteDisconnected("in the head")
                self._rest += data
            text = self._rest[: end.start()].decode("latin-1")
            self._rest, looked_at = self._rest[end.end() :], 0
            lines = text.replace("\r\n", "\n").split("\n")
            found = STATUS_LINE.fullmatch(lines[0])
            if not found or len(lines) > MAX_HEADERS or len(text) > MAX_HEAD:
                raise Failure("not_an_answer", "no head of HTTP/1, or too long")
            status, is_old = int(found[2]), found[1] == "0"
        name = ""
        for line in lines[1:]:
            if line[:1] in (" ", "\t"):  # the line before goes on
                value = line
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
            if name:
                value, before = value.strip(), self.headers.get(name)
                self.headers[name] = value if before is None else f"{before}, {value}"
        self.status_code = status
        self._frame(is_old)

    def _frame(self, is_old: bool) -> None:
        """Where the body ends, and whether the connection outlives it.

        Framing that cannot be understood is a failure: to guess would give one client what was
        meant for another (RFC 9112, 6.3).
        """
        headers = self.headers
        coding = headers.get("transfer-encoding", "identity").lower()
        told = headers.get("content-length")
        self.chunked = coding == "chunked"
        if not self.chunked and coding != "identity":
            raise Failure("not_an_answer", "a transfer coding that was not asked for")
        if told is not None and not self.chunked:
            told, *others = dict.fromkeys([value.strip() for value in told.split(",")])
            if others or not LENGTH.fullmatch(told):
                raise Failure("not_an_answer", "a length that is none")
            self.length = int(told)
        if self.status_code in (204, 304):
            self.length, self.chunked = 0, False
        endless = self.length is None and not self.chunked
        kept = headers.get("connection", "").lower()
        odd = self.chunked and (told is not None or is_old)
        ends = "keep-alive" not in kept if is_old else "close" in kept
        self.will_close = endless or odd or ends

    def read1(self, n: int = READ_SIZE) -> bytes:
        """What has come of the body, waiting for some; b"" at its end."""
        out = self._unframed(b"") if self._rest else b""
        while not out and not self.ended and self.length != 0:
            try:
                out = self.unframe(self.sock.recv(n))
            except (OSError, ValueError) as e:
                self.close()
                raise Failure(self.flight.why or "cut", status=self.status_code) from e
            except Failure:
                self.close()
                raise
        if not out and self.flight.why:
            raise Failure(self.flight.why, status=self.status_code)
        if not out or self.ended or self.length == 0:
            self.close()  # its connection can serve the next request already
        return out

    def unframe(self, data: bytes) -> bytes:
        """The body's bytes in `data`, just received; b"" there says that the upstream closed.

        Then a body without length or chunks is whole; any other was cut.
        """
        if not data:
            if self.flight.why or self.chunked or self.length:
                raise Failure(self.flight.why or "cut", status=self.status_code)
            self.ended = True
            return b""
        return b"".join(self.whole_chunks(data)) or self._unframed(data)

    def whole_chunks(self, data: bytes) -> list[bytes]:
        """The chunks in `data` when that is nothing but whole ones, as nearly always; else []."""
        if not self.chunked or self._rest or self._chunk_left or self.ended:
            return []
        at, found = 0, []
        while at < len(data):
            size = SIZE.match(data, at)
            if not size:
                return []
            begin, at = size.end(), size.end() + int(size[1], 16) + 2
            if data[at - 2 : at] != b"\r\n":
                return []
            found.append(data[begin : at - 2])
        return found

    def _unframed(self, data: bytes) -> bytes:
        data, self._rest = self._rest + data, b""
        if self.chunked:
            return self._unchunked(data)
        if self.length is not None:
            data, self._rest = data[: self.length], data[self.length :]
            self.length -= len(data)
        return data

    def _unchunked(self, data: bytes) -> bytes:
        """The same, where `data` may begin and end anywhere in a chunk."""
        at, left, out = 0, self._chunk_left, []
        while at < len(data) and not self.ended and left != BROKEN:
            if left > 2:
                took = min(left - 2, len(data) - at)
                out.append(data[at : at + took])
                at, left = at + took, left - took
                continue
            if left == 2:  # the line end behind a chunk
                if len(data) - at < 2:
                    break
                at, left = at + 2, 0 if data[at : at + 2] == b"\r\n" else BROKEN
                continue
            end = data.find(b"\n", at)
            if end < 0:
                break
            # A bare line feed is read, but nobody knows what another reader on the way makes of it.
            self.will_close = self.will_close or data[end - 1 : end] != b"\r"
            line, at = data[at:end].removesuffix(b"\r"), end + 1
            if left == TRAILER:
                self.ended = not line
            else:
                size = HEX.match(line)
                left = int(size[0], 16) + 2 if size else BROKEN
                left = TRAILER if left == 2 else left
        self._chunk_left, self._rest = left, data[at:]
        if (left == BROKEN and not out) or len(self._rest) > MAX_LINE:
            raise Failure("cut", "no chunk begins where one has to", self.status_code)
        return b"".join(out)

    @property
    def is_whole(self) -> bool:
        """True when nothing is left to read, as far as the head and the chunks have told."""
        return self.ended or self.length == 0

    def close(self) -> None:
        """Give the connection back if it can be used again, else close it."""
        conn, self.conn = self.conn, None
        if conn is not None:
            if self.will_close or self._rest or not (self.ended or self.length == 0):
                conn.close()
            self._pool._put_conn(conn)


def read_whole(reply: Reply, limit: int = MAX_ANSWER) -> bytes:
    """All bytes of a body of at most `limit` bytes; Failure when it breaks off or is larger."""
    chunks, size = [], 0
    while chunk := reply.read1():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise Failure("not_an_answer", f"over {limit} bytes", status=reply.status_code)
    return b"".join(chunks)


def send_all(sock: socket.socket, pieces: Pieces) -> bool:
    """Send all of it, without putting it together where the system does that.

    False when the upstream answered before it had all: what is left is not sent (RFC 9112, 9.5).
    """
    total, waits = sum(map(len, pieces)), not isinstance(sock, ssl.SSLSocket)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        sent = sock.sendmsg(pieces, (), socket.MSG_DONTWAIT) if waits else 0
    if sent == total:
        return True
    rest = memoryview(b"".join(pieces))[sent:]
    if not waits:
        sock.sendall(rest)
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLOUT)
    while rest:
        events = poll.poll()[0][1]
        if events & select.POLLIN:
            return False
        rest = rest[sock.send(rest, socket.MSG_DONTWAIT) :]
    return True


# --- connections ---------------------------------------------------------------------------------


class Silent(Exception):
    """A used connection said nothing for so long that it may be dead."""


class _Noted:
    """Mixed into urllib3's connections: tells the flight which socket it waits on."""

    flight: Flight | None = None
    sock: socket.socket | None
    born = rested = 0.0  # when it was connected, and when it was last given back

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        self.born = time.monotonic()
        if self.flight:  # a copy, because TLS takes the descriptor away from this object
            self.copy = sock.dup()
            self.flight.attach(self.copy)
        return sock

    def exchange(self, pool: Any, head: bytes, body: Outgoing, used: bool) -> Reply:
        """Send a request and read the head of its reply."""
        sock = self.sock
        assert sock is not None
        body.flight.attach(sock)
        self.drop_copy()
        if sock.gettimeout() is not None:
            sock.settimeout(None)  # the watcher keeps the limits
        is_sent, reply = True, Reply(sock, body.flight, pool, self)
        try:  # in one packet: the upstream wakes up once
            is_sent = send_all(sock, [head, *body.pieces])
        except (BrokenPipeError, ConnectionResetError):  # it may have refused already, and closed
            is_sent = False
        if used and is_sent:
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(min(body.silence_s, 1e6) * 1000):
                raise Silent
        try:
            reply.begin()
        except Exception as e:
            if used and not reply.has_come and isinstance(e, ConnectionError):
                raise Silent from e
            raise
        reply.will_close = reply.will_close or not is_sent
        return reply

    def close(self) -> None:
        """Close, and let no flight shut down what the system may give to somebody else."""
        if self.flight:
            self.flight.detach()
        self.drop_copy()
        super().close()  # type: ignore[misc]

    def drop_copy(self) -> None:
        """The descriptor that stood in for the socket while TLS was shaking hands."""
        copy = self.__dict__.pop("copy", None)
        if copy is not None:
            copy.close()


class _HTTPConnection(_Noted, urllib3.connection.HTTPConnection):
    pass


class _HTTPSConnection(_Noted, urllib3.connection.HTTPSConnection):
    pass


class Stack:
    """What urllib3 wants of a queue for its connections: the last one put is the first taken.

    A pool never waits for one, so a deque will do, at a tenth of queue.LifoQueue's time.
    """

    def __init__(self, maxsize: int):
        self._items: deque[Any] = deque()
        self._maxsize = maxsize

    def get(self, **how: Any) -> Any:
        """The last one put; queue.Empty."""
        try:
            return self._items.pop()
        except IndexError:
            raise queue.Empty from None

    def put(self, item: Any, **how: Any) -> None:
        """Keep it; queue.Full."""
        if len(self._items) >= self._maxsize:
            raise queue.Full
        self._items.append(item)

    def qsize(self) -> int:
        """How many there are."""
        return len(self._items)


class _NotedPool:
    """Mixed into urllib3's pools: their connections, certificates and proxies, our exchange."""

    QueueCls = Stack
    scheme: str | None
    host: str
    port: int | None
    pool: Any
    proxy_headers: Mapping[str, str]

    def urlopen(self, method: str, url: str, *, body: Outgoing, headers: Mapping[str, str],
                timeout: urllib3.Timeout, **more: Any) -> Reply:  # fmt: skip
        """One exchange; the reply's body is unread. Failure.

        urllib3's own way copies, checks and wraps for retries, redirects and decoding, which the
        router never uses: two thirds of a call's time.
        """
        more_headers = self.proxy_headers if self.scheme == "http" else {}
        lines = [f"{name}: {value}" for name, value in {**headers, **more_headers}.items()]
        head = "\r\n".join([f"{method} {url} HTTP/1.1", *lines, "", ""]).encode("latin-1")
        flight = body.flight
        while True:
            conn, connected = self._pooled(flight), False
            used = not conn.is_closed
            try:
                conn.timeout = timeout.connect_timeout
                if not used:
                    self._connect(conn)
                connected = True
                reply: Reply = conn.exchange(self, head, body, used and not flight.resent)
                return reply
            except BaseException as e:  # noqa: BLE001  raised again
                conn.close()
                self._put_conn(conn)
                if isinstance(e, Silent) and not flight.why:
                    flight.resent = True  # on a fresh one: the rest of the pool may be as dead
                    at, kind = flight.due
                    if not e.__cause__ and kind in ("first_token", "answer"):  # it said nothing
                        flight.due = at + body.silence_s, kind
                    self._drop_idle()
                    continue
                raise_failure(e, flight, self._where(conn), connected)

    def _pooled(self, flight: Flight) -> Any:
        """A connection, closed when it has to be made first; urllib3 has looked for stray bytes."""
        conn = self._get_conn()  # type: ignore[attr-defined]
        if not conn.is_closed:
            now = time.monotonic()
            if flight.resent or now - conn.rested > REST_S or now - conn.born > AGE_S:
                conn.close()
        conn.flight = flight
        return conn

    def _drop_idle(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                conn = self.pool.get()
                if conn is not None:
                    conn.close()

    def _connect(self, conn: Any) -> None:
        """Connect, over TLS through the proxy's tunnel where there is a proxy."""
        if conn.proxy is not None and self.scheme == "https":
            self._prepare_proxy(conn)  # type: ignore[attr-defined]
        else:
            conn.connect()

    def _where(self, conn: Any) -> str:
        """What a person is told of whom it is that does not answer."""
        proxy = getattr(conn, "proxy", None)
        return f"the proxy {proxy.host}:{proxy.port}" if proxy else f"{self.host}:{self.port}"

    def _put_conn(self, conn: Any) -> None:
        """Before anyone else may use the connection, its flight lets go of it."""
        flight = conn.flight
        if flight:
            conn.flight = None
            conn.rested = time.monotonic()
            if not flight.detach():
                conn.close()
        super()._put_conn(conn)  # type: ignore[misc]


class _HTTPPool(_NotedPool, urllib3.HTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPConnection


class _HTTPSPool(_NotedPool, urllib3.HTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPSConnection


def socket_options() -> list[tuple[int, int, int]]:
    """A peer that is gone is noticed within half a minute, where the platform can."""
    wanted = (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 15), ("TCP_KEEPALIVE", 15), ("TCP_KEEPINTVL", 5),
              ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000))  # fmt: skip
    known = [(name, value) for name, value in wanted if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            *[(socket.IPPROTO_TCP, getattr(socket, name), value)
              for name, value in known]]  # fmt: skip


class Adapter(HTTPAdapter):
    """requests' adapter with connections that a flight can shut down.

    What depends on the URL alone is worked out once, and of a reply only what we look at is kept.
    """

    def __init__(self, **kwargs: Any):
        self._known: dict[str | None, tuple[Any, str]] = {}
        super().__init__(**kwargs)

    def get_connection_with_tls_context(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """The pool for this URL; looking it up in requests' way costs a fifth of a small call."""
        pool, path = self._known.get(request.url, (None, ""))
        if pool is None or pool.pool is None:  # new, or closed to make room for others
            pool = super().get_connection_with_tls_context(request, *args, **kwargs)
            path = super().request_url(request, kwargs.get("proxies"))
            self._known[request.url] = (pool, path)
        return pool

    def request_url(self, request: Any, proxies: Any) -> str:
        """What stands in the request line."""
        return self._known[request.url][1]

    def build_response(self, req: Any, resp: Any) -> Any:
        """The reply itself has what we look at of a response: status, headers, body, close."""
        return resp

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Pools of our connections."""
        super().init_poolmanager(*args, **kwargs, socket_options=socket_options())
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """The same through a proxy."""
        manager = super().proxy_manager_for(proxy, **kwargs, socket_options=socket_options())
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager


def new_session(threads: int) -> requests.Session:
    """A session whose adapters keep a connection per thread; only its adapters are used."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter(pool_connections=32, pool_maxsize=threads, max_retries=0))
    return session


# --- one URL -------------------------------------------------------------------------------------


def proxies_for(url: str) -> dict[str, str]:
    """The proxies of the environment that `url` is asked through, as requests wants them.

    SettingsError with the variable's name when no request could use the one that counts.
    """
    if is_loopback(urlsplit(url).hostname or ""):
        return {}
    proxies: dict[str, str] = requests.utils.get_environ_proxies(url)
    proxy = requests.utils.select_proxy(url, proxies)
    if not proxy:
        return {}
    names = [name for name in os.environ if name.lower().endswith("_proxy")]
    name = next((name for name in names if os.environ[name] == proxy), "HTTPS_PROXY")
    try:
        parts = urllib3.util.parse_url(requests.utils.prepend_scheme_if_needed(proxy, "http"))
    except urllib3.exceptions.LocationParseError:
        raise SettingsError(f"{name}: cannot be read as http://host:port") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise SettingsError(f"{name}: only a proxy at http://host:port can be used, not "
                            f"{parts.scheme}; change it, or name the host in NO_PROXY")  # fmt: skip
    return proxies


NO_HEADERS: Mapping[str, str] = {}


class Endpoint:
    """One URL to post JSON to, prepared once: adapter, headers, proxy, certificates."""

    def __init__(self, session: requests.Session, url: str, environ: Mapping[str, str],
                 key: str = "", more: Mapping[str, str] = NO_HEADERS):  # fmt: skip
        self.url = requests.utils.requote_uri(url)
        self.key = key
        self.adapter = session.get_adapter(url)
        self.verify = str(path_in(environ, "REQUESTS_CA_BUNDLE") or "") or True
        self.proxies = proxies_for(url)
        self.where = urlsplit(url).netloc
        self._slowest_s = 0.0  # of the first bytes lately, which says what silence is usual
        self.headers = {
            "Host": self.where,
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": "identity",
            "User-Agent": "llm-router",
        }
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        others = {name.title() for name in more}
        self.headers = {k: v for k, v in self.headers.items() if k not in others} | dict(more)

    def send(self, body: Pieces, flight: Flight, connect_s: float, query: str = "",
             headers: Mapping[str, str] = NO_HEADERS) -> Reply:  # fmt: skip
        """The reply to a POST of `body`, its body unread; or Failure.

        `query` begins with its `?`; `headers` are sent beside our own.

        HTTPAdapter.send costs half of Session.post, follows no redirect and knows no cookies. The
        watcher enforces the deadlines, since a read timeout counts from one packet to the next.
        On a used connection twice the longest silence lately seen may pass before a fresh one is
        tried; where that is over half of what is left none is, for the upstream is just slow.
        """
        began = flight.clock()
        half_s, usual_s = max(0.0, flight.due[0] - began) / 2, 2 * self._slowest_s
        silence_s = min(max(SILENCE_S, usual_s), half_s) if usual_s <= half_s else math.inf
        outgoing: Any = Outgoing(body, flight, silence_s)
        request = requests.PreparedRequest()
        request.method, request.url, request.body = "POST", self.url + query, outgoing
        length = {"Content-Length": str(sum(map(len, body)))}
        request.headers = {**headers, **self.headers, **length}  # type: ignore[assignment]
        try:
            reply: Any = self.adapter.send(request, stream=True, timeout=(connect_s, None),
                                           verify=self.verify, proxies=self.proxies)  # fmt: skip
        except Failure:
            raise
        except Exception as e:  # noqa: BLE001  raised again
            raise_failure(e, flight, self.where, connected=False)
        self._slowest_s = max(flight.clock() - began, 0.9 * self._slowest_s)
        return reply if isinstance(reply, Reply) else from_elsewhere(reply, flight)


def from_elsewhere(response: requests.Response, flight: Flight) -> Reply:
    """The reply of another transport than ours, such as `responses` puts in place in tests."""
    nowhere = socket.socket()
    nowhere.close()
    reply = Reply(nowhere, flight)
    lines = [f"{name}: {value}" for name, value in response.headers.items()
             if name.lower() not in ("content-length", "transfer-encoding")]  # fmt: skip
    length = f"Content-Length: {len(response.content)}"
    head = [f"HTTP/1.1 {response.status_code} OK", *lines, length]
    reply._rest = "\r\n".join([*head, "\r\n"]).encode("latin-1") + response.content
    reply.begin()
    return reply


# What this machine is short of; no fault of an upstream's.
SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL)


def as_failure(e: BaseException, flight: Flight, where: str, connected: bool) -> BaseException:
    """What a library raised before a reply's head has come, as a Failure; a bug stays what it is.

    `connected`: the request may have been sent.
    """
    if isinstance(e, Failure):
        return e
    if flight.why:
        return Failure(flight.why)
    causes = causes_of(e)
    short = [c for c in causes if isinstance(c, OSError) and c.errno in SHORTAGE]
    ours = (MemoryError, SettingsError, requests.exceptions.InvalidProxyURL,
            requests.exceptions.InvalidSchema)  # fmt: skip
    if short or isinstance(e, ours) or is_out_of_descriptors(causes):
        said = os.strerror(short[0].errno or 0).lower() if short else str(e)
        return Failure("shortage", said)
    known = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, Silent,
             CertificateError)  # fmt: skip
    if not any(isinstance(cause, known) for cause in causes):
        return e
    tls = ssl.SSLError | urllib3.exceptions.SSLError | CertificateError
    if any(isinstance(cause, tls) for cause in causes):
        return Failure("tls", what_failed(e, where))
    if not connected:
        return Failure("connect", what_failed(e, where))
    return Failure("reset" if isinstance(e, OSError | Silent) else "not_an_answer")


def raise_failure(e: BaseException, flight: Flight, where: str, connected: bool) -> NoReturn:
    """Raise what `as_failure` makes of `e`, and leave no circle of frames behind."""
    failure = as_failure(e, flight, where, connected)
    try:
        if failure is e:
            raise failure
        raise failure from e
    finally:
        del failure, e


def causes_of(e: BaseException) -> list[Any]:
    """`e` and what it wraps, of which libraries know three ways."""
    causes: list[Any] = [e]
    for cause in causes:
        inner = [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]
        causes += [c for c in inner if isinstance(c, BaseException) and c not in causes]
    return causes


def is_out_of_descriptors(causes: Sequence[BaseException]) -> bool:
    """True when a name was not found because the files that tell it could not be opened."""
    if not any(isinstance(c, socket.gaierror) for c in causes):
        return False
    try:
        os.close(os.dup(2))
    except OSError as e:
        return e.errno in SHORTAGE
    return False


def what_failed(e: BaseException, where: str) -> str:
    """A few words for a person: which host, and what of reaching it failed."""
    causes = causes_of(e)
    for cause in causes:
        if isinstance(cause, socket.gaierror | urllib3.exceptions.NameResolutionError):
            return f"the name {where.partition(':')[0]} cannot be resolved"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"{where}: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            reason = (cause.reason or "broken off").lower().replace("_", " ")
            return f"{where}: TLS failed: {reason}"
    number = next((c.errno for c in causes if isinstance(c, OSError) and c.errno), None)
    return f"{where}: {os.strerror(number).lower() if number else 'no answer in time'}"
