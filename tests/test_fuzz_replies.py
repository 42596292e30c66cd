"""Bytes made by chance: what an upstream says with them to us is what it says to h11.

A few seconds of them, the same with every run, as in test_fuzz.py.
"""

from __future__ import annotations

import http.client
import re
import time
from typing import Any

import h11
from test_fuzz import Outcome, pieces_of, rounds, spoiled

from parts.errors import Failure
from parts.exchange import Reply
from parts.flights import Flight

ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;x=y\r\n hi\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n1\r\na\r\n0\r\nX-Trailer: t\r\n\r\n",
    b"HTTP/1.1 200\r\nConnection: close\r\n\r\nup to the end",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nhi",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 Too Many\r\nX-A: 1\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nX-A: 1\r\nX-A: 2\r\nContent-Length: 3, 3\r\n\r\nbye",
]
ODD_ANSWERS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\r\n ", b"\r\n\r\n", b"0", b"00000", b"f",
    b"-", b"+", b"0x", b",", b";", b"1_0", b"\xb2", b"HTTP/1.0", b"HTTP/2",
    b"HTTP/1.1 103 Hint\r\n\r\n", b"\r\nContent-Length: 0", b"\r\nContent-Length: 5",
    b"\r\nContent-Length: 5, 6", b"\r\nContent-Length:", b"\r\nTransfer-Encoding: chunked",
    b"\r\nTransfer-Encoding: identity", b"\r\nTransfer-Encoding: gzip, chunked",
    b"\r\nConnection: close", b"\r\nConnection: x, Close", b"\r\nConnection: keep-alive",
    b"0" * 25, b"9" * 25, b"\r\nContent-Length : 5", b"\x85",
]  # fmt: skip


class Upstream:
    """Its connection and the pool of it: what comes in pieces, then its end, and what becomes."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = [piece for piece in pieces if piece]
        self.is_kept = False

    def recv(self, n: int) -> bytes:
        if not self.pieces:
            return b""
        data, self.pieces[0] = self.pieces[0][:n], self.pieces[0][n:]
        if not self.pieces[0]:
            del self.pieces[0]
        return data

    def close(self) -> None:
        self.pieces = [b"closed"]

    def _put_conn(self, conn: Upstream) -> None:
        self.is_kept = not self.pieces  # what comes later is seen when it is to be used again


def answer_by_us(pieces: list[bytes]) -> Outcome:
    """(status, body, whether the connection is used again), or what is wrong with the reply."""
    upstream: Any = Upstream(pieces)
    reply, body = Reply(upstream, Flight(None, time.monotonic), upstream, upstream), []
    try:
        reply.begin()
        while data := reply.read1():
            body.append(data)
    except (http.client.HTTPException, OSError, Failure) as e:
        assert not upstream.is_kept
        return (type(e).__name__,)
    return reply.status_code, b"".join(body), upstream.is_kept


def answer_by_h11(data: bytes) -> Outcome:
    """The same as h11 has it."""
    client, body = h11.Connection(h11.CLIENT, max_incomplete_event_size=100_000), b""
    client.send(h11.Request(method="POST", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    status, is_old = 0, False
    try:
        client.receive_data(data)
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                client.receive_data(b"")
            elif isinstance(event, h11.Response):
                status, is_old = event.status_code, event.http_version < b"1.1"
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.ConnectionClosed):
                return ("closed",)
    except h11.RemoteProtocolError as e:
        return (str(e),)
    # h11 keeps no connection of HTTP/1.0, where a server may say that it does.
    may_be_kept = (is_old or client.their_state is h11.DONE) and not client.trailing_data[0]
    return status, bytes(body), may_be_kept


# As h11 words it: an answer may be read all the same, but nobody knows what follows it. In front of
# ";" a chunk's size may have blanks.
BLANKS = re.compile(r"[0-9a-f][ \\t]+;[^\\]*\\r\\n'\)")
CHUNKS_AMISS = ("illegal chunk header", "malformed chunk footer", "peer unexpectedly closed")


def test_whatever_an_upstream_answers_and_however_it_comes_it_is_read_as_h11_reads_it():
    for chance in rounds(5000):
        data = spoiled(chance.choice(ANSWERS), ODD_ANSWERS, chance)

        ours, theirs = answer_by_us(pieces_of(data, chance)), answer_by_h11(data)

        if len(ours) > 1 and len(theirs) > 1:
            assert ours[:2] == theirs[:2], data
            assert theirs[2] or not ours[2], data
        elif len(ours) > 1:
            amiss = theirs[0].startswith(CHUNKS_AMISS) and not BLANKS.search(theirs[0])
            assert not (amiss and ours[2]), data
