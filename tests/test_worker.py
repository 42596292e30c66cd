"""The worker of gunicorn: threads that find their requests themselves, one packet for an answer."""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import select
import socket
import time
import types
import weakref
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import hypothesis.strategies as st
import pytest
from conftest import ROOT, Clock, Service
from gunicorn.config import Config
from gunicorn.http import RequestParser, wsgi
from gunicorn.http.errors import InvalidHeader, InvalidHeaderName, ParseException
from gunicorn.workers.gthread import TConn
from helpers import (
    HEALTH,
    can_connect,
    chat_bytes,
    connected,
    head_of,
    pair_of_sockets,
    user,
    wait_until,
    worker_of,
)
from hypothesis import given, settings

import worker

ADDRESSES = ("127.0.0.1", 1), ("127.0.0.1", 2)  # of a client and of its server
CFG = Config()
CFG.set("secure_scheme_headers", {})  # as in gunicorn.conf.py
BASE = worker.base_environ(CFG)


def answers(sock: socket.socket, many: int) -> bytes:
    """What came until so many answers of /health were whole."""
    out = b""
    while out.count(b'"demo"') < many and (more := sock.recv(65536)):
        out += more
    return out


def test_connections_without_a_request_hold_no_thread(serve_once):
    service = serve_once(ROUTER_THREADS="9")
    idle = [connected(service) for _ in range(50)]

    assert service.chat().status_code == 200
    [sock.sendall(HEALTH) for sock in idle]
    assert all(answers(sock, 1).startswith(b"HTTP/1.1 200") for sock in idle)
    [sock.close() for sock in idle]


@pytest.mark.parametrize(
    ("packets", "many"),
    [([HEALTH] * 3, 3), ([HEALTH * 3], 3), ([HEALTH[:20], HEALTH[20:]], 1)],
    ids=["one after the other", "sent ahead", "one in two packets"],
)
def test_a_connection_serves_all_that_is_sent_on_it(service, packets, many):
    with connected(service) as sock:
        for packet in packets:
            sock.sendall(packet)
            select.select([sock], [], [], 0.1)  # an answer, or the next packet at once

        found = answers(sock, many)

    assert found.count(b"HTTP/1.1 200 OK\r\n") == many
    assert found.count(b"\r\nConnection: keep-alive\r\n") == many


@pytest.fixture
def conn() -> Iterator[tuple[TConn, socket.socket]]:
    """A connection as gunicorn keeps it, and its client's end."""
    with pair_of_sockets() as (here, there):
        yield TConn(CFG, here, *ADDRESSES), there


def test_a_thread_leaves_a_client_that_never_pauses_for_the_others(direct, conn, monkeypatch):
    served: list[Any] = []
    monkeypatch.setattr(worker, "has_more", lambda conn: True)
    monkeypatch.setattr(direct, "handle", lambda conn: served.append(conn) or True)
    direct.enqueue_req(conn[0])
    direct.idle.clear()

    direct.serve_one(conn[0])

    assert len(served) == worker.IN_A_ROW
    assert list(direct.idle.values()) == [conn[0]]


@pytest.mark.parametrize("sent", [b"", HEALTH])
def test_what_came_meanwhile_is_seen_without_waiting(direct, conn, sent):
    here, there = conn
    direct.enqueue_req(here)
    assert not worker.has_more(here)

    there.sendall(sent)
    there.close()

    assert worker.has_more(here)
    assert here.parser.unreader.buf.getvalue() == sent


def cpus_of(service: Service) -> list[set[int]]:
    """Where each thread of its worker may run."""
    threads = [int(name) for name in os.listdir(f"/proc/{worker_of(service)}/task")]
    assert len(threads) > 64
    return [os.sched_getaffinity(thread) for thread in threads]


