"""The worker of gunicorn: threads that find their requests themselves, one packet for an answer."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import resource
import runpy
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Service, small_routes
from gunicorn.config import Config
from gunicorn.http import RequestParser, wsgi
from gunicorn.http.errors import InvalidHeader, InvalidHeaderName, ParseException
from gunicorn.workers.gthread import TConn
from helpers import CLOSED, answer_to, pair_of_sockets, worker_of
from upstream import DONE, Upstream, chunk, events, pieces

from parts import worker

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /route HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


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


def test_the_table_of_descriptors_is_large_before_there_are_threads(service):
    process = Path(f"/proc/{worker_of(service)}")
    most = int(re.search(r"Max open files +(\d+)", (process / "limits").read_text())[1])
    size = int(re.search(r"FDSize:\s+(\d+)", (process / "status").read_text())[1])

    assert size >= min(4096, most)


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


def served(direct: Any, conn: Any) -> list[bytes]:
    """Serve a connection as a thread does; the paths that were asked for."""
    paths: list[bytes] = []
    direct.handle = lambda conn: paths.append(next(conn.parser).uri) or True
    direct.base = BASE
    direct.idle.pop(conn.sock.fileno())
    direct.serve_one(conn)
    return paths


def test_a_thread_leaves_a_client_that_never_pauses_for_the_others(direct, pairs):
    conn, client = pairs(direct, 5)
    client.sendall(HEALTH * 500)

    assert worker.IN_A_ROW <= len(served(direct, conn)) < 250
    assert list(direct.idle.values()) == [conn]
    assert direct.ready.poll(0) == [(conn.sock.fileno(), select.EPOLLIN)]


@pytest.mark.parametrize("head", [HEALTH, CHUNKED])
@pytest.mark.parametrize("kept", [False, True])
def test_half_a_head_is_put_back_with_what_came_and_no_longer_time(direct, pairs, head, kept):
    conn, client = pairs(direct, 7)
    if kept:
        client.sendall(HEALTH)
        assert served(direct, conn) == ["/health"]
    for byte in head[:-1]:
        client.sendall(bytes([byte]))
        assert served(direct, conn) == []
    left_s = conn.timeout - time.monotonic()

    client.sendall(head[-1:])
    assert left_s <= (worker.HEAD_S if kept else 7)
    assert served(direct, conn) == [head.split()[1].decode()]


@pytest.fixture
def direct() -> Iterator[Any]:
    found: Any = worker.Direct(0, os.getppid(), [], None, 30, Config(), worker.Silence())
    found._accepting, found.is_untidy = True, False
    found.ready = select.epoll()
    yield found
    found.ready.close()
    found.tmp.close()


@pytest.fixture
def pairs() -> Iterator[Callable[..., tuple[Any, socket.socket]]]:
    """Makes (a connection of the worker, its client's end), with the given time left."""
    made: list[socket.socket] = []

    def make(direct: Any, seconds: float, **noted: Any) -> tuple[Any, socket.socket]:
        here, there = socket.socketpair()
        made.extend((here, there))
        conn = TConn(direct.cfg, here, *ADDRESSES)
        direct.enqueue_req(conn)
        conn.timeout = time.monotonic() + seconds
        vars(conn).update(noted)
        return conn, there

    yield make
    [sock.close() for sock in made]


def is_closed(client: socket.socket) -> bool:
    """True when the worker has closed the other end."""
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        return client.recv(1) == b""
    return False


def test_only_connections_past_their_time_are_closed(direct, pairs):
    (_, old), (new, other) = pairs(direct, -1), pairs(direct, 60)

    direct.murder_keepalived()

    assert (is_closed(old), is_closed(other)) == (True, False)
    assert (list(direct.idle.values()), direct.nr_conns) == ([new], 1)


def test_a_connection_past_its_time_that_waits_for_a_thread_is_not_closed(direct, pairs):
    conn, client = pairs(direct, -1)
    client.sendall(HEALTH)

    direct.murder_keepalived()

    assert list(direct.idle.values()) == [conn]


def test_idle_connections_are_looked_at_a_few_times_a_second_however_often_it_wakes(direct, pairs):
    direct.murder_keepalived()
    _, client = pairs(direct, -1)

    direct.murder_keepalived()
    assert not is_closed(client)

    direct.look_at = 0.0
    direct.murder_keepalived()
    assert is_closed(client)


def test_out_of_room_those_that_never_asked_go_first_and_of_them_the_oldest(direct, pairs):
    kept = pairs(direct, 9, since=0, is_kept=True)
    old, new = (pairs(direct, 9, since=since) for since in (1, 2))
    direct.worker_connections = 3

    direct.murder_keepalived()
    assert [is_closed(client) for _, client in (kept, old, new)] == [False, True, False]

    assert direct.make_room()
    assert [is_closed(client) for _, client in (kept, new)] == [False, True]
    assert direct.make_room()
    assert not direct.make_room()
    assert is_closed(kept[1])


def test_out_of_room_an_answer_on_its_way_is_broken_off_last(direct, pairs):
    taking = pairs(direct, 9, since=0, is_kept=True, unsent=memoryview(b"x"))
    kept = pairs(direct, 9, since=1, is_kept=True)

    direct.make_room()
    assert [is_closed(client) for _, client in (taking, kept)] == [False, True]
    direct.make_room()
    assert is_closed(taking[1])


def test_what_clients_have_not_taken_of_their_answers_is_bounded_together(
    direct, pairs, monkeypatch
):
    monkeypatch.setattr(worker, "MAX_UNSENT", 10)
    first, second, idle = (pairs(direct, 9, unsent=memoryview(b"x" * n)) for n in (6, 6, 0))

    direct.murder_keepalived()

    assert [is_closed(client) for _, client in (first, second, idle)] == [False, True, False]


@pytest.mark.parametrize(("sent", "noted"), [(b"G", {"since": 0}), (b"", {})])
def test_one_that_has_asked_or_has_just_come_is_not_closed_to_make_room(direct, pairs, sent, noted):
    _, client = pairs(direct, 5, **noted)
    client.sendall(sent)

    assert not direct.make_room()
    assert not is_closed(client)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EPROTO])
