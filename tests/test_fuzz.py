"""Bytes made by chance: what they mean to us is what they mean to gunicorn and to h11.

A few seconds of them, the same with every run; FUZZ_SECONDS=600 (make fuzz) tries new ones for
ten minutes and says with which seed to see a difference again (FUZZ_SEED).
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import h11
from gunicorn.config import Config
from gunicorn.http import RequestParser, wsgi
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import TConn
from test_worker import ADDRESSES, BASE, FOR_GUNICORN, ORDINARY

from parts import worker

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
SEED = os.environ.get("FUZZ_SEED") or ("by chance" if SECONDS else "the same every time")
CONFIG = Config()


def rounds(at_least: int) -> Iterator[random.Random]:
    """A source of chance for each round, which its seed brings back."""
    seed = str(random.SystemRandom().random()) if SEED == "by chance" else SEED
    sys.stdout.write(f"FUZZ_SEED={seed}\n")
    chance, until = random.Random(seed), time.monotonic() + SECONDS
    for n in range(10**12):
        if n >= at_least and time.monotonic() >= until:
            return
        yield chance


def pieces_of(data: bytes, chance: random.Random) -> list[bytes]:
    """`data` cut as a network may cut it."""
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 1, 2, 9))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def spoiled(data: bytes, odd: list[bytes], chance: random.Random) -> bytes:
    """`data` with some bytes left out, some put in, and some lines twice or elsewhere."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        at = chance.randrange(len(data) + 1)
        put = chance.choice(odd) if chance.random() < 0.7 else bytes([chance.randrange(256)])
        if chance.random() < 0.2:
            put = chance.choice(data.split(b"\r\n")) + b"\r\n"
            at = data.find(b"\r\n", at) + 2
        data = data[:at] + put + data[at + chance.choice((0, 0, 1, len(put))) :]
    return data


# --- heads of requests ---------------------------------------------------------------------------

BODIES = [b"", b'{"a": "bcd"}', b"c\r\n" + b'{"a": "bcd"}\r\n0\r\n\r\n', b"GET / HTTP/1.1\r\n\r\n"]
HEADS = [*ORDINARY, *(head for head in FOR_GUNICORN.values() if len(head) < 1000)]
ODD = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b": ", b"\r\n ", b"\r\nX: y", b"/",
    b"\r\n\r\n", b"//", b"%", b"?", b"#", b"*", b"0", b"+", b"-", b"_", b",", b";", b"HTTP/1.0",
    b"HTTP/2.0", b"CONNECT ", b"\r\nContent-Length: 0", b"\r\nContent-Length: 5, 5",
    b"\r\nContent-Length : 5", b"0" * 30, b"\r\nTransfer-Encoding: chunked",
    b"\r\nTransfer-Encoding: identity", b"\x85", b"\r\nConnection: close",
    b"\r\nTransfer-Encoding:\x0bchunked", b"\r\nHost: other", b"\xa0", b"\r\nContent_Length: 5",
    b"\r\nExpect: 100-continue", b"\r\nUpgrade: h2c", b"\x7f", b"\xef\xbb\xbf",
]  # fmt: skip

Outcome = tuple[Any, ...]


def told_by(request: Any, parser: Any) -> Outcome:
    """What a server of WSGI makes of a request: its environment, its body, what is behind it."""
    sock = parser.unreader.sock
    if isinstance(request, worker.Ordinary):
        environ = request.environ
    else:
        _, environ = wsgi.create(request, sock, *ADDRESSES, CONFIG)
    said = {key: value for key, value in environ.items() if key.isupper()}
    body, behind = request.body.read(), [parser.unreader.buf.getvalue()]
    while more := sock.recv(65536):
        behind.append(more)
    return said, body, b"".join(behind), request.should_close()


def outcome(make: Callable[[socket.socket], Any], pieces: list[bytes]) -> Outcome:
    """What comes of the request in `pieces`, or the name of what is wrong with it."""
    here, there = socket.socketpair()
    with here, there:
        parser, found = make(here), False
        for piece in pieces:
            there.sendall(piece)
            found = found or getattr(parser, "has_head", bool)()
        there.shutdown(socket.SHUT_WR)
        try:
            assert found or getattr(parser, "has_head", lambda: True)()
            return told_by(next(parser), parser)
        except (ParseException, OSError, StopIteration) as e:
            return (f"refused: {type(e).__name__}",)


def by_us(sock: socket.socket) -> Any:
    return worker.Parser(CONFIG, TConn(CONFIG, sock, *ADDRESSES), BASE)


def by_gunicorn(sock: socket.socket) -> Any:
    return RequestParser(CONFIG, sock, ADDRESSES[0])


# The router answers the first with a 403, the second with a 499.
H11_ALONE_REFUSES = ("Missing mandatory Host: header", "half a body")


def by_h11(data: bytes) -> Outcome:
    """The same as h11 has it."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    try:
        server.receive_data(data)
        request, body = server.next_event(), b""
        if not isinstance(request, h11.Request):
            return (repr(request),)
        while not isinstance(event := server.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return ("half a body",)
            body += event.data
    except h11.RemoteProtocolError as e:
        return (str(e),)
    said = {"REQUEST_METHOD": request.method.decode(), "RAW_URI": request.target.decode("latin-1")}
    for name, value in [pair for pair in request.headers if b"_" not in pair[0]]:  # WSGI's trap
        key = "HTTP_" + name.decode().upper().replace("-", "_")
        key = (
            key.removeprefix("HTTP_")
            if key in ("HTTP_CONTENT_LENGTH", "HTTP_CONTENT_TYPE")
            else key
        )
        said[key] = (
            f"{said[key]},{value.decode('latin-1')}" if key in said else value.decode("latin-1")
        )
    return said, bytes(body), server.trailing_data[0]


def test_whatever_a_head_holds_and_however_it_comes_it_is_read_as_gunicorn_and_h11_read_it():
    for chance in rounds(1500):
        data = spoiled(chance.choice(HEADS), ODD, chance) + chance.choice(BODIES)
        pieces = pieces_of(data, chance)

        ours, theirs, h11s = outcome(by_us, pieces), outcome(by_gunicorn, [data]), by_h11(data)

        assert ours == theirs or len(ours) == len(theirs) == 1, data  # one fault or another
        end = data.find(b"\r\n\r\n", 0, worker.MAX_ORDINARY) + 4
        if worker.read_ordinary(data, end, BASE, CONFIG.limit_request_fields):
            if len(h11s) == 1:
                assert h11s[0] in H11_ALONE_REFUSES, data
            else:
                (said, *ours_rest, _), (h11_said, *h11_rest) = ours, h11s
                assert (said | h11_said, *ours_rest) == (said, *h11_rest), data