def test_all_threads_of_a_worker_that_serves_are_on_the_cpu_of_its_port(service, serve_once):
    cpus = sorted(os.sched_getaffinity(0))
    free = serve_once(ROUTER_PIN_CPU="0")

    assert service.chat().status_code == free.chat().status_code == 200

    pinned, unpinned = cpus_of(service), cpus_of(free)
    assert pinned == [{cpus[service.port % len(cpus)]}] * len(pinned)
    assert unpinned == [set(cpus)] * len(unpinned)


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


def test_a_stop_is_quick_and_ends_idle_connections_of_which_a_last_request_is_answered(serve_once):
    service = serve_once()
    with connected(service, HEALTH) as idle, connected(service, HEALTH) as busy:
        assert answers(idle, 1) and answers(busy, 1)
        began = time.monotonic()
        service.process.terminate()
        wait_until(lambda: not can_connect(service.port))

        busy.sendall(HEALTH)

        assert b"\r\nConnection: close\r\n" in answers(busy, 1)
        assert idle.recv(1) == b""
        assert service.stop() == 0
        assert time.monotonic() - began < 8


class App:
    """What gunicorn loads: an application that is never asked, unless the test has one."""

    def wsgi(self) -> Any:
        return lambda environ, start: pytest.fail("asked")


class Unstarted(worker.Direct):
    """A worker with all that it makes for itself, which serves nobody by itself."""

    def init_signals(self) -> None:
        """The signals are those of the tests."""

    def run(self) -> None:
        """The tests do what its threads would do."""


