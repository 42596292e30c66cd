"""The upstream and the client of the streams contest.

    python bench/sse.py serve --port P [--gap MS]      the upstream
    python bench/sse.py load < JSON                    the client; see `load`

Both run as processes of their own for bench/streams.py. The upstream writes the time into each
event; the clock (CLOCK_MONOTONIC) is one for all processes of a Linux machine. The client notes
when bytes came and takes them apart only after the last one, so that it is not what makes events
late. Both together need about 65 us per event, at 256 streams most of one CPU: a contestant that
needs more than the other one is measured as late, and with --pin so is everybody.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import gc
import json
import re
import select
import socket
import sys
import time
from collections import deque
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from servers import ANSWER
from servers import USAGE as COUNTS

# --- upstream ----------------------------------------------------------------------------------

START = b'data: {"id":"chatcmpl-bench-0123456789abcdef","object":"chat.completion.chunk",'
START += b'"created":1795410824,"model":"bench","system_fingerprint":"fp_0123456789","choices":['
WORD = (
    START + b'{"index":0,"delta":{"content":"%d:%d "},"logprobs":null,"finish_reason":null}]}\n\n'
)
LAST = START + b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}\n\n'
USAGE = START + b'],"usage":' + json.dumps(COUNTS).encode() + b"}\n\n"
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


def framed(data: bytes) -> bytes:
    """One chunk of HTTP's chunked encoding."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Answering(asyncio.Protocol):
    """Answers each chat of a connection: whole at once, or `max_tokens` events `gap` s apart."""

    def __init__(self, gap: float, ticker: Ticker):
        self.gap, self.ticker = gap, ticker
        self.buffer = bytearray()
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        head = bytes(self.buffer[: max(0, end)])
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if end < 0 or len(self.buffer) < end + 4 + int(length[1] if length else 0):
            return
        if not length and b"chunked" in head and not self.buffer.endswith(b"\r\n0\r\n\r\n"):
            return
        body, self.buffer = bytes(self.buffer[end + 4 :]), bytearray()
        if not re.search(rb'"stream": *true', body):
            self.transport.write(WHOLE % (len(ANSWER), ANSWER.encode()))
            return
        wanted = re.search(rb'"max_tokens": *(\d+)', body)
        self.events = int(wanted[1]) if wanted else 10
        self.began = self.loop.time()
        self.transport.write(HEAD)
        self.send(0)

    def send(self, n: int) -> None:
        """Write event `n`; the next one comes on this stream's own schedule."""
        if self.transport.is_closing():
            return
        if n == self.events:
            self.transport.write(framed(LAST) + framed(USAGE) + framed(DONE) + b"0\r\n\r\n")
            return
        self.ticker.add(self.began + (n + 1) * self.gap, self, n + 1)
        self.transport.write(framed(WORD % (n, time.monotonic_ns())))


class Ticker:
    """Whose turn is next. All streams have the same gap, so whoever is added last is last."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[tuple[float, Answering, int]] = deque()

    def add(self, at: float, stream: Answering, n: int) -> None:
        """Have `stream` send its event `n` then."""
        self.waiting.append((at, stream, n))
        if len(self.waiting) == 1:
            self.loop.call_at(at, self.tick)

    def tick(self) -> None:
        """Send what is due, then wait for the next."""
        now = self.loop.time()
        while self.waiting and self.waiting[0][0] <= now:
            _, stream, n = self.waiting[0]
            stream.send(n)
            self.waiting.popleft()
        if self.waiting:
            self.loop.call_at(self.waiting[0][0], self.tick)


async def serve(port: int, gap_ms: float) -> None:
    """Answer until terminated."""
    loop, ticker = asyncio.get_running_loop(), Ticker()
    server = await loop.create_server(
        lambda: Answering(gap_ms / 1000, ticker), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


# --- client ------------------------------------------------------------------------------------


class Stream:
    """One stream: what came of it, and when."""

    def __init__(self, port: int, request: bytes):
        self.arrivals: list[tuple[int, bytes]] = []
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sent = time.monotonic_ns()
        self.sock.sendall(request)
        self.sock.setblocking(False)

    def receive(self) -> bool:
        """Take what has come; False when that was the last of it."""
        try:
            data = self.sock.recv(65536)
        except OSError:
            data = b""
        self.arrivals.append((time.monotonic_ns(), data))
        is_refused = len(self.arrivals) == 1 and not data.startswith(b"HTTP/1.1 200")
        # The last chunk; JSON never ends like this.
        if data and not is_refused and not data.endswith(b"0\r\n\r\n"):
            return True
        self.sock.close()
        return False

    def events(self) -> list[tuple[int, int, int]]:
        """(number, sent, received) of each event with content, in order."""
        raw = b"".join(data for _, data in self.arrivals)
        payload, places = unframed(raw)
        ends, total = [], 0
        for _, data in self.arrivals:
            total += len(data)
            ends.append(total)
        found = []
        for event in re.finditer(rb'"content": *"(\d+):(\d+) "[^\n]*\n\n', payload):
            start, at = places[bisect.bisect_left(places, (event.end(), 0)) - 1]
            last_byte = at + event.end() - start
            came = self.arrivals[bisect.bisect_left(ends, last_byte)][0]
            found.append((int(event[1]), int(event[2]), came))
        return found

    def whole(self, wanted: int) -> bool:
        """True when every event came, in order, then the reason for the end and [DONE]."""
        payload, _ = unframed(b"".join(data for _, data in self.arrivals))
        end = re.search(rb'"finish_reason": *"stop".*data: \[DONE\]\s*$', payload, re.DOTALL)
        return [event[0] for event in self.events()] == list(range(wanted)) and bool(end)


def unframed(raw: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The body of an answer without chunk sizes, and (place in the body, place in raw) of each."""
    head, _, _ = raw.partition(b"\r\n\r\n")
    at, payload, places = len(head) + 4, bytearray(), []
    if b"chunked" not in head.lower():
        return raw[at:], [(0, at)]
    while size := re.compile(rb"([0-9a-fA-F]+)[^\r\n]*\r\n").match(raw, at):
        places.append((len(payload), size.end()))
        payload += raw[size.end() : size.end() + int(size[1], 16)]
        at = size.end() + int(size[1], 16) + 2
    return bytes(payload), places


