"""Clients that leave, on real sockets: the upstream is let go of in time, nobody is blamed."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import LocalClient, Service, settings_for, small_routes
from upstream import (
    Peer,
    Request,
    Upstream,
    answer_body,
    chunk,
    error,
    events,
    hang,
    pieces,
    plain,
    stream,
)  # fmt: skip

import router as module

SOON_S = 1.0  # promised: an upstream is closed this long after its client left
WORD = chunk({"content": "word "})
WHOLE = "X-Router-Stream: whole\r\n"


def wait_until(is_so: Callable[[], Any], seconds: float = 5.0) -> None:
    """Return as soon as `is_so()`; fail when it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


# --- clients, and how they leave -----------------------------------------------------------------


def close(sock: socket.socket) -> None:
    sock.close()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def ask(service: Service, headers: str = "", **more: Any) -> socket.socket:
    """A client's socket with its chat request sent and nothing read."""
    body = {"model": "router", "messages": [{"role": "user", "content": "hello"}], **more}
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n{headers}\r\n"
    sock = socket.create_connection(("127.0.0.1", service.port), timeout=10)
    sock.sendall(head.encode() + data)
    return sock


def read_until(sock: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        data += sock.recv(65536)
    return data


# --- upstreams that notice -----------------------------------------------------------------------


def endless(pause_s: float, part: bytes = WORD) -> Callable[[Peer, Request], str]:
    """A stream that never ends by itself; it says `left` when it cannot send any more."""

    def script(peer: Peer, request: Request) -> str:
        try:
            pieces([part, pause_s] * 1000)(peer, request)
        except OSError:
            return "left"
        return ""

    return script


def trickle(peer: Peer, request: Request) -> str:
    """A whole answer, a byte at a time."""
    peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n")
    try:
        for _ in range(900):
            peer.send(b" ")
            time.sleep(0.02)
    except OSError:
        return "left"
    return ""


HALF_JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"


def half_an_answer(peer: Peer, request: Request) -> Any:
    """The head and one byte of a whole answer, then silence."""
    peer.send(HALF_JSON)
    return "left" if peer.wait_left(30) else False


SILENT_AFTER_A_WORD = pieces([WORD], after="hang")
SILENT_AFTER_A_COMMENT = pieces([b": PROCESSING\n\n"], after="hang")
CLOSING = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
OLD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def then_silence(data: bytes) -> Callable[[Peer, Request], Any]:
    """Some bytes, then nothing."""

    def script(peer: Peer, request: Request) -> Any:
        peer.send(data)
        return "left" if peer.wait_left(30) else False

    return script


# name: what the upstream does, what the client asks for
STATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "streamed, before the head": (hang, {"stream": True}),
    "streamed, before the first token": (SILENT_AFTER_A_COMMENT, {"stream": True}),
    "streamed, in mid-silence": (SILENT_AFTER_A_WORD, {"stream": True}),
    "streamed, while tokens flow": (endless(0.02), {"stream": True}),
    "held, in mid-silence": (SILENT_AFTER_A_WORD, {"stream": True, "headers": WHOLE}),
    "held, while tokens flow": (endless(0.02), {"stream": True, "headers": WHOLE}),
    "held, while comments flow": (endless(0.02, b": x\n\n"), {"stream": True, "headers": WHOLE}),
    "whole, before the head": (hang, {}),
    "whole, in mid-silence": (half_an_answer, {}),
    "whole, while bytes trickle": (trickle, {}),
    "whole, closing, in mid-silence": (
        then_silence(CLOSING + b"Content-Length: 900\r\n\r\n{"),
        {},
    ),
    "whole, without a length, in mid-silence": (then_silence(CLOSING + b"\r\n{"), {}),
    "whole, a refusal that closes, in mid-silence": (
        then_silence(CLOSING.replace(b"200 OK", b"500 No") + b"\r\n{"),
        {},
    ),
    "streamed, HTTP/1.0, before the first token": (
        then_silence(OLD + b": x\n\n"),
        {"stream": True},
    ),
    "streamed, HTTP/1.0, in mid-silence": (then_silence(OLD + WORD), {"stream": True}),
}


