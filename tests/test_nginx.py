"""deploy/nginx.conf in Debian's real nginx, before a real gunicorn and a scripted upstream."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, Service, free_port
from helpers import (
    CHAT,
    Reply,
    answer_to,
    can_connect,
    chat_bytes,
    connected,
    head_of,
    in_turn,
    kill_all,
    read_reply,
    user,
    wait_until,
)  # fmt: skip
from service import PATIENT
from upstream import Upstream, chunk, events, hang, pieces

pytestmark = pytest.mark.debian("nginx")

SITE = (ROOT / "deploy" / "nginx.conf").read_text()
MAIN = """
{user}worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/log.txt;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""
CARELESS = "server { listen 80; location / { proxy_pass http://127.0.0.1:3456; } }"
HELLO = {"model": "router", "messages": [user("hello")]}
POETRY = b'{"name": "poetry", "models": ["acme/one"], "keywords": ["ode"], "description": "x"}'
TYPED = "Content-Type: application/json"


class Nginx:
    """A real nginx in a folder of its own, with `site` before the router on `router_port`."""

    def __init__(self, folder: Path, router_port: int, site: str = SITE):
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        user = "user root;\n" if os.geteuid() == 0 else ""  # the folder is closed to www-data
        site = site.replace("127.0.0.1:3456", f"127.0.0.1:{router_port}")  # our port may be 34567
        (folder / "site.conf").write_text(
            site.replace("listen 80;", f"listen 127.0.0.1:{self.port};")
        )
        (folder / "nginx.conf").write_text(MAIN.format(folder=folder, user=user))
        command = ["nginx", "-p", folder, "-c", "nginx.conf", "-e", folder / "log.txt"]
        self.process = subprocess.Popen([*command, "-g", "daemon off;"])
        try:
            wait_until(lambda: can_connect(self.port))
        except AssertionError:
            self.stop()
            raise

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def ask(self, method: str, path: str, *headers: str, body: bytes = b"") -> Reply:
        """The answer to a request that is sent as it is."""
        return answer_to(self, head_of(method, path, *headers, "Connection: close", body=body))

    def chat(self, **more: Any) -> requests.Response:
        body = {**HELLO, **more}
        return requests.post(self.base + CHAT, json=body, timeout=30, stream=bool(more))


@pytest.fixture(scope="module")
def router(serve: Callable[..., Service]) -> Service:
    return serve(timeouts_sec=PATIENT)


@pytest.fixture(scope="module")
def shared_nginx(router: Service, tmp_path_factory) -> Iterator[Nginx]:
    server = Nginx(tmp_path_factory.mktemp("nginx"), router.port)
    yield server
    server.stop()


@pytest.fixture
def nginx(shared_nginx: Nginx, upstream: Upstream) -> Nginx:
    return shared_nginx


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """Starts an nginx for one test."""
    started: list[Nginx] = []

    def start(*args: Any) -> Nginx:
        started.append(Nginx(tmp_path, *args))
        return started[-1]

    yield start
    for server in started:
        server.stop()


# --- streams -------------------------------------------------------------------------------------


def test_each_event_arrives_before_the_next_one_is_sent(nginx, upstream):
    gates = [threading.Event() for _ in range(5)]
    parts = [
        part for n, gate in enumerate(gates) for part in (chunk({"content": f"word{n}"}), gate.wait)
    ]
    upstream.default = pieces([*parts, *events(["last"])])

    lines = nginx.chat(stream=True).iter_lines(chunk_size=1)
    seen = []
    for gate in gates:
        seen.append(next(line for line in lines if line))
        gate.set()

    assert [f"word{n}" in line.decode() for n, line in enumerate(seen)] == [True] * 5
    assert b"".join(lines).endswith(b"data: [DONE]")


@pytest.mark.parametrize(
    ("script", "streams"),
    [(hang, False), (hang, True), (pieces([chunk({"content": "word"})], after="hang"), True)],
)
def test_a_silent_upstream_is_freed_when_the_client_leaves(nginx, upstream, script, streams):
    upstream.default = script
    client = connected(nginx, chat_bytes(stream=streams))
    wait_until(lambda: upstream.requests)
    assert script is hang or client.recv(65536)

    client.close()

    assert wait_until(lambda: upstream.left) < 1.0


def test_connections_to_gunicorn_are_kept(router, nginx):
    for _ in range(20):
        nginx.chat()
    with Path("/proc/net/tcp").open() as table:
        wanted = f"0100007F:{router.port:04X}"
        states = [line.split()[3] for line in table if line.split()[2] == wanted]

    assert "01" in states  # established
    assert states.count("06") < 5  # TIME_WAIT: connections that were closed


