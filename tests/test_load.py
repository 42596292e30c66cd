"""Many at once, large, slow, and while the service stops or reloads."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import Service
from helpers import (
    WHOLE,
    chat_bytes,
    connected,
    failures,
    figures,
    head_of,
    in_flight,
    peak_mib,
    read_until,
    user,
    wait_until,
    words_of,
    worker_of,
)  # fmt: skip
from service import PATIENT
from upstream import DONE, Upstream, chunk, events, hang, pieces

HUGE = 300 << 20
MIB = b"x" * (1 << 20)


def milliseconds(call: Callable[[], Any]) -> float:
    before = time.monotonic()
    call()
    return 1000 * (time.monotonic() - before)


# --- the in-flight limit -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_full(serve: Callable[..., Service]) -> Service:
    """A service with 24 threads, so 16 permits."""
    return serve(timeouts_sec=PATIENT, ROUTER_THREADS="24")


@pytest.fixture
def full(shared_full: Service, upstream: Upstream) -> Iterator[Service]:
    """That service with as many upstreams hung as it has permits."""
    upstream.default = hang
    clients = [connected(shared_full, chat_bytes()) for _ in range(16)]
    wait_until(lambda: len(upstream.requests) == 16)
    yield shared_full
    for client in clients:
        client.close()
    wait_until(lambda: in_flight(shared_full) == 0)


def test_beyond_the_limit_the_answer_is_503_at_once(full, upstream):
    answer = full.chat()

    took_ms = min(milliseconds(full.chat) for _ in range(5))

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "too_many_requests"
    assert 1 <= int(answer.headers["Retry-After"]) <= 30
    assert answer.headers["X-Request-Id"]
    assert took_ms < 50
    assert len(upstream.requests) == 16


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/metrics", "/config", "/v1/models"])
def test_with_every_permit_taken_the_other_routes_still_answer(full, path):
    times_ms = sorted(milliseconds(lambda: full.get(path).raise_for_status()) for _ in range(20))

    assert times_ms[10] < 100


def test_a_crowd_beyond_the_limit_is_refused_whole_and_health_still_answers(full, upstream):
    with ThreadPoolExecutor(40) as pool:
        crowd = [pool.submit(full.chat, stream=bool(n % 2)) for n in range(200)]
        times_ms = sorted(milliseconds(lambda: full.get("/health")) for _ in range(10))
        statuses = [answer.result(20).status_code for answer in crowd]

    assert statuses == [503] * 200
    assert times_ms[5] < 1000
    assert len(upstream.requests) == 16


def test_a_refused_request_is_counted_as_rejected_and_blames_nobody(full):
    before = figures(full)["requests"]

    full.chat()

    after = figures(full)["requests"]
    assert after["rejected"] == before["rejected"] + 1
    assert after["total"] == before["total"]
    assert failures(full) == {}


def test_the_limit_is_taken_before_the_body_is_read(full):
    head = chat_bytes(messages=[user("x" * 1_000_000)]).partition(b"{")[0]

    with connected(full, head) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 503")


def test_a_connection_that_was_refused_serves_the_next_request(full):
    with requests.Session() as session:
        body = {"messages": [user("x" * 60_000)]}
        first = session.post(full.base + "/v1/chat/completions", json=body, timeout=5)

        second = session.get(full.base + "/health", timeout=5)

    assert (first.status_code, second.status_code) == (503, 200)


# --- many at once --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(serve: Callable[..., Service]) -> Service:
    return serve(timeouts_sec={**PATIENT, "idle": 2}, ROUTER_THREADS="300")


def test_two_hundred_and_fifty_six_streams_at_once_are_all_whole(large, upstream):
    together = threading.Barrier(256)
    words = [f"{n} " for n in range(20)]
    upstream.default = pieces([lambda: together.wait(20), *events(words, usage=None)])

    with ThreadPoolExecutor(256) as pool:
        answers = list(pool.map(lambda _: large.chat(stream=True).content, range(256)))

    assert [words_of(answer) for answer in answers] == ["".join(words)] * 256
    assert all(answer.endswith(DONE) and answer.count(DONE) == 1 for answer in answers)
    assert in_flight(large) == 0


# --- slow readers, large bodies ------------------------------------------------------------------

BIG, COMMENT = chunk({"content": "y" * 500_000}), b": " + b"z" * (7 << 20) + b"\n\n"


@pytest.mark.parametrize(
    "parts", [[BIG] * 24, [chunk({"content": "word "}), COMMENT]], ids=["words", "a comment"]
)
def test_a_client_that_reads_slowly_is_no_strike_and_gets_all(large, upstream, parts):
    gate, end = threading.Event(), events(["end"], usage=None)
    upstream.default = pieces([*parts, gate.wait, 0.2, *end])

    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", large.port))
        client.sendall(chat_bytes(stream=True).replace(b"HTTP/1.1", b"HTTP/1.0"))
        first = client.recv(1000)
        time.sleep(2.4)  # more than idle and the watcher's tick: the slowness is what is tested
        received = first + read_until(client, parts[-1][-1000:], len(b"".join(parts)) - 1000)
        gate.set()
        received += read_until(client, DONE)

    assert received.endswith(b"".join([*parts, *end]))
    assert failures(large) == {}


@pytest.mark.parametrize("chunked", [True, False])
def test_three_hundred_mebibytes_from_a_client_are_413_and_not_kept(large, upstream, chunked):
    before = peak_mib(large)
    sized = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {HUGE}"
    head = head_of("POST", "/chat/completions", "Connection: close",
                   "Content-Type: application/json", sized)  # fmt: skip
    part = b"%x\r\n%s\r\n" % (len(MIB), MIB) if chunked else MIB

    with connected(large, head) as client:
        answer = send_until_answered(client, part, HUGE >> 20)

    assert answer.startswith(b"HTTP/1.1 413")
    assert peak_mib(large) - before < 100
    assert upstream.requests == []


def send_until_answered(client: socket.socket, part: bytes, times: int) -> bytes:
    """What the service answers to `part` sent `times` times, or until it does not listen."""
    try:
        for _ in range(times):
            client.sendall(part)
    except OSError:
        pass
    return client.recv(65536)


# --- stop and reload -----------------------------------------------------------------------------


@pytest.fixture
def own(serve_once: Callable[..., Service]) -> Service:
    """A service of the test's own, to stop and reload."""
    return serve_once(timeouts_sec=PATIENT)