def test_whatever_keeps_a_connection_from_being_accepted_passes(direct, pairs, number):
    class Listener:
        def accept(self) -> None:
            raise OSError(number, "no")

    _, client = pairs(direct, 5, since=0)
    direct.poller, direct.sockets = selectors.DefaultSelector(), []

    direct.accept(Listener())
    for _ in range(2):
        direct.accept(Listener())

    assert not direct._accepting
    direct.set_accept_enabled(True)
    assert not direct._accepting
    direct.accept_at = 0.0
    direct.set_accept_enabled(True)
    assert direct._accepting
    assert is_closed(client) == (number in (errno.EMFILE, errno.ENFILE))


def test_once_all_is_idle_memory_is_given_back(direct, pairs, monkeypatch):
    given: list[bool] = []
    monkeypatch.setattr(worker, "give_back_memory", lambda collect: given.append(collect))
    conn, _ = pairs(direct, 60)
    direct.idle, direct.is_untidy = {}, True  # it is being served

    direct.murder_keepalived()
    assert not given

    direct.park(conn)
    direct.look_at = 0.0
    for _ in range(2):
        direct.murder_keepalived()
        direct.look_at = 0.0
    assert given == [True]


def test_while_something_is_served_freed_memory_is_given_back_now_and_then(direct, monkeypatch):
    given: list[bool] = []
    monkeypatch.setattr(worker, "give_back_memory", lambda collect: given.append(collect))
    direct.open, direct.is_untidy, direct.trim_at = {object()}, True, time.monotonic()

    direct.murder_keepalived()
    direct.look_at, direct.is_untidy = 0.0, True
    direct.murder_keepalived()

    assert given == [False]  # without a look for garbage, which streams would wait for


def test_memory_is_given_back_with_all_that_only_knows_itself():
    class Circle:
        pass

    circle: Any = Circle()
    circle.itself, gone = circle, weakref.ref(circle)
    del circle

    worker.give_back_memory()

    assert gone() is None