# --- slow, large and many -----------------------------------------------------------------------


def test_120_slow_clients_leave_health_quick(nginx):
    head = b"GET / HTTP/1.1\r\nHost: loc"
    body = head_of("POST", CHAT, TYPED, "Content-Length: 5000") + b'{"model"'
    slow = [connected(nginx, data) for data in [head, body] * 60]
    took_ms = []
    for _ in range(21):
        health = requests.get(nginx.base + "/health", timeout=5)
        assert health.status_code == 200
        took_ms.append(health.elapsed.total_seconds() * 1000)
    answered = nginx.chat().status_code
    for sock in slow:
        sock.close()

    assert statistics.median(took_ms) < 100
    assert answered == 200


PART = b"100000\r\n" + b" " * 2**20 + b"\r\n"


@pytest.mark.parametrize(
    ("size", "body"),
    [(f"Content-Length: {16 * 2**20 + 1}", b""), ("Transfer-Encoding: chunked", PART * 17)],
    ids=["told", "in chunks"],
)
def test_a_body_over_16_mb_is_a_json_413(nginx, size, body):
    reply = answer_to(nginx, head_of("POST", CHAT, TYPED, size, "Connection: close") + body)

    assert reply.status == 413
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("path", ["/v1/messages?beta=true", "/v1/messages/count_tokens"])
def test_clients_of_messages_are_refused_in_their_own_envelope(nginx, path):
    size = f"Content-Length: {16 * 2**20 + 1}"
    reply = answer_to(nginx, head_of("POST", path, TYPED, size, "Connection: close"))

    assert reply.status == 413
    assert reply.json["type"] == "error"
    assert reply.json["error"]["type"] == "request_too_large"


def test_a_body_just_under_16_mb_reaches_the_model(nginx, upstream):
    text = "a" * (16 * 2**20 - 200)

    answer = nginx.chat(messages=[user(text)])

    assert answer.status_code == 200
    assert len(upstream.requests[-1].raw) > 16 * 2**20 - 200


def test_too_many_requests_are_a_json_429_but_health_answers(router, start):
    nginx = start(router.port)
    ahead = head_of("GET", "/v1/models") * 400  # quicker than any limit, on a busy machine too
    with connected(nginx, ahead) as sock, sock.makefile("rb") as file:
        replies = [read_reply(file) for _ in range(400)]
    health = requests.get(nginx.base + "/health", timeout=5)
    refused = [reply for reply in replies if reply.status != 200]

    assert {reply.status for reply in refused} == {429}
    assert replies.index(refused[0]) >= 200
    assert refused[0].headers["retry-after"] == "2"
    assert refused[0].json["error"]["message"]
    assert health.status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_nginx_refuses_is_json_too(nginx, data):
    reply = answer_to(nginx, data)

    assert reply.status in (400, 414)
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["error"]["message"]


# --- a router that is away -----------------------------------------------------------------------


def test_a_killed_router_is_a_json_503(serve_once, start):
    service = serve_once()
    nginx = start(service.port)
    assert nginx.chat().status_code == 200
    kill_all(service)

    for _ in range(2):
        answer = nginx.chat()

        assert answer.status_code == 503
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Retry-After"] == "5"
        assert answer.json()["error"]["code"] == "router_down"


def test_the_503_of_the_router_itself_passes_as_it_is(serve_once, start):
    answer = start(serve_once(TEST_API_KEY="").port).chat()

    assert answer.status_code == 503
    assert "TEST_API_KEY" in answer.json()["error"]["message"]


def test_a_reload_fails_no_request(router, nginx):
    done, statuses = threading.Event(), []

    def client(_: int) -> None:
        with requests.Session() as session:
            while not done.wait(0.02):
                answer = session.post(nginx.base + CHAT, json=HELLO, timeout=10)
                statuses.append(answer.status_code)

    with ThreadPoolExecutor(2) as pool:
        clients = pool.map(client, range(2))
        try:
            wait_until(lambda: len(statuses) > 20)
            router.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "event=stop" in router.log.read_text(), 10)
            before = len(statuses)
            wait_until(lambda: len(statuses) > before + 20)
        finally:
            done.set()
        list(clients)

    assert set(statuses) == {200}


# --- doors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models/acme/one", "/v1/models/acme%2Fone"])
def test_ids_with_slashes_survive(nginx, path):
    reply = nginx.ask("GET", path)

    assert reply.status == 200
    assert reply.json["id"] == "acme/one"


