"""The wire: HTTP calls to upstreams that can be hung up at any moment.

A WSGI thread learns that its client left only at its next write, and `requests` counts a read
timeout from one packet to the next. So every call belongs to a `Flight`, which knows the client's
socket, the upstream's socket and the next deadline, and one watcher thread ends flights whose
client left or whose deadline passed, by shutting the upstream socket down. Nothing here knows
Flask, models or categories.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
import urllib3.connection
from requests.adapters import HTTPAdapter

from parts.addresses import is_loopback
from parts.errors import Failure
from parts.flights import Flight
from parts.settings import SettingsError, ca_bundle

log = logging.getLogger("llm_router")

MAX_ANSWER = 32 << 20  # bytes of one whole answer, or of one held stream
MAX_ERROR = 64 << 10  # bytes read of an error page
READ_SIZE = 65536
MAX_HEAD = 65536  # of an answer, in bytes
MAX_HEADERS, MAX_LINE = 100, 65536  # of an answer's head, and of a line in it or its chunks
Pieces = Sequence[bytes | memoryview]  # of a request's body
_current = threading.local()  # .flight: whose upstream call this thread makes


HEX = re.compile(rb"[0-9a-fA-F]{1,15}(?=[ \t]*(?:;|$))")
TRAILER, BROKEN = -1, -2  # instead of a number of bytes: after the last chunk; no chunk at all
HEAD_END = re.compile(rb"\r?\n\r?\n")
STATUS_LINE = re.compile(r"HTTP/1\.(\d+)\s+([1-9]\d\d)(?:\s.*)?")


class Answer:
    """An upstream's answer: its head, then its body as it comes.

    http.client reads a head as an email and hides what has come but was not asked for; both cost
    more than the exchange itself. Errors are those of http.client and OSError.
    """

    def __init__(self, sock: socket.socket, pool: Any = None, connection: Any = None):
        self.sock = sock
        self.pool = pool
        self.connection = connection  # while it may have to be closed or given back
        self.status_code = 0
        self.headers: dict[str, str] = {}  # by name in lower case; several of a name in one
        self.length: int | None = None  # what is missing of a body whose length was told
        self.chunked = False
        self.will_close = False
        self.ended = False  # the last chunk, or the end of what has neither length nor chunks
        self._chunk_left = 0  # of a chunk and the line end behind it, or what comes next
        self._rest = b""  # received and not looked at yet

    @property
    def raw(self) -> Answer:
        """Where requests' responses keep the body to read."""
        return self

    def begin(self) -> None:
        """Read the head."""
        status, lines = 100, [""]
        while 100 <= status < 200:  # only says that the answer will come
            status, lines = self._read_head()
        self.status_code = status
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
        self._frame(lines[0])

    def _read_head(self) -> tuple[int, list[str]]:
        """Status and lines of one head, the first of them the status line."""
        looked_at = 0
        while not (end := HEAD_END.search(self._rest, max(0, looked_at - 3))):
            looked_at = len(self._rest)
            if looked_at > MAX_HEAD:
                raise http.client.LineTooLong("head")
            data = self.sock.recv(READ_SIZE)
            if not data:
                raise http.client.RemoteDisconnected("in the head")
            self._rest += data
        text = self._rest[: end.start()].decode("latin-1")
        self._rest = self._rest[end.end() :]
        lines = text.replace("\r\n", "\n").split("\n")
        found = STATUS_LINE.fullmatch(lines[0])
        if not found or len(lines) > MAX_HEADERS or len(text) > MAX_HEAD:
            raise http.client.HTTPException("no head of HTTP/1, or too long")
        return int(found[2]), lines

    def _frame(self, status_line: str) -> None:
        """Where the body ends, and whether the connection outlives it."""
        told = {value.strip() for value in self.headers.get("content-length", "").split(",")}
        self.chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if len(told) > 1 and not self.chunked:
            raise http.client.HTTPException("lengths that contradict each other")
        length = told.pop()
        if length.isdecimal() and length.isascii() and not self.chunked:
            self.length = int(length[:18])
        if self.status_code in (204, 304):
            self.length, self.chunked = 0, False
        endless = self.length is None and not self.chunked
        kept = self.headers.get("connection", "").lower()
        old = status_line.startswith("HTTP/1.0")
        self.will_close = endless or ("keep-alive" not in kept if old else "close" in kept)

    def read1(self, n: int = READ_SIZE) -> bytes:
        """What has come of the body, waiting for some; b'' at its end."""
        out = self._unframed(b"")
        while not out and not self.is_whole:
            data = self.sock.recv(n)
            if not data:
                self.close()
            out = self.take(data)
            if not data:
                break
        if not out and self.is_whole:
            self.close()  # its connection can serve the next request already
        return out

    def take(self, data: bytes) -> bytes:
        """The body's bytes in `data`, just received; b"" there says that the upstream closed.

        Then a body without length or chunks is whole; IncompleteRead when there are chunks.
        ValueError when no chunk begins where one has to.
        """
        if not data:
            if self.chunked:
                raise http.client.IncompleteRead(b"")
            self.ended = self.length is None
            return b""
        return self.one_chunk(data) or self._unframed(data)

    def one_chunk(self, data: bytes) -> bytes:
        """The bytes in `data` when it is one whole chunk, as it nearly always is; else b""."""
        if self.chunked and not self._rest and not self._chunk_left:
            at = data.find(b"\r\n") + 2
            size = len(data) - at - 2
            if size > 0 and data[: at - 2] == b"%x" % size and data[-2:] == b"\r\n":
                return data[at:-2]
        return b""

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
            if left > 0:
                took = min(left, len(data) - at)
                out.append(data[at : at + max(0, min(took, left - 2))])
                at, left = at + took, left - took
                continue
            end = data.find(b"\n", at)
            if end < 0:
                break
            line, at = data[at:end].strip(), end + 1
            if left == TRAILER:
                self.ended = not line
            else:
                size = HEX.match(line)
                left = int(size[0], 16) + 2 if size else BROKEN
                left = TRAILER if left == 2 else left
        self._chunk_left, self._rest = left, data[at:]
        if left == BROKEN and not out:
            raise ValueError("chunk size")
        if len(self._rest) > MAX_LINE:
            raise http.client.LineTooLong("chunk size")
        return b"".join(out)

    @property
    def is_whole(self) -> bool:
        """True when nothing is left to read, as far as the head and the chunks have told."""
        return self.ended or self.length == 0

    def close(self) -> None:
        """Give the connection back if it can be used again, else close it."""
        connection, self.connection = self.connection, None
        if connection is not None:
            if self.will_close or self._rest or not self.is_whole:
                connection.close()
            self.pool._put_conn(connection)


