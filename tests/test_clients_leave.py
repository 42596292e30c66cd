"""Clients that leave, on real sockets: the upstream is let go of in time, nobody is blamed."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import Service, calm
from helpers import (
    chat_bytes,
    close,
    connected,
    failures,
    figures,
    half_close,
    head_of,
    in_flight,
    in_turn,
    open_circuits,
    read_until,
    reset,
    wait_until,
    worker_of,
)  # fmt: skip
from service import PATIENT, small_routes
from upstream import (
    Peer,
    Request,
    Script,
    Upstream,
    answer_body,
    chunk,
    error,
    events,
    hang,
    pieces,
    plain,
    raw,
    stream,
)  # fmt: skip

SOON_S = 1.0  # promised: an upstream is closed this long after its client left
WORD = chunk({"content": "word "})
LEAVES = (close, reset, half_close)


def ask(service: Service, mode: str = "whole", **more: Any) -> socket.socket:
    """A client's socket with its chat request sent: for a stream, one that is held, or neither."""
    headers = ["X-Router-Stream: whole"] * (mode == "held")
    return connected(service, chat_bytes(*headers, stream=mode != "whole", **more))


def trickle(peer: Peer, request: Request) -> None:
    """A whole answer, a byte at a time."""
    peer.send(JSON_HEAD + b"Content-Length: 900\r\n\r\n")
    for _ in range(900):
        peer.send(b" ")
        time.sleep(0.02)


JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CLOSING = JSON_HEAD + b"Connection: close\r\n"
OLD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
FLOWING = pieces([WORD, 0.02] * 1000)
# what the client asks for and what the upstream does meanwhile
STATES: dict[str, tuple[str, Script]] = {
    "streamed, before the head": ("stream", hang),
    "streamed, before the first token": ("stream", pieces([b": x\n\n"], after="hang")),
    "streamed, in mid-silence": ("stream", pieces([WORD], after="hang")),
    "streamed, while tokens flow": ("stream", FLOWING),
    "held, in mid-silence": ("held", pieces([WORD], after="hang")),
    "held, while tokens flow": ("held", FLOWING),
    "held, while comments flow": ("held", pieces([b": x\n\n", 0.02] * 1000)),
    "whole, before the head": ("whole", hang),
    "whole, in mid-silence": ("whole", raw(JSON_HEAD + b"Content-Length: 900\r\n\r\n{", "hang")),
    "whole, while bytes trickle": ("whole", trickle),
    "whole, closing, in mid-silence":
        ("whole", raw(CLOSING + b"Content-Length: 900\r\n\r\n{", "hang")),
    "whole, without a length, in mid-silence": ("whole", raw(CLOSING + b"\r\n{", "hang")),
    "whole, a refusal that closes, in mid-silence":
        ("whole", raw(CLOSING.replace(b"200 OK", b"500 No") + b"\r\n{", "hang")),
    "streamed, HTTP/1.0, before the first token": ("stream", raw(OLD + b": x\n\n", "hang")),
    "streamed, HTTP/1.0, in mid-silence": ("stream", raw(OLD + WORD, "hang")),
}  # fmt: skip


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
    """Only the client can have ended what ends; one strike opens; one category goes over TLS."""
    small = small_routes(upstream.url)
    small["circuit_breaker"]["failure_threshold"] = 1
    small["upstreams"]["safe"] = {"base_url": tls_upstream.url, "api_key_env": "TEST_API_KEY"}
    small["models"]["acme/safe"] = {"upstream": "safe"}
    small["categories"]["safe"] = {"models": ["acme/safe"]}
    small["categories"]["alone"] = {"models": ["acme/one"]}
    return {**small, "timeouts_sec": PATIENT}


@pytest.fixture(scope="module")
def shared_patient(
    serve: Callable[..., Service], shared_upstream: Upstream, tls_upstream: Upstream,
    certificate: Path,
) -> Service:  # fmt: skip
    routes = patient_routes(shared_upstream, tls_upstream)
    return serve(**routes, ROUTER_THREADS="320", REQUESTS_CA_BUNDLE=str(certificate))


@pytest.fixture
def patient(shared_patient: Service, upstream: Upstream, tls_upstream: Upstream) -> Service:
    tls_upstream.reset()
    return calm(shared_patient)


