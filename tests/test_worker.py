"""The worker of gunicorn: threads that find their requests themselves, one packet for an answer."""

from __future__ import annotations

import json
import runpy
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT, Service, small_routes

import worker

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connected(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=5)


def answers(sock: socket.socket, many: int) -> bytes:
    """What came until so many answers of /health were whole."""
    out = b""
    while out.count(b'"demo"') < many and (more := sock.recv(65536)):
        out += more
    return out


def test_connections_without_a_request_hold_no_thread(tmp_path, upstream):
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="9")
    idle = [connected(service) for _ in range(50)]
    try:
        assert service.chat().status_code == 200
        [sock.sendall(HEALTH) for sock in idle]
        assert all(answers(sock, 1).startswith(b"HTTP/1.1 200") for sock in idle)
    finally:
        [sock.close() for sock in idle]
        service.stop()


def test_a_connection_serves_one_request_after_the_other(service):
    with connected(service) as sock:
        for _ in range(3):
            sock.sendall(HEALTH)
            assert b"\r\nConnection: keep-alive\r\n" in answers(sock, 1)


def test_requests_sent_ahead_are_all_answered(service):
    with connected(service) as sock:
        sock.sendall(HEALTH * 3)

        assert answers(sock, 3).count(b"HTTP/1.1 200 OK\r\n") == 3


def test_a_request_in_two_packets_is_one_request(service):
    with connected(service) as sock:
        sock.sendall(HEALTH[:20])
        sock.sendall(HEALTH[20:])

        assert answers(sock, 1).startswith(b"HTTP/1.1 200")


def test_an_answer_comes_in_one_packet(service):
    with connected(service) as sock:
        sock.sendall(HEALTH)
        first = sock.recv(65536)

    head, _, body = first.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head


def test_a_head_request_gets_no_body(service):
    with connected(service) as sock:
        sock.sendall(HEALTH.replace(b"GET", b"HEAD") + HEALTH)
        first, _, rest = answers(sock, 1).partition(b"\r\n\r\n")

    assert b"Content-Length: " in first
    assert rest.startswith(b"HTTP/1.1 200")


def test_a_stop_ends_idle_connections_and_is_quick(tmp_path, upstream):
    service = Service(tmp_path, small_routes(upstream.url))
    with connected(service) as sock:
        sock.sendall(HEALTH)
        answers(sock, 1)
        began = time.monotonic()

        assert service.stop() == 0

        assert sock.recv(1) == b""
        assert time.monotonic() - began < 8


def wait_until_it_refuses(port: int) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
    raise AssertionError("it still listens")


def test_a_request_on_an_idle_connection_of_a_stopping_worker_is_its_last(tmp_path, upstream):
    service = Service(tmp_path, small_routes(upstream.url))
    with connected(service) as sock:
        sock.sendall(HEALTH)
        answers(sock, 1)
        service.process.terminate()
        wait_until_it_refuses(service.port)

        sock.sendall(HEALTH)

        assert b"\r\nConnection: close\r\n" in answers(sock, 1)
    assert service.stop() == 0


class Idle:
    """A connection as gunicorn keeps it, with what the worker uses of it."""

    def __init__(self, sock: socket.socket | None, timeout: float):
        self.sock, self.timeout, self.closed = sock, timeout, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def direct() -> Iterator[Any]:
    found: Any = worker.Direct.__new__(worker.Direct)
    found.idle, found.alive, found.nr_conns = {}, True, 0
    found.ready = select.epoll()
    yield found
    found.ready.close()


def test_only_connections_past_their_time_are_closed(direct):
    old, new = Idle(None, time.monotonic() - 1), Idle(None, time.monotonic() + 60)
    direct.idle, direct.nr_conns = {1: old, 2: new}, 2

    direct.murder_keepalived()

    assert (old.closed, new.closed) == (True, False)
    assert (list(direct.idle), direct.nr_conns) == ([2], 1)


def test_a_worker_that_leaves_gives_idle_connections_two_seconds(direct):
    conn = Idle(None, time.monotonic() + 60)
    direct.idle, direct.alive, direct.nr_conns = {1: conn}, False, 1

    direct.murder_keepalived()

    assert not conn.closed
    assert conn.timeout <= time.monotonic() + worker.LINGER_S


def test_each_reading_of_the_settings_loads_the_worker_anew():
    first, second = (runpy.run_path(str(ROOT / "gunicorn.conf.py")) for _ in range(2))

    assert first["worker_class"] is not second["worker_class"]
    assert first["worker_class"].__name__ == "Direct"


def test_a_body_of_known_length_is_read_in_full_however_it_comes(service, upstream):
    text = "é" * 100_000
    body = json.dumps({"model": "router", "messages": [{"role": "user", "content": text}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connected(service) as sock:
        for at in range(0, len(body), 50_000):
            sock.sendall((head if at == 0 else b"") + body[at : at + 50_000])

        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(HEALTH)  # nothing of the body is left on the connection
        assert answers(sock, 1).startswith(b"HTTP/1.1 200")
    assert upstream.requests[-1].body["messages"][0]["content"] == text