def send_all(sock: socket.socket, pieces: Pieces) -> None:
    """Send all of it, without putting it together where the system does that."""
    sent = 0 if isinstance(sock, ssl.SSLSocket) else sock.sendmsg(pieces)
    if sent < sum(map(len, pieces)):
        sock.sendall(memoryview(b"".join(pieces))[sent:])


class _Noted:
    """Mixed into urllib3's connections: tells the flight which socket it waits on."""

    flight: Flight | None = None
    sock: socket.socket | None

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        flight = getattr(_current, "flight", None)
        if flight:  # a copy, because TLS takes the descriptor away from this object
            self.copy = sock.dup()
            flight.attach(self.copy)
        return sock

    def exchange(self, pool: Any, head: bytes, body: Pieces) -> Answer:
        """Send a request and read the head of its answer, for the flight of this thread."""
        assert self.sock is not None
        self.flight = getattr(_current, "flight", None)
        if self.flight:
            self.flight.attach(self.sock)
            self.drop_copy()
        if self.sock.gettimeout() is not None:
            self.sock.settimeout(None)  # the watcher keeps the limits
        # In one packet: the upstream wakes up once. It may have refused already, and closed.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_all(self.sock, [head, *body])
        answer = Answer(self.sock, pool, self)
        answer.begin()
        return answer

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
    proxy_headers: Mapping[str, str]

    def urlopen(self, method: str, url: str, *, body: Pieces, headers: Mapping[str, str],
                timeout: urllib3.Timeout, **more: Any) -> Answer:  # fmt: skip
        """One exchange; the answer's body is unread. urllib3's exceptions.

        urllib3's own way copies, checks and wraps for retries, redirects and decoding, which the
        router never uses: two thirds of a call's time.
        """
        conn = self._get_conn()  # type: ignore[attr-defined]
        try:
            conn.timeout = timeout.connect_timeout
            if conn.is_closed:
                self._connect(conn)
            more_headers = self.proxy_headers if self.scheme == "http" else {}
            lines = [f"{method} {url} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in {**headers, **more_headers}.items()]
            head = "\r\n".join([*lines, "", ""]).encode("latin-1")
            answer: Answer = conn.exchange(self, head, body)
            return answer
        except BaseException as e:
            conn.close()
            self._put_conn(conn)
            if isinstance(e, OSError | http.client.HTTPException):
                raise urllib3.exceptions.ProtocolError("broke off", e) from e
            raise

    def _connect(self, conn: Any) -> None:
        """Connect, over TLS through the proxy's tunnel where there is a proxy."""
        try:
            if conn.proxy is not None and self.scheme == "https":
                self._prepare_proxy(conn)  # type: ignore[attr-defined]
            else:
                conn.connect()
        except ssl.SSLError as e:
            raise urllib3.exceptions.SSLError(e) from e
        except TimeoutError as e:  # while TLS shook hands
            raise urllib3.exceptions.ConnectTimeoutError(conn, "TLS") from e

    def _put_conn(self, conn: Any) -> None:
        """Before anyone else may use the connection, its flight lets go of it."""
        flight = getattr(conn, "flight", None)
        if flight:
            conn.flight = None
            if not flight.detach():
                conn.close()
        super()._put_conn(conn)  # type: ignore[misc]


class _HTTPPool(_NotedPool, urllib3.HTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPConnection


class _HTTPSPool(_NotedPool, urllib3.HTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPSConnection


class Adapter(HTTPAdapter):
    """requests' adapter with connections that a flight can shut down.

    What depends on the URL alone is worked out once, and of an answer only what we look at is kept.
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
        """The answer itself has what we look at of a response: status, headers, body, close."""
        return resp

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Pools of our connections."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """The same through a proxy."""
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager


def new_session(threads: int) -> requests.Session:
    """A session whose adapters keep a connection per thread; only its adapters are used."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter(pool_connections=32, pool_maxsize=threads, max_retries=0))
    return session


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


class Line:
    """One URL to post JSON to, prepared once: adapter, headers, proxy, certificates."""

    def __init__(
        self, session: requests.Session, url: str, environ: Mapping[str, str], key: str = ""
    ):
        self.url = requests.utils.requote_uri(url)
        self.where = str(urllib3.util.parse_url(url).netloc)  # for what is said to a person
        self.key = key
        self.adapter = session.get_adapter(url)
        self.verify = ca_bundle(environ) or True
        self.proxies = proxies_for(url)
        self.headers = {
            "Host": self.where,
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": "identity",
            "User-Agent": "llm-router",
        }
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def send(self, body: Pieces, flight: Flight, connect_s: float) -> requests.Response:
        """One HTTP call on behalf of `flight`; the library's exceptions become a Failure here.

        HTTPAdapter.send costs half of Session.post, follows no redirect and knows no cookies. The
        watcher enforces the deadlines, since a read timeout counts from one packet to the next.
        """
        request = requests.PreparedRequest()
        pieces: Any = body
        request.method, request.url, request.body = "POST", self.url, pieces
        headers: Any = {**self.headers, "Content-Length": str(sum(map(len, body)))}
        request.headers = headers
        _current.flight = flight
        with translated(flight, self.where):
            return self.adapter.send(
                request,
                stream=True,
                timeout=(connect_s, None),
                verify=self.verify,
                proxies=self.proxies,
            )


@contextlib.contextmanager
def translated(flight: Flight, where: str) -> Iterator[None]:
    """What requests and urllib3 raise before an answer's head has come, as a Failure."""
    try:
        yield
    except requests.exceptions.SSLError as e:
        raise Failure(flight.why or "tls", what_failed(e, where)) from e
    except (urllib3.exceptions.TimeoutError, urllib3.exceptions.NewConnectionError) as e:
        raise Failure(flight.why or "connect", what_failed(e, where)) from e
    except requests.exceptions.ConnectionError as e:
        reached = isinstance(e.args[0] if e.args else e, urllib3.exceptions.ProtocolError)
        outcome = flight.why or ("reset" if reached else "connect")
        raise Failure(outcome, "" if reached else what_failed(e, where)) from e
    except (
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        http.client.HTTPException,
    ) as e:
        raise Failure(flight.why or "not_an_answer") from e
    finally:
        _current.flight = None


def what_failed(e: BaseException, where: str) -> str:
    """A few words for a person: which host, and what of reaching it failed."""
    causes: list[Any] = [e]
    for cause in causes:  # libraries wrap them in each other, in three ways
        inner = [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]
        causes += [c for c in inner if isinstance(c, BaseException) and c not in causes]
    proxy = any(isinstance(c, urllib3.exceptions.ProxyError) for c in causes)
    at = f"{where}, through the proxy" if proxy else where
    for cause in causes:
        if isinstance(cause, socket.gaierror | urllib3.exceptions.NameResolutionError):
            return f"the name {at.partition(':')[0]} cannot be resolved"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"{at}: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"{at}: TLS failed: {(cause.reason or 'broken off').lower().replace('_', ' ')}"
    number = next((c.errno for c in causes if isinstance(c, OSError) and c.errno), None)
    return f"{at}: {os.strerror(number).lower() if number else 'no answer in time'}"


def read_chunks(response: requests.Response, flight: Flight) -> Iterator[bytes]:
    """The answer's bytes as they come. `iter_content` would wait for the end of some answers."""
    while True:
        try:
            chunk = response.raw.read1(READ_SIZE)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as e:
            raise Failure(flight.why or "cut", status=response.status_code) from e
        if not chunk:
            break
        yield chunk
    if flight.why or getattr(
        response.raw, "length", None
    ):  # of the length told, so much is missing
        raise Failure(flight.why or "cut", status=response.status_code)


def read_whole(response: requests.Response, flight: Flight, limit: int = MAX_ANSWER) -> bytes:
    """All bytes of an answer of at most `limit` bytes; Failure when it breaks off or is larger."""
    chunks, size = [], 0
    for chunk in read_chunks(response, flight):
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise Failure("not_an_answer", f"over {limit} bytes", status=response.status_code)
    return b"".join(chunks)


def retry_after_of(value: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None when absent or unreadable."""
    try:
        seconds = float(value or "nan")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value or "").timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(0.0, seconds), 1e10)