# --- a certificate, a service --------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate for 127.0.0.1, and the authority that signed it, in one file."""
    both = tmp_path_factory.mktemp("tls") / "both.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    pems = [issued.private_key_pem, *issued.cert_chain_pems, authority.cert_pem]
    both.write_bytes(b"".join(pem.bytes() for pem in pems))
    return both


@pytest.fixture(scope="module")
def tls_upstream(certificate: Path) -> Iterator[Upstream]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Upstream(context)
    yield server
    server.close()


def patient_routes(upstream: Upstream, tls_upstream: Upstream) -> dict[str, Any]:
    """Limits so long that only the client can have ended what ends; and one category over TLS."""
    routes = small_routes(upstream.url)
    routes["timeouts_sec"] = {
        "connect": 2, "first_token": 60, "idle": 60, "answer": 60, "total": 90,
    }  # fmt: skip
    routes["circuit_breaker"]["failure_threshold"] = 1
    routes["upstreams"]["safe"] = {"base_url": tls_upstream.url, "api_key_env": "TEST_API_KEY"}
    routes["models"]["acme/safe"] = {"upstream": "safe"}
    routes["categories"]["safe"] = {"models": ["acme/safe"]}
    routes["categories"]["alone"] = {"models": ["acme/one"]}
    return routes


