"""The worker of gunicorn: threads that find their requests themselves, one packet for an answer."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import socket
import time
import types
import weakref
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from conftest import ROOT, Service, small_routes
from gunicorn.config import Config
from gunicorn.http import RequestParser, wsgi
from gunicorn.http.errors import InvalidHeader, InvalidHeaderName, ParseException
from hypothesis import given, settings

from parts import worker

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


def test_a_thread_leaves_a_client_that_never_pauses_for_the_others(direct, monkeypatch):
    served: list[Any] = []
    monkeypatch.setattr(worker, "has_more", lambda conn: True)
    direct.handle = lambda conn: served.append(conn) or True
    here, there = socket.socketpair()
    conn = Idle(here, 0)
    conn.parser = worker.Parser(Config(), conn, BASE)
    direct.ready.register(here)

    direct.serve_one(conn)

    assert len(served) == worker.IN_A_ROW
    assert list(direct.idle.values()) == [conn]
    here.close()
    there.close()


@pytest.mark.parametrize("sent", [b"", HEALTH])
def test_what_came_meanwhile_is_seen_without_waiting(sent):
    here, there = socket.socketpair()
    conn = Idle(here, 0)
    conn.parser = worker.Parser(Config(), conn, BASE)
    assert not worker.has_more(conn)

    there.sendall(sent)
    there.close()

    assert worker.has_more(conn)
    assert conn.parser.unreader.buf.getvalue() == sent
    here.close()


def test_a_request_in_two_packets_is_one_request(service):
    with connected(service) as sock:
        sock.sendall(HEALTH[:20])
        sock.sendall(HEALTH[20:])

        assert answers(sock, 1).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("pin", ["0", "1"])
def test_all_threads_of_a_worker_that_serves_are_on_the_cpu_of_its_port(tmp_path, upstream, pin):
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_PIN_CPU=pin)
    try:
        assert service.chat().status_code == 200
        master = service.process.pid
        worker_pid = Path(f"/proc/{master}/task/{master}/children").read_text().split()[0]
        threads = [int(task.name) for task in Path(f"/proc/{worker_pid}/task").iterdir()]
        cpus = sorted(os.sched_getaffinity(0))
        wanted = {cpus[service.port % len(cpus)]} if pin == "1" else set(cpus)
        assert len(threads) > 64
        assert [os.sched_getaffinity(thread) for thread in threads] == [wanted] * len(threads)
    finally:
        service.stop()


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


ADDRESSES = ("127.0.0.1", 1), ("127.0.0.1", 2)  # of a client and of its server


class Idle:
    """A connection as gunicorn keeps it, with what the worker uses of it."""

    def __init__(self, sock: socket.socket | None, timeout: float):
        self.sock, self.timeout, self.closed = sock, timeout, False
        self.client, self.server = ADDRESSES

    def set_timeout(self) -> None:
        self.timeout = time.monotonic() + 60

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def direct() -> Iterator[Any]:
    found: Any = worker.Direct.__new__(worker.Direct)
    found.idle, found.alive, found.look_at = {}, True, 0.0
    found.open, found._accepting, found.is_untidy = set(), True, False
    found.ready = select.epoll()
    yield found
    found.ready.close()


def test_only_connections_past_their_time_are_closed(direct):
    old, new = Idle(None, time.monotonic() - 1), Idle(None, time.monotonic() + 60)
    direct.idle, direct.open = {1: old, 2: new}, {old, new}

    direct.murder_keepalived()

    assert (old.closed, new.closed) == (True, False)
    assert (list(direct.idle), direct.nr_conns) == ([2], 1)


def test_idle_connections_are_looked_at_a_few_times_a_second_however_often_it_wakes(direct):
    direct.murder_keepalived()
    old = Idle(None, time.monotonic() - 1)
    direct.idle, direct.open = {1: old}, {old}

    direct.murder_keepalived()
    assert not old.closed

    direct.look_at = 0.0
    direct.murder_keepalived()
    assert old.closed


def test_once_all_is_idle_memory_is_given_back(direct, monkeypatch):
    given: list[bool] = []
    monkeypatch.setattr(worker, "give_back_memory", lambda: given.append(True))
    conn = Idle(None, time.monotonic() + 60)
    direct.open, direct.is_untidy = {conn}, True  # it is being served

    direct.murder_keepalived()
    assert not given

    direct.idle, direct.look_at = {1: conn}, 0.0
    for _ in range(2):
        direct.murder_keepalived()
        direct.look_at = 0.0
    assert given == [True]


def test_memory_is_given_back_with_all_that_only_knows_itself():
    class Circle:
        pass

    circle: Any = Circle()
    circle.itself, gone = circle, weakref.ref(circle)
    del circle

    worker.give_back_memory()

    assert gone() is None


def test_past_the_most_connections_new_ones_wait_for_the_end_of_others(tmp_path, upstream):
    more = {"GUNICORN_CMD_ARGS": "--worker-connections 20"}
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="9", **more)
    first = [connected(service) for _ in range(25)]
    try:
        late = connected(service)
        late.sendall(HEALTH)
        late.settimeout(0.7)
        with pytest.raises(TimeoutError):
            late.recv(1)
        [sock.close() for sock in first]

        late.settimeout(5)
        assert answers(late, 1).startswith(b"HTTP/1.1 200")
        late.close()
    finally:
        service.stop()


def test_a_start_frees_what_it_has_made_from_garbage_collections():
    conf = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()

    conf["post_worker_init"](types.SimpleNamespace(cfg=types.SimpleNamespace(address=["/unix"])))

    frozen, seldom = gc.get_freeze_count(), gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    assert frozen > before
    assert seldom > thresholds


def test_a_worker_that_leaves_gives_idle_connections_two_seconds(direct):
    conn = Idle(None, time.monotonic() + 60)
    direct.idle, direct.alive, direct.open = {1: conn}, False, {conn}

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


# --- ordinary heads: read as gunicorn reads them, and nothing else is ----------------------------

CHAT = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:3456\r\nUser-Agent: a/1 (b; c)\r\n"
    b"Accept: */*\r\nConnection: keep-alive\r\nauthorization: Bearer k\r\nX-Odd:\t v\xe9 \t\r\n"
    b"Content-Type: application/json\r\nContent-Length: 12\r\n\r\n"
)
ORDINARY = [
    CHAT,
    HEALTH,
    HEALTH.replace(b"/health", b"/"),
    HEALTH.replace(b"GET", b"DELETE").replace(b"/health", b"/config/category/a-b_c.~"),
    HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: Close\r\n\r\n"),
    HEALTH.replace(b"\r\n\r\n", b"\r\nX-Empty:\r\n\r\n"),
    b"GET /health HTTP/1.1\r\n\r\n",
]
FOR_GUNICORN = {
    "another version": HEALTH.replace(b"1.1", b"1.0"),
    "another method": HEALTH.replace(b"GET", b"OPTIONS"),
    "a query": HEALTH.replace(b"/health", b"/metrics?format=prometheus"),
    "an escape": HEALTH.replace(b"/health", b"/config/category/a%20b"),
    "a host in the target": HEALTH.replace(b"/health", b"http://elsewhere/health"),
    "two slashes": HEALTH.replace(b"/health", b"//elsewhere/health"),
    "a header twice": HEALTH.replace(b"\r\n\r\n", b"\r\nHost: elsewhere\r\n\r\n"),
    "a header in two spellings": HEALTH.replace(b"\r\n\r\n", b"\r\nX-A: 1\r\nx-a: 2\r\n\r\n"),
    "an underscore": HEALTH.replace(b"\r\n\r\n", b"\r\nX_A: 1\r\n\r\n"),
    "chunks": CHAT.replace(b"Content-Length: 12", b"Transfer-Encoding: chunked"),
    "chunks and a length": CHAT.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "two lengths": CHAT.replace(b"\r\n\r\n", b"\r\nContent-Length: 12\r\n\r\n"),
    "a signed length": CHAT.replace(b": 12", b": +12"),
    "a length of two": CHAT.replace(b": 12", b": 12, 12"),
    "digits of another script": CHAT.replace(b": 12", b": \xb2"),
    "an empty length": CHAT.replace(b": 12", b":"),
    "an expectation": CHAT.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"),
    "an upgrade": HEALTH.replace(b"\r\n\r\n", b"\r\nUpgrade: h2c\r\n\r\n"),
    "a list of connections": HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close, te\r\n\r\n"),
    "a folded line": HEALTH.replace(b"\r\n\r\n", b"\r\nX-A: 1\r\n 2\r\n\r\n"),
    "a blank before the colon": HEALTH.replace(b"Host:", b"Host :"),
    "a bare line feed": HEALTH.replace(b"\r\n\r\n", b"\nX-A: 1\r\n\r\n"),
    "a control character": HEALTH.replace(b"localhost", b"local\x00host"),
    "half a head": HEALTH[:-2],
    "a long head": HEALTH.replace(b"localhost", b"l" * worker.MAX_ORDINARY),
    "nothing": b"",
}


BASE = worker.base_environ(Config())


def parsers(data: bytes) -> tuple[Any, Any]:
    """(what reads a request from `data` as the worker does, the same as gunicorn does)."""
    cfg = Config()
    found = []
    for make in (
        lambda sock: worker.Parser(cfg, Idle(sock, 0), BASE),
        lambda sock: RequestParser(cfg, sock, ("127.0.0.1", 1)),
    ):
        here, there = socket.socketpair()
        there.sendall(data)
        there.close()
        found.append(make(here))
    return found[0], found[1]


def read_as_gunicorn(data: bytes) -> None:
    """Assert that a head is left to gunicorn, or read as gunicorn reads it."""
    ours, theirs = parsers(data)
    with contextlib.closing(ours.unreader.sock), contextlib.closing(theirs.unreader.sock):
        try:
            request = next(ours)
        except (ParseException, OSError, StopIteration):  # gunicorn refused it
            return
        if isinstance(request, worker.Ordinary):
            same = next(theirs)
            _, environ = wsgi.create(same, theirs.unreader.sock, *ADDRESSES, Config())
            said = {key: value for key, value in request.environ.items() if key.isupper()}
            assert said == {key: value for key, value in environ.items() if key.isupper()}
            assert request.body.read() == same.body.read()
            assert ours.unreader.buf.getvalue() == theirs.unreader.buf.getvalue()
            assert request.should_close() == same.should_close()


@pytest.mark.parametrize("head", ORDINARY)
def test_an_ordinary_head_is_read_as_gunicorn_reads_it(head):
    ours, theirs = parsers(head + b'{"a": "bcd"}')
    assert isinstance(next(ours), worker.Ordinary)
    [parser.unreader.sock.close() for parser in (ours, theirs)]

    read_as_gunicorn(head + b'{"a": "bcd"}' + HEALTH)


@pytest.mark.parametrize("why", FOR_GUNICORN)
def test_any_other_head_is_left_to_gunicorn(why):
    data = FOR_GUNICORN[why]

    assert worker.read_ordinary(data, data.find(b"\r\n\r\n", 0, 4094) + 4, BASE, 100) is None


def test_more_headers_than_gunicorn_takes_are_gunicorns_to_refuse():
    head = HEALTH.replace(
        b"\r\n\r\n", b"".join(b"\r\nX-%d: 1" % n for n in range(100)) + b"\r\n\r\n"
    )

    assert worker.read_ordinary(head, len(head), BASE, 100) is None
    assert worker.read_ordinary(head, len(head), BASE, 101)


@given(
    head=st.sampled_from([*ORDINARY, *FOR_GUNICORN.values()]),
    at=st.integers(0, 300),
    cut=st.integers(0, 3),
    put=st.sampled_from(
        [bytes([n]) for n in range(256)] + [b"\r\n", b": ", b"\r\nX: y", b"0", b"%"]
    ),
)
@settings(max_examples=500, deadline=None)
def test_whatever_a_head_holds_it_is_read_as_gunicorn_reads_it(head, at, cut, put):
    at = min(at, len(head))

    read_as_gunicorn(head[:at] + put + head[at + cut :] + b'{"a": "bcd"}')


# --- answers -------------------------------------------------------------------------------------


def started(headers: list[tuple[str, str]]) -> worker.Response:
    response = worker.Response(worker.Ordinary(dict(REQUEST_METHOD="GET", PATH_INFO="/"), 0, False),
                               None, Config())  # fmt: skip
    response.start_response("200 OK", headers)
    return response


def test_an_answers_head_says_what_gunicorns_would():
    response = started(
        [("Content-Length", "2"), ("X-A", "b"), ("Connection", "x"), ("Upgrade", "y")]
    )
    theirs = [line for line in wsgi.Response.default_headers(response) if "Date: " not in line]

    lines = [f"{line}\r\n" for line in response.head().decode().split("\r\n")[:-2]]

    date = next(line for line in lines if line.startswith("Date: "))
    assert abs(parsedate_to_datetime(date[6:]).timestamp() - time.time()) < 60
    assert lines == [*theirs[:2], date, *theirs[2:], "Content-Length: 2\r\n", "X-A: b\r\n"]
    assert response.response_length == 2


def test_an_answer_without_a_length_comes_in_chunks():
    assert b"\r\nTransfer-Encoding: chunked\r\n" in started([]).head()


@pytest.mark.parametrize("name", ["X\r\nA", "", "X A", "X:", "É"])
def test_no_header_with_a_broken_name_is_sent(name):
    with pytest.raises(InvalidHeaderName):
        started([(name, "b")])


@pytest.mark.parametrize("value", ["a\r\nX: b", "a\0", "a\n", "€", "\x7f"])
def test_no_header_with_a_broken_value_is_sent(value):
    with pytest.raises(InvalidHeader):
        started([("X-A", "b"), ("X-B", value)])


class Pieces:
    """What an application returns: one piece, then a bug."""

    closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield b"piece"
        raise ZeroDivisionError

    def close(self) -> None:
        self.closed = True


def test_a_bug_behind_the_head_ends_the_connection_without_a_second_answer(direct):
    here, there = socket.socketpair()
    request = worker.Ordinary(dict(REQUEST_METHOD="GET", PATH_INFO="/"), 0, False)
    response, pieces = worker.Response(request, here, Config()), Pieces()
    direct.wsgi = lambda environ, start: start("200 OK", []) and pieces

    with pytest.raises(StopIteration):
        direct.respond({}, response)

    here.close()
    sent = there.recv(65536)
    there.close()
    assert sent.count(b"HTTP/1.1") == 1
    assert sent.endswith(b"\r\n5\r\npiece\r\n")
    assert pieces.closed


def test_behind_a_broken_chunk_nothing_is_read_on_the_connection(service):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(service) as sock:
        sock.sendall(head + b"ZZ\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 4")  # 499 with the oldest gunicorn

        with contextlib.suppress(OSError):
            sock.sendall(HEALTH)

        assert b'"demo"' not in answers(sock, 1)


def test_a_worker_whose_master_died_leaves_as_if_it_was_told_to(direct):
    direct.ppid, direct.log = -1, worker.Silence()

    assert not direct.is_parent_alive()
    assert not direct.alive