def load(port: int, request: str, streams: int, events: int, spread_ms: float,
         limit_s: float, stall_ms: float) -> dict[str, Any]:  # fmt: skip
    """Open the streams one after the other over `spread_ms`, wait for all, take them apart."""
    began, used = time.monotonic(), time.process_time()
    clients: list[Stream] = []
    open_: dict[int, Stream] = {}
    poll = select.epoll()
    while (len(clients) < streams or open_) and time.monotonic() < began + limit_s:
        if len(clients) < streams:
            wait_s = began + len(clients) * spread_ms / 1000 / streams - time.monotonic()
            if wait_s <= 0:
                clients.append(Stream(port, request.encode()))
                open_[clients[-1].sock.fileno()] = clients[-1]
                poll.register(clients[-1].sock, select.EPOLLIN)
                continue
        else:
            wait_s = 0.1
        for descriptor, _ in poll.poll(wait_s):
            if not open_[descriptor].receive():
                del open_[descriptor]
    used = (time.process_time() - used) * 1e3
    found = sum_up(clients, events, stall_ms)
    return {**found, "client_ms": used / max(1, found["events"])}


def sum_up(clients: list[Stream], wanted: int, stall_ms: float) -> dict[str, Any]:
    """Percentiles over all events and all first events, in ms; a longer pause is a stall."""
    delays, firsts, marks, stalls = [], [], [], 0
    for client in clients:
        events = client.events()
        stalls += sum(b[2] - a[2] > stall_ms * 1e6 for a, b in pairwise(events))
        delays += [(came - sent) / 1e6 for _, sent, came in events]
        firsts += [(events[0][2] - client.sent) / 1e6] if events else []
        if events:
            marks += [(client.sent, 1), (client.arrivals[-1][0], -1)]
    opened = 0
    open_at_once = [opened := opened + step for _, step in sorted(marks)]
    cuts, late = (
        quantiles(times, n=100) if len(times) > 1 else [float("nan")] * 99
        for times in (delays, firsts)
    )
    return {
        "streams": len(clients),
        "whole": sum(client.whole(wanted) for client in clients),
        "events": len(delays),
        "open_at_once": max(open_at_once, default=0),
        "p50_ms": cuts[49],
        "p99_ms": cuts[98],
        "most_ms": max(delays, default=float("nan")),
        "first_ms": median(firsts) if firsts else float("nan"),
        "first_p99_ms": late[98],
        "lost": wanted * len(clients) - len(delays),
        "stalls": stalls,
    }


def main() -> int:
    """Be the upstream or the client."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("role", choices=("serve", "load"))
    parser.add_argument("--port", type=int)
    parser.add_argument("--gap", type=float, default=20, help="ms between events")
    args = parser.parse_args()
    gc.disable()  # a collection would look like a late event
    if args.role == "serve":
        asyncio.run(serve(args.port, args.gap))
    else:
        print(json.dumps(load(**json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