@pytest.fixture(scope="module")
def shared_patient(
    shared_upstream: Upstream,
    tls_upstream: Upstream,
    certificate: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    service = Service(
        tmp_path_factory.mktemp("patient"),
        patient_routes(shared_upstream, tls_upstream),
        ROUTER_THREADS="320",
        REQUESTS_CA_BUNDLE=str(certificate),
    )
    yield service
    service.stop()


@pytest.fixture
def patient(shared_patient: Service, upstream: Upstream, tls_upstream: Upstream) -> Service:
    tls_upstream.reset()
    shared_patient.post("/circuit-breaker/reset-all")
    return shared_patient


def figures(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = service.get("/metrics").json()
    return found


def cancelled(service: Service) -> int:
    return int(figures(service)["requests"]["cancelled"])


def assert_left_well(service: Service, upstream: Upstream, left_at: float, before: int) -> None:
    """The upstream was let go of in time; booked as cancelled; nothing held; nobody blamed."""
    wait_until(lambda: upstream.left, SOON_S + 4)
    assert upstream.left[0] - left_at < SOON_S
    wait_until(lambda: figures(service)["in_flight"] == 0)
    assert cancelled(service) == before + 1
    assert figures(service)["circuit_breaker"]["failures"] == {}
    assert len(upstream.requests) == 1


# --- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [close, reset, half_close])
@pytest.mark.parametrize("state", STATES)
def test_a_client_leaves(patient, upstream, state, leave):
    upstream.default, more = STATES[state]
    before = cancelled(patient)
    client = ask(patient, **more)
    wait_until(lambda: upstream.requests)

    leave(client)

    assert_left_well(patient, upstream, time.monotonic(), before)
    client.close()


@pytest.mark.parametrize("state", ["streamed, in mid-silence", "streamed, while tokens flow"])
@pytest.mark.parametrize("leave", [close, reset, half_close])
def test_a_client_leaves_after_it_has_read_a_token(patient, upstream, state, leave):
    upstream.default, more = STATES[state]
    before = cancelled(patient)
    client = ask(patient, **more)
    read_until(client, b"word")

    leave(client)

    assert_left_well(patient, upstream, time.monotonic(), before)
    client.close()


@pytest.mark.parametrize("state", STATES)
def test_a_client_leaves_over_tls_too(patient, tls_upstream, state):
    tls_upstream.default, more = STATES[state]
    before = cancelled(patient)
    client = ask(patient, **{**more, "model": "router/safe"})
    wait_until(lambda: tls_upstream.requests)

    client.close()

    assert_left_well(patient, tls_upstream, time.monotonic(), before)


def test_a_client_that_stays_gets_its_answer_over_tls(patient, tls_upstream):
    tls_upstream.default = stream(["safe"])

    answer = patient.chat(stream=True, model="router/safe")

    assert b"safe" in answer.content
    assert answer.headers["X-Router-Model"] == "acme/safe"


def test_a_certificate_of_an_unknown_authority_is_refused_unless_it_is_named(
    upstream, tls_upstream, certificate, tmp_path
):
    tls_upstream.reset()
    path = tmp_path / "routes.json"
    path.write_text(json.dumps(patient_routes(upstream, tls_upstream)))
    client = LocalClient(module.create_app(settings_for(path)))

    answer = client.chat(model="router/safe")

    attempts = answer.json["error"]["attempts"]
    assert [(a["model"], a["outcome"]) for a in attempts] == [("acme/safe", "tls")]
    assert tls_upstream.requests == []


@pytest.mark.parametrize("wait_s", ["2", "2.4"])
def test_a_client_leaves_in_the_pause_before_the_same_model_is_tried_again(
    patient, upstream, wait_s
):
    upstream.default = error(429, "slow down", Retry_After=wait_s)
    before = cancelled(patient)
    client = ask(patient)
    wait_until(lambda: upstream.requests)

    client.close()

    wait_until(lambda: cancelled(patient) == before + 1, SOON_S)
    assert figures(patient)["in_flight"] == 0
    assert figures(patient)["circuit_breaker"]["failures"] == {}
    assert len(upstream.requests) == 1


def test_a_client_leaves_while_a_connect_is_under_way(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        filler = socket.create_connection(full.getsockname())
        routes = small_routes(f"http://127.0.0.1:{full.getsockname()[1]}/v1")
        routes["timeouts_sec"].update(connect=0.8, answer=30, total=60)
        service = Service(tmp_path, routes)
        client = ask(service)
        wait_until(lambda: figures(service)["in_flight"] == 1)

        client.close()

        wait_until(lambda: figures(service)["in_flight"] == 0, 3)
        assert cancelled(service) == 1
        assert figures(service)["circuit_breaker"]["failures"] == {}
        service.stop()
        filler.close()


def category_said(name: str) -> bytes:
    return json.dumps({"message": {"content": json.dumps({"category": name})}}).encode()


def test_a_client_leaves_during_the_call_of_ollama(upstream, tmp_path):
    ollama = Upstream()
    ollama.default = [plain(200, category_said("code")), hang]  # the first is the warm-up
    routes = small_routes(upstream.url, routing_mode="ollama")
    routes["ollama"] = {"base_url": ollama.url.removesuffix("/v1"), "timeout_sec": 30}
    service = Service(tmp_path, routes)
    wait_until(lambda: ollama.requests and figures(service)["in_flight"] == 0)
    client = ask(service)
    wait_until(lambda: len(ollama.requests) == 2)

    client.close()
    left_at = time.monotonic()

    wait_until(lambda: ollama.left, SOON_S + 4)
    assert ollama.left[0] - left_at < SOON_S
    wait_until(lambda: figures(service)["in_flight"] == 0)
    assert cancelled(service) == 1
    assert upstream.requests == []
    assert service.get("/health").json()["classifier"]["status"] != "failing"
    service.stop()
    ollama.close()


SIZED, CHUNKED = b"Content-Length: 5000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "sent", [SIZED, SIZED + b'{"model": "rou', CHUNKED, CHUNKED + b"e\r\n" + b'{"mod']
)
@pytest.mark.parametrize("leave", [close, reset, half_close])
def test_an_upload_cut_short_is_a_client_that_left(patient, upstream, sent, leave):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    before = cancelled(patient)

    with socket.create_connection(("127.0.0.1", patient.port), timeout=10) as client:
        client.sendall(head + b"Content-Type: application/json\r\n" + sent)
        wait_until(lambda: figures(patient)["in_flight"] == 1)
        leave(client)
        wait_until(lambda: figures(patient)["in_flight"] == 0, SOON_S)

    assert figures(patient)["recent_requests"][0]["status"] == 499
    assert cancelled(patient) == before + 1
    assert upstream.requests == []


# --- what is given back --------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["streamed, before the head", "whole, in mid-silence"])
def test_a_probe_whose_client_left_is_free_for_the_next_request(patient, upstream, state):
    silent, more = STATES[state]
    upstream.scripts["acme/one"] = [error(503), silent, stream(["back"])]
    patient.chat(model="router/alone")
    client = ask(patient, **{**more, "model": "router/alone"})
    wait_until(lambda: len(upstream.requests) == 2)

    client.close()
    wait_until(lambda: figures(patient)["in_flight"] == 0)
    still_open = figures(patient)["circuit_breaker"]["open_circuits"]["acme/one"]["state"]
    answer = patient.chat(model="router/alone", stream=True)

    assert still_open == "open"
    assert b"back" in answer.content


def test_a_probe_is_taken_only_while_its_client_waits(patient, upstream):
    upstream.scripts["acme/one"] = [error(503), hang]
    patient.chat(model="router/alone")
    client = ask(patient, model="router/alone")
    wait_until(lambda: len(upstream.requests) == 2)

    meanwhile = patient.chat(model="router/alone")

    assert meanwhile.status_code == 503
    assert 0 < int(meanwhile.headers["Retry-After"]) <= 30
    client.close()
    wait_until(lambda: figures(patient)["in_flight"] == 0)


def test_a_client_that_left_at_the_very_end_is_a_success(patient, upstream):
    upstream.default = stream(["word "])
    before = figures(patient)["requests"]
    client = ask(patient, stream=True)
    read_until(client, b"[DONE]")

    client.close()

    wait_until(lambda: figures(patient)["in_flight"] == 0)
    after = figures(patient)["requests"]
    assert (after["success"], after["cancelled"]) == (before["success"] + 1, before["cancelled"])


def test_the_connection_after_a_client_that_left_serves_the_next(patient, upstream):
    upstream.scripts["acme/one"] = [pieces([WORD], after="hang"), *[stream(["ok"])] * 20]
    client = ask(patient, stream=True)
    read_until(client, b"word")

    client.close()
    wait_until(lambda: upstream.left, SOON_S)
    answers = [patient.chat(stream=True).content for _ in range(20)]

    assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
    assert upstream.models_asked() == ["acme/one"] * 21


def open_files(service: Service) -> int:
    """Open descriptors of gunicorn's one worker."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    worker = children.read_text().split()[-1]
    return len(list(Path(f"/proc/{worker}/fd").iterdir()))


def test_three_hundred_clients_that_leave_leave_nothing_behind(patient, upstream):
    upstream.default = pieces([*events(["a "], None, usage=None, done=False)], after="hang")
    before, files, idle = cancelled(patient), open_files(patient), upstream.open_now
    clients = [ask(patient, stream=bool(n % 2)) for n in range(300)]
    wait_until(lambda: len(upstream.requests) == 300, 15)

    for client in clients:
        client.close()
    left_at = time.monotonic()

    wait_until(lambda: len(upstream.left) >= 300, 3), upstream.left
    assert max(upstream.left) - left_at < SOON_S
    wait_until(lambda: figures(patient)["in_flight"] == 0)
    assert cancelled(patient) == before + 300
    wait_until(lambda: upstream.open_now <= idle)
    wait_until(lambda: open_files(patient) <= files)
    assert figures(patient)["circuit_breaker"]["failures"] == {}


def test_a_client_that_asked_twice_on_one_connection_may_leave_in_the_second(patient, upstream):
    upstream.scripts["acme/one"] = [plain(200, json.dumps(answer_body("first")).encode()), hang]
    before = cancelled(patient)
    client = ask(patient)
    read_until(client, b"first")
    request = json.dumps({"model": "router", "messages": [{"role": "user", "content": "x"}]})
    head = f"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request)}"
    client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{request}".encode())
    wait_until(lambda: len(upstream.requests) == 2)

    client.close()
    left_at = time.monotonic()

    wait_until(lambda: upstream.left)
    assert upstream.left[0] - left_at < SOON_S
    wait_until(lambda: cancelled(patient) == before + 1)