@pytest.mark.parametrize(("host", "status"), [("localhost", 200), ("router.example.com:8443", 403)])
def test_the_host_name_is_passed_on(nginx, host, status):
    answer = requests.get(nginx.base + "/v1/models", headers={"Host": host}, timeout=5)

    assert answer.status_code == status
    assert status == 200 or "'router.example.com'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/config/category"), ("POST", "/config/model-mapping"),
     ("DELETE", "/config/category/code"), ("POST", "/circuit-breaker/reset-all"),
     ("POST", "/circuit-breaker/reset/acme/one"), ("POST", "/circuit-breaker/reset/acme%2Fone"),
     ("POST", "//config/category"), ("POST", "/%63onfig/category"), ("POST", "/config%2Fcategory"),
     ("POST", "/./config/category"), ("POST", "/v1/../config/category"),
     ("POST", "http://localhost/config/category")],
)  # fmt: skip
def test_admin_routes_are_closed(nginx, method, path):
    reply = nginx.ask(method, path, body=POETRY)

    assert reply.status == 403
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["error"]["code"] == "only_local"


SPOOFS = {
    "X-Forwarded-For": ["X-Forwarded-For: 127.0.0.1"],
    "X-Real-IP": ["X-Real-IP: 127.0.0.1"],
    "Forwarded": ["Forwarded: for=127.0.0.1;host=localhost"],
    "Connection": ["Connection: X-Forwarded-For, X-Real-IP, X-Forwarded-Proto"],
    "SCRIPT_NAME": ["SCRIPT_NAME: /x"],
    "PATH_INFO": ["PATH_INFO: /config/category"],
    "X-Original-URL": ["X-Original-URL: /config/category"],
    "X-Forwarded-Prefix": ["X-Forwarded-Prefix: /x", "X-Forwarded-Host: localhost"],
    "X-HTTP-Method-Override": ["X-HTTP-Method-Override: POST"],
}
OTHERWISE = ("/x/config/category", "/config#/../category")


@pytest.mark.parametrize(
    ("path", "headers"), [*in_turn(SPOOFS, "/config/category"), *in_turn(SPOOFS, *OTHERWISE)]
)
def test_no_header_of_a_client_opens_a_change(router, nginx, headers, path):
    reply = nginx.ask("POST", path, *headers, body=POETRY)

    assert reply.status in (400, 403, 404, 405)
    assert "poetry" not in router.routes.read_text()


@pytest.fixture(scope="module")
def forgetful(router: Service, tmp_path_factory) -> Iterator[Nginx]:
    open_site = SITE.replace("location ^~ /config/", "location ^~ /forgotten/")
    server = Nginx(tmp_path_factory.mktemp("forgetful"), router.port, open_site)
    yield server
    server.stop()


@pytest.mark.parametrize("headers", SPOOFS.values(), ids=SPOOFS)
def test_the_router_itself_refuses_when_nginx_forgets_to(router, forgetful, headers):
    reply = forgetful.ask("POST", "/config/category", *headers, body=POETRY)

    assert reply.status == 403
    assert "by no proxy" in reply.json["error"]["message"]
    assert "poetry" not in router.routes.read_text()


def test_what_a_client_says_about_its_address_is_replaced(start):
    seen: list[bytes] = []
    echo = socket.create_server(("127.0.0.1", 0))

    def answer_one() -> None:
        sock, _ = echo.accept()
        with sock:
            seen.append(sock.recv(65536))
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=answer_one)
    thread.start()
    nginx = start(echo.getsockname()[1])
    nginx.ask("GET", "/a%2Fb//c?d=%2F", "X-Forwarded-For: 6.6.6.6", "X-Real-IP: 6.6.6.6",
              "Forwarded: for=6.6.6.6", "Authorization: Bearer mine")  # fmt: skip
    thread.join(10)
    echo.close()

    assert seen[0].startswith(b"GET /a%2Fb//c?d=%2F HTTP/1.1\r\nHost: localhost\r\n")
    assert b"X-Forwarded-For: 127.0.0.1\r\n" in seen[0]
    assert b"Authorization: Bearer mine\r\n" in seen[0]
    assert b"6.6.6.6" not in seen[0]
    assert b"Connection" not in seen[0]


@pytest.mark.parametrize("headers", [[], ["X-Forwarded-For: 127.0.0.1"], ["X-Real-IP: ::1"]])
def test_a_careless_proxy_opens_no_change(router, start, headers):
    nginx = start(router.port, CARELESS)

    reply = nginx.ask("POST", "/config/category", *headers, body=POETRY)

    assert reply.status == 403
    assert reply.json["error"]["code"] == "only_local"
    assert "poetry" not in router.routes.read_text()


def test_the_pages_of_errors_are_no_pages(nginx):
    assert nginx.ask("GET", "/llm-router-error/503").status == 404