@pytest.mark.parametrize("said", [b"", HEALTH[:20], CHUNKED[:-2]])
def test_silent_and_half_said_connections_keep_nobody_out(tmp_path, upstream, said):
    few = {"GUNICORN_CMD_ARGS": "--worker-connections 40"}
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="9", **few)
    silent = [connected(service) for _ in range(100)]
    try:
        [sock.sendall(said) for sock in silent]
        began = time.monotonic()

        assert service.get("/health").status_code == 200
        assert service.chat().status_code == 200
        assert time.monotonic() - began < 2
    finally:
        [sock.close() for sock in silent]
        service.stop()


def patient_routes(upstream: Upstream) -> dict[str, Any]:
    """With limits that a busy machine does not reach while a test holds an answer back."""
    limits = {"connect": 9, "first_token": 30, "idle": 30, "answer": 30, "total": 60}
    return small_routes(upstream.url, timeouts_sec=limits)


def test_past_the_most_connections_new_ones_wait_for_the_end_of_those_that_are_served(
    tmp_path, upstream
):
    few = {"GUNICORN_CMD_ARGS": "--worker-connections 10"}
    gate = threading.Event()
    upstream.default = pieces([chunk({"content": "first"}), gate.wait, *events(["second"])])
    service = Service(tmp_path, patient_routes(upstream), ROUTER_THREADS="18", **few)
    try:
        streams = [service.chat(stream=True).iter_content(None) for _ in range(10)]
        assert all(b"first" in next(stream) for stream in streams)
        with connected(service) as late:
            late.sendall(HEALTH)
            late.settimeout(0.6)
            with pytest.raises(TimeoutError):
                late.recv(1)
            gate.set()

            late.settimeout(5)
            assert answers(late, 1).startswith(b"HTTP/1.1 200")
        assert all(b"".join(stream).endswith(DONE) for stream in streams)
    finally:
        service.stop()


def test_without_a_descriptor_left_streams_go_on_and_others_wait(tmp_path, upstream):
    gate = threading.Event()
    upstream.default = pieces([chunk({"content": "first"}), gate.wait, *events(["second"])])
    service = Service(tmp_path, patient_routes(upstream))
    stream = service.chat(stream=True).iter_content(None)
    assert b"first" in next(stream)
    number = worker_of(service)
    most = max(map(int, os.listdir(f"/proc/{number}/fd"))) + 20
    resource.prlimit(number, resource.RLIMIT_NOFILE, (most, most))
    silent = [connected(service) for _ in range(50)]
    try:
        assert service.get("/health").status_code == 200
        gate.set()

        assert b"".join(stream).endswith(DONE)
        assert worker_of(service) == number
        assert service.log.read_text().count("event=accept_failed") == 1
    finally:
        [sock.close() for sock in silent]
        service.stop()


LIMITS = """import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
conf = runpy.run_path("gunicorn.conf.py")
print(*resource.getrlimit(resource.RLIMIT_NOFILE), conf["worker_connections"])"""


@pytest.mark.parametrize(
    ("soft", "hard", "threads", "wanted"),
    [
        (256, 4096, "64", (4096, 4096, 4096 - 292)),
        (1024, 1024, "64", (1024, 1024, 1024 - 292)),
        (1024, 1024, "1024", (1024, 1024, 2048)),
    ],
)
def test_descriptors_are_as_many_as_may_be_and_connections_follow(soft, hard, threads, wanted):
    found = subprocess.run(
        [sys.executable, "-c", LIMITS.format(soft=soft, hard=hard)],
        env={**os.environ, "ROUTER_THREADS": threads, "ROUTER_BIND": "127.0.0.1:0"},
        cwd=ROOT, capture_output=True, text=True, timeout=20,
    )  # fmt: skip

    assert tuple(map(int, found.stdout.split())) == wanted


def test_a_start_frees_what_it_has_made_from_garbage_collections():
    conf = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()

    conf["post_worker_init"](types.SimpleNamespace(cfg=types.SimpleNamespace(address=["/unix"])))

    frozen, seldom = gc.get_freeze_count(), gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    assert frozen > before
    assert seldom > thresholds