def cancelled(service: Service) -> int:
    return figures(service)["requests"]["cancelled"]


def assert_left_well(service: Service, upstream: Upstream, left_at: float, before: int) -> None:
    """The upstream was let go of in time; booked as cancelled; nothing held; nobody blamed."""
    wait_until(lambda: upstream.left, SOON_S + 4)
    assert upstream.left[0] - left_at < SOON_S
    wait_until(lambda: in_flight(service) == 0)
    assert cancelled(service) == before + 1
    assert failures(service) == {}
    assert len(upstream.requests) == 1


# --- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "mode", "script"),
    [
        *in_turn(STATES, *[(leave, "router") for leave in LEAVES]),
        *in_turn(STATES, *[(leave, "router/safe") for leave in (half_close, close, reset)]),
    ],
)
def test_a_client_leaves(patient, upstream, tls_upstream, how, mode, script):
    leave, model = how
    server = upstream if model == "router" else tls_upstream
    server.default, before = script, cancelled(patient)
    client = ask(patient, mode, model=model)
    wait_until(lambda: server.requests)

    leave(client)

    assert_left_well(patient, server, time.monotonic(), before)
    client.close()


@pytest.mark.parametrize(
    ("script", "leave"), [(STATES["streamed, in mid-silence"][1], close), *[(FLOWING, leave) for
                          leave in LEAVES]]
)  # fmt: skip
def test_a_client_leaves_after_it_has_read_a_token(patient, upstream, script, leave):
    upstream.default, before = script, cancelled(patient)
    client = ask(patient, "stream")
    read_until(client, b"word")

    leave(client)

    assert_left_well(patient, upstream, time.monotonic(), before)
    client.close()


def test_a_client_that_stays_gets_its_answer_over_tls(patient, tls_upstream):
    tls_upstream.default = stream(["safe"])

    answer = patient.chat(stream=True, model="router/safe")

    assert b"safe" in answer.content
    assert answer.headers["X-Router-Model"] == "acme/safe"


def test_a_certificate_of_an_unknown_authority_is_refused_unless_it_is_named(
    build, upstream, tls_upstream
):
    tls_upstream.reset()
    client = build(**patient_routes(upstream, tls_upstream))

    answer = client.chat(model="router/safe")

    attempts = answer.json["error"]["attempts"]
    assert [(a["model"], a["outcome"]) for a in attempts] == [("acme/safe", "tls")]
    assert tls_upstream.requests == []


def test_a_client_leaves_in_the_pause_before_the_same_model_is_tried_again(patient, upstream):
    upstream.default = error(429, "slow down", Retry_After="2.4")
    before = cancelled(patient)
    client = ask(patient)
    wait_until(lambda: upstream.requests)

    client.close()

    wait_until(lambda: cancelled(patient) == before + 1, SOON_S)
    assert in_flight(patient) == 0
    assert failures(patient) == {}
    assert len(upstream.requests) == 1


def test_a_client_leaves_while_a_connect_is_under_way(serve_once):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        service = serve_once(
            upstreams={"local": {"base_url": url}}, timeouts_sec={**PATIENT, "connect": 0.8}
        )
        with socket.create_connection(full.getsockname()):
            client = ask(service)
            wait_until(lambda: in_flight(service) == 1)

            client.close()

            wait_until(lambda: in_flight(service) == 0, 3)
    assert cancelled(service) == 1
    assert failures(service) == {}


def category_said(name: str) -> bytes:
    return json.dumps({"message": {"content": json.dumps({"category": name})}}).encode()


def test_a_client_leaves_during_the_call_of_ollama(serve_once, upstream):
    ollama = Upstream()
    ollama.default = [plain(200, category_said("code")), hang]  # the first is the warm-up
    config = {"base_url": ollama.url.removesuffix("/v1"), "timeout_sec": 30}
    service = serve_once(routing_mode="ollama", ollama=config)
    wait_until(lambda: ollama.requests and in_flight(service) == 0)
    ollama.requests.clear()
    client = ask(service)
    wait_until(lambda: ollama.requests)

    client.close()
    left_at = time.monotonic()

    assert_left_well(service, ollama, left_at, 0)
    assert upstream.requests == []
    assert service.get("/health").json()["classifier"]["status"] != "failing"
    ollama.close()