@pytest.fixture
def direct(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[worker.Direct]:
    """A worker whose time is the clock's."""
    clock.now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", clock)
    found = Unstarted(0, os.getppid(), [], App(), 30, CFG, worker.Silence())
    found.init_process()
    yield found
    found.ready.close()
    found.poller.close()
    found.method_queue.close()
    found.tmp.close()
    found.tpool.shutdown()
    [os.close(end) for end in found.PIPE]


def test_only_connections_past_their_time_are_closed(direct, clock):
    with pair_of_sockets() as (first, _), pair_of_sockets() as (second, _):
        direct.enqueue_req(TConn(CFG, first, *ADDRESSES))
        clock += CFG.keepalive - 1
        late = TConn(CFG, second, *ADDRESSES)
        direct.enqueue_req(late)
        clock += 1

        direct.murder_keepalived()

        assert first.fileno() == -1
        assert (list(direct.idle.values()), direct.nr_conns) == ([late], 1)


def test_idle_connections_are_looked_at_a_few_times_a_second_however_often_it_wakes(
    direct, conn, clock
):
    direct.enqueue_req(conn[0])
    direct.murder_keepalived()
    conn[0].timeout = clock()

    direct.murder_keepalived()
    assert conn[0].sock.fileno() != -1

    clock += worker.LOOK_S
    direct.murder_keepalived()
    assert conn[0].sock.fileno() == -1


def test_once_all_is_idle_memory_is_given_back(direct, conn, clock, monkeypatch):
    given: list[bool] = []
    monkeypatch.setattr(worker, "give_back_memory", lambda: given.append(True))
    direct.enqueue_req(conn[0])
    [(descriptor, served)] = direct.idle.items()
    del direct.idle[descriptor]  # a thread has taken it

    direct.murder_keepalived()
    assert not given

    direct.park(served)
    for _ in range(2):
        clock += worker.LOOK_S
        direct.murder_keepalived()
    assert given == [True]


def test_memory_is_given_back_with_all_that_only_knows_itself():
    class Circle:
        pass

    circle: Any = Circle()
    circle.itself, gone = circle, weakref.ref(circle)
    del circle

    worker.give_back_memory()

    assert gone() is None


def test_past_the_most_connections_new_ones_wait_for_the_end_of_others(serve_once):
    more = {"GUNICORN_CMD_ARGS": "--worker-connections 20"}
    service = serve_once(ROUTER_THREADS="9", **more)
    first = [connected(service) for _ in range(25)]

    with connected(service, HEALTH, timeout=0.5) as late:
        with pytest.raises(TimeoutError):
            late.recv(1)
        [sock.close() for sock in first]

        late.settimeout(5)
        assert answers(late, 1).startswith(b"HTTP/1.1 200")


def test_a_start_frees_what_it_has_made_from_garbage_collections():
    conf = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()

    conf["post_worker_init"](types.SimpleNamespace(cfg=types.SimpleNamespace(address=["/unix"])))

    frozen, seldom = gc.get_freeze_count(), gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    assert frozen > before
    assert seldom > thresholds


def test_a_worker_that_leaves_gives_idle_connections_two_seconds(direct, conn, clock):
    direct.enqueue_req(conn[0])
    direct.alive = False

    direct.murder_keepalived()
    assert conn[0].sock.fileno() != -1

    clock += worker.LINGER_S
    direct.murder_keepalived()
    assert conn[0].sock.fileno() == -1


def test_each_reading_of_the_settings_loads_the_worker_anew():
    first, second = (runpy.run_path(str(ROOT / "gunicorn.conf.py")) for _ in range(2))

    assert first["worker_class"] is not second["worker_class"]
    assert first["worker_class"].__name__ == "Direct"


def test_a_body_of_known_length_is_read_in_full_however_it_comes(service, upstream):
    text = "é" * 100_000
    sent = chat_bytes(messages=[user(text)])
    with connected(service) as sock:
        for at in range(0, len(sent), 50_000):
            sock.sendall(sent[at : at + 50_000])

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


def parsers(data: bytes) -> tuple[Any, Any]:
    """(what reads a request from `data` as the worker does, the same as gunicorn does)."""
    found = []
    for make in (
        lambda sock: worker.Parser(CFG, TConn(CFG, sock, *ADDRESSES), BASE),
        lambda sock: RequestParser(CFG, sock, ADDRESSES[0]),
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
            _, environ = wsgi.create(same, theirs.unreader.sock, *ADDRESSES, CFG)
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
                               None, CFG)  # fmt: skip
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


@pytest.mark.parametrize(
    ("wrong", "headers"),
    [*[(InvalidHeaderName, [(name, "b")]) for name in ("X\r\nA", "", "X A", "X:", "É")],
     *[(InvalidHeader, [("X-A", "b"), ("X-B", value)])
       for value in ("a\r\nX: b", "a\0", "a\n", "€", "\x7f")]],
)  # fmt: skip
def test_no_broken_header_is_sent(wrong, headers):
    with pytest.raises(wrong):
        started(headers)


class Pieces:
    """What an application returns: one piece, then a bug."""

    closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield b"piece"
        raise ZeroDivisionError

    def close(self) -> None:
        self.closed = True


def test_a_bug_behind_the_head_ends_the_connection_without_a_second_answer(direct):
    request = worker.Ordinary(dict(REQUEST_METHOD="GET", PATH_INFO="/"), 0, False)
    pieces = Pieces()
    direct.wsgi = lambda environ, start: start("200 OK", []) and pieces

    with pair_of_sockets() as (here, there):
        with pytest.raises(StopIteration):
            direct.respond({}, worker.Response(request, here, CFG))
        here.close()
        sent = there.recv(65536)

    assert sent.count(b"HTTP/1.1") == 1
    assert sent.endswith(b"\r\n5\r\npiece\r\n")
    assert pieces.closed


def test_behind_a_broken_chunk_nothing_is_read_on_the_connection(service):
    head = head_of("POST", "/chat/completions", "Content-Type: application/json",
                   "Transfer-Encoding: chunked")  # fmt: skip
    with connected(service, head + b"ZZ\r\n") as sock:
        assert sock.recv(65536).startswith(b"HTTP/1.1 4")  # 499 with the oldest gunicorn

        with contextlib.suppress(OSError):
            sock.sendall(HEALTH)

        assert b'"demo"' not in answers(sock, 1)


def test_a_worker_whose_master_died_leaves_as_if_it_was_told_to(direct):
    direct.ppid = -1

    assert not direct.is_parent_alive()
    assert not direct.alive