def test_a_worker_that_leaves_gives_idle_connections_two_seconds(direct, pairs):
    conn, client = pairs(direct, 60)
    direct.alive = False

    direct.murder_keepalived()

    assert not is_closed(client)
    assert conn.timeout <= time.monotonic() + worker.LINGER_S


def test_each_reading_of_the_settings_loads_the_worker_anew():
    first, second = (runpy.run_path(str(ROOT / "gunicorn.conf.py")) for _ in range(2))

    assert first["worker_class"] is not second["worker_class"]
    assert first["worker_class"].__name__ == "Direct"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of what the service needs, which services are started from."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "parts", folder / "parts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("router.py", "wsgi.py", "gunicorn.conf.py"):
        shutil.copy2(ROOT / name, folder)
    monkeypatch.setattr("service.ROOT", folder)
    return folder


EDITS = {  # part: what is replaced in it, by what, and a request whose answer shows it
    "settings": ('VERSION = "', 'VERSION = "new ', b"GET /health HTTP/1.1"),
    "errors": ("there is no such route", "this is a new route", b"GET /x HTTP/1.1"),
    "worker": ("the request is malformed", "a new kind of request", b"NONSENSE"),
}


def bytes_of(service: Service, data: bytes) -> bytes:
    with contextlib.closing(socket.create_connection(("127.0.0.1", service.port), 5)) as sock:
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_a_reload_takes_up_each_part_as_it_is_now(checkout, upstream):
    service = Service(checkout.parent, small_routes(upstream.url))
    more = b"\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        for part, (old, new, ask) in EDITS.items():
            path = checkout / f"parts/{part}.py"
            path.write_text(path.read_text().replace(old, new))
            assert b"new" not in bytes_of(service, ask + more)
        service.process.send_signal(signal.SIGHUP)

        for _, _, ask in EDITS.values():
            deadline = time.monotonic() + 15
            while b"new" not in bytes_of(service, ask + more):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        service.stop()


def test_the_master_keeps_no_module_of_ours():
    code = """import runpy, sys; runpy.run_path("gunicorn.conf.py")
print([name for name in sys.modules if name.partition(".")[0] in ("parts", "router", "wsgi")])"""

    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert (found.stdout, found.stderr) == ("[]\n", "")


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
        lambda sock: worker.Parser(cfg, TConn(cfg, sock, *ADDRESSES), BASE),
        lambda sock: RequestParser(cfg, sock, ("127.0.0.1", 1)),
    ):
        here, there = socket.socketpair()
        there.sendall(data)
        there.close()
        found.append(make(here))
    return found[0], found[1]


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /a?b HTTP/1.1\r\n"])
def test_a_connection_that_ends_while_it_waits_leaves_nothing_for_the_collector(sent):
    gc.disable()
    try:
        with pair_of_sockets() as (here, there):
            there.sendall(sent)
            parser = worker.Parser(Config(), TConn(Config(), here, *ADDRESSES), BASE)
            came = [parser.has_head(), parser.has_head()]
            left = weakref.ref(parser)
            del parser
    finally:
        gc.enable()

    assert (came, left()) == ([False, False], None)


def read_as_gunicorn(data: bytes) -> None:
    """Assert that a head is left to gunicorn, or read as gunicorn reads it."""
    ours, theirs = parsers(data)
    with contextlib.closing(ours.unreader.sock), contextlib.closing(theirs.unreader.sock):
        try:
            assert ours.has_head()
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
    assert ours.has_head()
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


BUGS = """from router import create_app
real = create_app()
bugs = {"/0": ZeroDivisionError(), "/1": OSError(28, "full"), "/2": SystemExit(3)}
def app(environ, start):
    if environ["PATH_INFO"] in bugs:
        raise bugs[environ["PATH_INFO"]]
    return real(environ, start)
"""