@pytest.fixture
def gate(own: Service, upstream: Upstream) -> Iterator[threading.Event]:
    """Streams stop after their first word until this is set, at the latest when the test ends."""
    opened = threading.Event()
    upstream.default = pieces([chunk({"content": "a "}), opened.wait, *events(["b"], usage=None)])
    yield opened
    opened.set()


def is_stopping(service: Service) -> bool:
    """True once a new request is turned away at once, instead of waiting for nobody."""
    try:
        socket.create_connection(("127.0.0.1", service.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_sigterm_lets_streams_end_whole(own, gate, upstream):
    """Live ones, and ones that are held."""
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(lambda n=n: own.chat(stream=True, headers=(None, WHOLE)[n % 2]).content)
            for n in range(8)
        ]
        wait_until(lambda: len(upstream.requests) == 8)

        own.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_stopping(own))
        gate.set()
        answers = [one.result(10) for one in asked]

    assert [words_of(answer) for answer in answers] == ["a b"] * 8
    assert all(answer.endswith(DONE) for answer in answers)
    assert own.process.wait(10) == 0


def test_sighup_under_load_fails_no_request(own, upstream):
    over, results = threading.Event(), []

    def ask_all_the_time() -> None:
        while not over.is_set():
            answer = own.chat(stream=len(results) % 2 == 0)
            ended = answer.content.endswith((DONE, b"}"))
            results.append((answer.status_code, ended))

    with ThreadPoolExecutor(8) as pool:
        workers = [pool.submit(ask_all_the_time) for _ in range(8)]
        wait_until(lambda: len(results) > 50)
        first = worker_of(own)
        own.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not Path(f"/proc/{first}").exists(), 15)
        seen = len(results)
        wait_until(lambda: len(results) > seen + 50, 10)
        over.set()
        failures = [worker.exception(20) for worker in workers]

    assert failures == [None] * 8
    assert set(results) == {(200, True)}


def test_sighup_lets_a_running_stream_end_whole(own, gate, upstream):
    first = worker_of(own)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: own.chat(stream=True).content)
        wait_until(lambda: upstream.requests)

        own.process.send_signal(signal.SIGHUP)
        wait_until(lambda: worker_of(own) != first)
        meanwhile = own.get("/health").status_code
        gate.set()

        assert meanwhile == 200
        assert words_of(asked.result(10)) == "a b"
