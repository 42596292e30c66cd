"""Many at once, large, slow, and while the service stops or reloads."""

from __future__ import annotations

import json
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
from conftest import Service, small_routes
from upstream import (
    DONE,
    Peer,
    Request,
    Upstream,
    chunk,
    events,
    hang,
    pieces,
    whole,
)  # fmt: skip

HUGE = 300 << 20
MIB = b"x" * (1 << 20)
JSON_HEAD = b"Content-Type: application/json\r\n"


def wait_until(is_so: Callable[[], Any], seconds: float = 5.0) -> None:
    """Return as soon as `is_so()`; fail when it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


def patient_routes(url: str) -> dict[str, Any]:
    routes = small_routes(url)
    routes["timeouts_sec"] = {
        "connect": 2, "first_token": 60, "idle": 60, "answer": 60, "total": 90,
    }  # fmt: skip
    return routes


def words_of(data: bytes) -> str:
    bodies = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    return "".join(body["choices"][0]["delta"].get("content", "") for body in bodies)


def in_flight(service: Service) -> int:
    return int(service.get("/metrics").json()["in_flight"])


def worker_of(service: Service) -> str:
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    return children.read_text().split()[-1]


def peak_kib(service: Service) -> int:
    """The most memory gunicorn's worker ever held."""
    status = Path(f"/proc/{worker_of(service)}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def milliseconds(call: Callable[[], Any]) -> float:
    before = time.monotonic()
    call()
    return 1000 * (time.monotonic() - before)


# --- the in-flight limit -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_full(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service with 24 threads, so 16 permits."""
    folder = tmp_path_factory.mktemp("full")
    service = Service(folder, patient_routes(shared_upstream.url), ROUTER_THREADS="24")
    yield service
    service.stop()


@pytest.fixture
def full(shared_full: Service, upstream: Upstream) -> Iterator[Service]:
    """That service with as many upstreams hung as it has permits."""
    upstream.default = hang
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + JSON_HEAD
    clients = [socket.create_connection(("127.0.0.1", shared_full.port)) for _ in range(16)]
    for client in clients:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
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
    before = full.get("/metrics").json()

    full.chat()

    after = full.get("/metrics").json()
    assert after["requests"]["rejected"] == before["requests"]["rejected"] + 1
    assert after["requests"]["total"] == before["requests"]["total"]
    assert after["circuit_breaker"]["failures"] == {}


def test_the_limit_is_taken_before_the_body_is_read(full):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + JSON_HEAD

    with socket.create_connection(("127.0.0.1", full.port), timeout=2) as client:
        client.sendall(head + b"Content-Length: 1000000\r\n\r\n")
        answer = client.recv(65536)

    assert answer.startswith(b"HTTP/1.1 503")


def test_a_connection_that_was_refused_serves_the_next_request(full):
    with requests.Session() as session:
        body = {"messages": [{"role": "user", "content": "x" * 60_000}]}
        first = session.post(full.base + "/v1/chat/completions", json=body, timeout=5)

        second = session.get(full.base + "/health", timeout=5)

    assert (first.status_code, second.status_code) == (503, 200)


# --- many at once --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_large(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("large")
    service = Service(folder, patient_routes(shared_upstream.url), ROUTER_THREADS="300")
    yield service
    service.stop()


@pytest.fixture
def large(shared_large: Service, upstream: Upstream) -> Service:
    shared_large.post("/circuit-breaker/reset-all")
    return shared_large


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


def test_a_client_that_reads_slowly_is_no_strike_and_gets_all(service, upstream):
    big = chunk({"content": "y" * 500_000})
    upstream.default = pieces([big] * 24 + events(["end"], usage=None))

    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", service.port))
        client.sendall(asking())
        first = client.recv(1000)
        time.sleep(1.8)  # more than idle and the watcher's tick: the slowness is what is tested
        received = first + b"".join(iter(lambda: client.recv(1 << 20), b""))

    assert received.endswith(DONE)
    assert received.count(b"y" * 500_000) == 24
    assert service.get("/metrics").json()["circuit_breaker"]["failures"] == {}


def test_a_client_that_reads_a_comment_slowly_is_no_strike_either(service, upstream):
    gate, word = threading.Event(), chunk({"content": "word "})
    comment = b": " + b"z" * (7 << 20) + b"\n\n"
    upstream.default = pieces([word, comment, gate.wait, 0.2, *events(["end"], usage=None)])

    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.connect(("127.0.0.1", service.port))
        client.sendall(asking())
        client.recv(1000)
        time.sleep(1.8)  # longer than idle: the slowness is what is tested
        received = b"".join(iter(lambda: until_silent(client, gate), b""))

    assert received.endswith(DONE)
    assert service.get("/metrics").json()["circuit_breaker"]["failures"] == {}


def until_silent(client: socket.socket, gate: threading.Event) -> bytes:
    """What comes next; opens the gate when the comment has been read to its end."""
    data = client.recv(1 << 20)
    if data.endswith(b"z\n\n"):
        gate.set()
    return data


def asking() -> bytes:
    """A request for a stream, by a client that takes the end of the connection for its end."""
    body = json.dumps({"stream": True, "messages": [{"role": "user", "content": "hello"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\n" + JSON_HEAD
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def huge(head: bytes, start: bytes = b"") -> Any:
    """An answer of 300 MiB; says `left` when the router stops reading."""

    def script(peer: Peer, request: Request) -> str:
        try:
            peer.send(head + b"Content-Length: %d\r\n\r\n" % HUGE + start)
            for _ in range(HUGE >> 20):
                peer.send(MIB)
        except OSError:
            return "left"
        return "all was read"

    return script


@pytest.mark.parametrize(
    ("head", "asked", "most_mib"),
    [
        (b"HTTP/1.1 200 OK\r\n" + JSON_HEAD, {}, 150),
        (b"HTTP/1.1 200 OK\r\n" + JSON_HEAD, {"stream": True}, 150),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n", {"stream": True}, 150),
        (b"HTTP/1.1 503 No\r\n" + JSON_HEAD, {}, 20),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n" + JSON_HEAD, {}, 20),
    ],
)
def test_three_hundred_mebibytes_from_an_upstream_are_not_read(
    large, upstream, head, asked, most_mib
):
    before = peak_kib(large)
    upstream.scripts["acme/one"] = huge(head)

    answer = large.chat(**asked)

    assert answer.headers["X-Router-Model"] == "acme/two"
    answer.close()
    wait_until(lambda: upstream.left, 2)
    assert peak_kib(large) - before < most_mib << 10


@pytest.mark.parametrize("chunked", [True, False])
def test_three_hundred_mebibytes_from_a_client_are_413_and_not_kept(large, upstream, chunked):
    before = peak_kib(large)
    sized = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % HUGE
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    part = b"%x\r\n%s\r\n" % (len(MIB), MIB) if chunked else MIB

    with socket.create_connection(("127.0.0.1", large.port), timeout=10) as client:
        client.sendall(head + JSON_HEAD + sized + b"\r\n\r\n")
        answer = send_until_answered(client, part, HUGE >> 20)

    assert answer.startswith(b"HTTP/1.1 413")
    assert peak_kib(large) - before < 100 << 10
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
def own(upstream: Upstream, tmp_path: Path) -> Iterator[Service]:
    """A service of the test's own, to stop and reload."""
    service = Service(tmp_path, patient_routes(upstream.url))
    yield service
    service.stop()


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


@pytest.mark.parametrize("headers", [None, {"X-Router-Stream": "whole"}])
def test_sigterm_lets_streams_end_whole(own, gate, upstream, headers):
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(lambda: own.chat(stream=True, headers=headers).content) for _ in range(8)
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
    upstream.default = whole("Hello")
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


def test_a_slow_trickle_of_a_whole_answer_is_ended_by_its_limit(service, upstream):
    head = b"HTTP/1.1 200 OK\r\n" + JSON_HEAD + b"Content-Length: 900\r\n\r\n"

    def trickle(peer: Peer, request: Request) -> str:
        try:
            peer.send(head)
            for _ in range(900):
                peer.send(b" ")
                time.sleep(0.02)
        except OSError:
            return "left"
        return ""

    upstream.scripts["acme/one"] = trickle
    began = time.monotonic()

    answer = service.chat()

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert time.monotonic() - began < 2
    wait_until(lambda: upstream.left, 1)