def test_a_bug_that_leaves_the_application_is_a_500_and_its_thread_lives(tmp_path, upstream):
    (tmp_path / "wsgi.py").write_text(BUGS)
    more = {"GUNICORN_CMD_ARGS": f"--pythonpath {tmp_path}"}
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="9", **more)
    try:
        found = [service.get(f"/{n % 2}") for n in range(20)]

        assert {reply.status_code for reply in found} == {500}
        assert {reply.json()["error"]["type"] for reply in found} == {"internal_error"}
        odd = b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n"
        assert {answer_to(service, odd).status for _ in range(10)} == {CLOSED}
        assert service.get("/health").status_code == 200
        assert "internal_error where=ZeroDivisionError@wsgi.py:" in service.log.read_text()
    finally:
        service.stop()


def test_a_client_that_does_not_say_goodbye_holds_no_thread(direct, pairs):
    conn, client = pairs(direct, 5)
    direct.idle.clear()

    direct.handle, direct.base = lambda conn: False, BASE
    client.sendall(HEALTH)
    direct.serve_one(conn)
    assert client.recv(1) == b""
    assert list(direct.idle.values()) == [conn]
    assert conn.timeout <= time.monotonic() + worker.GOODBYE_S

    client.sendall(HEALTH * 1000)  # nobody reads this
    direct.idle.clear()
    direct.serve_one(conn)
    assert direct.open == {conn}

    client.close()
    direct.idle.clear()
    direct.serve_one(conn)
    assert direct.open == set()


def test_a_client_that_sends_on_after_the_end_holds_no_thread(direct, pairs, monkeypatch):
    monkeypatch.setattr(worker, "AT_ONCE_S", 0.0)  # any time that passes is too long
    conn, client = pairs(direct, 5)
    conn.sock.setblocking(True)
    client.sendall(b"x" * 100_000)

    assert not worker.is_gone(conn)
    assert worker.has_unread(conn)


def answering(body: bytes) -> Callable[..., Any]:
    """An application whose every answer is `body`."""

    class Body(list[bytes]):
        def close(self) -> None:
            pass

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Body:
        start("200 OK", [("Content-Length", str(len(body)))])
        return Body([body])

    return app


@pytest.mark.parametrize(
    ("sent", "many"),
    [(HEALTH * 2, 2), (HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") * 2, 1)],
)
def test_a_client_that_takes_answers_slowly_gets_all_of_them_and_holds_no_thread(
    direct, pairs, sent, many
):
    conn, client = pairs(direct, 5)
    direct.wsgi, direct.base = answering(b"x" * 5_000_000 + b"end"), BASE
    client.sendall(sent)
    received, turns = b"", 0

    while received.count(b"end") < many:
        direct.serve_one(direct.idle.pop(conn.sock.fileno()))
        received += client.recv(1 << 20)
        turns += 1
    direct.serve_one(direct.idle.pop(conn.sock.fileno()))

    assert received.count(b"HTTP/1.1 200 OK") == many
    assert len(received) - many * 5_000_003 < 1000
    assert turns > 5
    assert conn.is_leaving == (many == 1)


def test_a_client_that_takes_nothing_of_an_answer_is_left_in_time(direct, pairs):
    conn, client = pairs(direct, 5)
    direct.wsgi, direct.base = answering(b"x" * 5_000_000), BASE
    client.sendall(HEALTH * 2)
    direct.serve_one(direct.idle.pop(conn.sock.fileno()))
    assert 0 < conn.timeout - time.monotonic() <= worker.SEND_S

    conn.timeout = 0.0
    direct.murder_keepalived()

    assert direct.open == set()


def test_a_client_that_takes_nothing_of_a_stream_is_left(direct, pairs, monkeypatch):
    monkeypatch.setattr(worker, "SEND_TIMEOUT", struct.pack("ll", 0, 50_000))
    conn, _ = pairs(direct, 5)
    request = worker.Ordinary(dict(REQUEST_METHOD="GET", PATH_INFO="/"), 0, False)
    response = worker.Response(request, conn.sock, direct.cfg)

    with pytest.raises(ConnectionResetError, match=f"Errno {errno.ECONNRESET}"):
        response.send(b"x" * 10_000_000)

    assert response.client_left


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