SIZED, CHUNKED = "Content-Length: 5000", "Transfer-Encoding: chunked"
UPLOADS = {
    "before its body": (SIZED, b""),
    "in its body": (SIZED, b'{"model": "rou'),
    "before its chunks": (CHUNKED, b""),
    "in a chunk": (CHUNKED, b"e\r\n" + b'{"mod'),
}


@pytest.mark.parametrize(("leave", "size", "sent"), in_turn(UPLOADS, *LEAVES))
def test_an_upload_cut_short_is_a_client_that_left(patient, upstream, leave, size, sent):
    head = head_of("POST", "/v1/chat/completions", "Content-Type: application/json", size)
    before = cancelled(patient)

    with connected(patient, head + sent) as client:
        wait_until(lambda: in_flight(patient) == 1)
        leave(client)
        wait_until(lambda: in_flight(patient) == 0, SOON_S)

    assert figures(patient)["recent_requests"][0]["status"] == 499
    assert cancelled(patient) == before + 1
    assert upstream.requests == []


# --- what is given back --------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["streamed, before the head", "whole, in mid-silence"])
def test_a_probe_whose_client_left_is_free_for_the_next_request(patient, upstream, state):
    mode, silent = STATES[state]
    upstream.scripts["acme/one"] = [error(503), silent, stream(["back"])]
    patient.chat(model="router/alone")
    client = ask(patient, mode, model="router/alone")
    wait_until(lambda: len(upstream.requests) == 2)

    client.close()
    wait_until(lambda: in_flight(patient) == 0)
    still_open = open_circuits(patient)["acme/one"]["state"]
    answer = patient.chat(model="router/alone", stream=True)

    assert still_open == "open"
    assert b"back" in answer.content


def test_a_client_that_left_at_the_very_end_is_a_success(patient, upstream):
    upstream.default = stream(["word "])
    before = figures(patient)["requests"]
    client = ask(patient, "stream")
    read_until(client, b"[DONE]")

    client.close()

    wait_until(lambda: in_flight(patient) == 0)
    after = figures(patient)["requests"]
    assert (after["success"], after["cancelled"]) == (before["success"] + 1, before["cancelled"])


def test_the_connection_after_a_client_that_left_serves_the_next(patient, upstream):
    upstream.scripts["acme/one"] = [pieces([WORD], after="hang"), *[stream(["ok"])] * 20]
    client = ask(patient, "stream")
    read_until(client, b"word")

    client.close()
    wait_until(lambda: upstream.left, SOON_S)
    answers = [patient.chat(stream=True).content for _ in range(20)]

    assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
    assert upstream.models_asked() == ["acme/one"] * 21


def open_files(service: Service) -> int:
    """Open descriptors of gunicorn's one worker."""
    return len(list(Path(f"/proc/{worker_of(service)}/fd").iterdir()))


def test_three_hundred_clients_that_leave_leave_nothing_behind(patient, upstream):
    upstream.default = pieces([*events(["a "], None, usage=None, done=False)], after="hang")
    before, files, idle = cancelled(patient), open_files(patient), upstream.open_now
    clients = [ask(patient, ("whole", "stream")[n % 2]) for n in range(300)]
    wait_until(lambda: len(upstream.requests) == 300, 15)

    for client in clients:
        client.close()
    left_at = time.monotonic()

    wait_until(lambda: len(upstream.left) >= 300, 3)
    assert max(upstream.left) - left_at < SOON_S
    wait_until(lambda: in_flight(patient) == 0)
    assert cancelled(patient) == before + 300
    wait_until(lambda: upstream.open_now <= idle)
    wait_until(lambda: open_files(patient) <= files)
    assert failures(patient) == {}


def test_a_client_that_asked_twice_on_one_connection_may_leave_in_the_second(patient, upstream):
    upstream.scripts["acme/one"] = [plain(200, json.dumps(answer_body("first")).encode()), hang]
    before = cancelled(patient)
    client = ask(patient)
    read_until(client, b"first")
    client.sendall(chat_bytes(path="/chat/completions"))
    wait_until(lambda: len(upstream.requests) == 2)

    client.close()
    left_at = time.monotonic()

    wait_until(lambda: upstream.left)
    assert upstream.left[0] - left_at < SOON_S
    wait_until(lambda: cancelled(patient) == before + 1)
