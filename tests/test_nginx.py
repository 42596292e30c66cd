"""deploy/nginx.conf in Debian's real nginx, before a real gunicorn and a scripted upstream."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, Service, free_port, small_routes
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
CHAT = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}
POETRY = {"name": "poetry", "models": ["acme/one"], "keywords": ["ode"], "description": "x"}


class Nginx:
    """A real nginx in a folder of its own, with `site` before the router on `router_port`."""

    def __init__(self, folder: Path, router_port: int, site: str = SITE):
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        user = "user root;\n" if os.geteuid() == 0 else ""  # the folder is closed to www-data
        site = site.replace("listen 80;", f"listen 127.0.0.1:{self.port};")
        (folder / "site.conf").write_text(
            site.replace("127.0.0.1:3456", f"127.0.0.1:{router_port}")
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

    def connect(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        sock.sendall(data)
        return sock

    def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to these bytes."""
        with self.connect(data) as sock:
            return read_answer(sock)

    def chat(self, **more: Any) -> requests.Response:
        url = self.base + "/v1/chat/completions"
        return requests.post(url, json={**CHAT, **more}, timeout=30, stream=bool(more))


def wait_until(is_so: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += sock.recv(65536)
    return int(first.split(" ")[1]), headers, body


def head_of(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    """The bytes of a request, sent as they are: no library tidies the path or the headers."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def patient_routes(upstream: Upstream) -> dict[str, Any]:
    """Limits so long that only the client's leaving can end a call."""
    limits = {"connect": 2, "first_token": 20, "idle": 20, "answer": 20, "total": 30}
    return small_routes(upstream.url, timeouts_sec=limits)


@pytest.fixture(scope="module")
def router(shared_upstream: Upstream, tmp_path_factory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("router"), patient_routes(shared_upstream))
    yield service
    service.stop()


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


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_a_hung_upstream_is_freed_when_the_client_leaves(nginx, upstream, more):
    upstream.default = hang
    body = json.dumps({**CHAT, **more}).encode()
    client = nginx.connect(head_of("POST", "/v1/chat/completions", body=body))
    wait_until(lambda: upstream.requests)

    left_at = time.monotonic()
    client.close()
    wait_until(lambda: upstream.left)

    assert upstream.left[0] - left_at < 1.0


def test_a_stream_is_freed_when_the_client_leaves_in_its_middle(nginx, upstream):
    upstream.default = pieces([chunk({"content": "word"})], after="hang")
    body = json.dumps({**CHAT, "stream": True}).encode()
    client = nginx.connect(head_of("POST", "/v1/chat/completions", body=body))
    assert client.recv(65536)

    left_at = time.monotonic()
    client.close()
    wait_until(lambda: upstream.left)

    assert upstream.left[0] - left_at < 1.0


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
    body = head_of("POST", "/v1/chat/completions", "Content-Type: application/json",
                   "Content-Length: 5000") + b'{"model"'  # fmt: skip
    slow = [nginx.connect(data) for data in [head, body] * 60]
    took_ms = []
    for _ in range(21):
        began = time.monotonic()
        assert requests.get(nginx.base + "/health", timeout=5).status_code == 200
        took_ms.append((time.monotonic() - began) * 1000)
    answered = nginx.chat().status_code
    for sock in slow:
        sock.close()

    assert statistics.median(took_ms) < 100
    assert answered == 200


def test_a_body_over_16_mb_is_a_json_413(nginx):
    data = head_of("POST", "/v1/chat/completions", "Content-Type: application/json",
                   f"Content-Length: {16 * 2**20 + 1}")  # fmt: skip

    status, headers, body = nginx.ask(data)

    assert status == 413
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["code"] == "request_too_large"


def test_a_chunked_body_over_16_mb_is_a_413_too(nginx):
    part = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    head = head_of("POST", "/v1/chat/completions", "Content-Type: application/json",
                   "Transfer-Encoding: chunked")  # fmt: skip

    status, _, body = nginx.ask(head + part * 17)

    assert status == 413
    assert json.loads(body)["error"]


def test_a_body_just_under_16_mb_reaches_the_model(nginx, upstream):
    text = "a" * (16 * 2**20 - 200)

    answer = nginx.chat(messages=[{"role": "user", "content": text}])

    assert answer.status_code == 200
    assert len(upstream.requests[-1].raw) > 16 * 2**20 - 200


def test_too_many_requests_are_a_json_429_but_health_answers(router, start):
    nginx = start(router.port)
    with requests.Session() as session:
        answers = [session.get(nginx.base + "/v1/models", timeout=5) for _ in range(400)]
        health = session.get(nginx.base + "/health", timeout=5)
    refused = [answer for answer in answers if answer.status_code != 200]

    assert {answer.status_code for answer in refused} == {429}
    assert answers.index(refused[0]) >= 200
    assert refused[0].headers["Retry-After"] == "2"
    assert refused[0].json()["error"]["message"]
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
    status, headers, body = nginx.ask(data)

    assert status in (400, 414)
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["message"]


# --- a router that is away -----------------------------------------------------------------------


def test_a_killed_router_is_a_json_503(shared_upstream, start, tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("killed"), patient_routes(shared_upstream))
    nginx = start(service.port)
    assert nginx.chat().status_code == 200
    kill_all(service)

    for _ in range(2):
        answer = nginx.chat()

        assert answer.status_code == 503
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Retry-After"] == "5"
        assert answer.json()["error"]["code"] == "router_down"


def kill_all(service: Service) -> None:
    """Kill the master and its worker, as the kernel does when memory runs out."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    workers = children.read_text().split()
    for pid in (service.process.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    service.process.wait(10)
    wait_until(lambda: not can_connect(service.port))


def test_the_503_of_the_router_itself_passes_as_it_is(upstream, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nokey")
    service = Service(folder, patient_routes(upstream), TEST_API_KEY="")
    try:
        answer = start(service.port).chat()
    finally:
        service.stop()

    assert answer.status_code == 503
    assert "TEST_API_KEY" in answer.json()["error"]["message"]


def test_a_reload_fails_no_request(router, nginx):
    done, statuses = threading.Event(), []

    def client(_: int) -> None:
        with requests.Session() as session:
            url = nginx.base + "/v1/chat/completions"
            while not done.wait(0.02):
                statuses.append(session.post(url, json=CHAT, timeout=10).status_code)

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
    status, _, body = nginx.ask(head_of("GET", path))

    assert status == 200
    assert json.loads(body)["id"] == "acme/one"


@pytest.mark.parametrize("host", ["localhost", "router.example.com:8443"])
def test_the_host_name_is_passed_on(nginx, host):
    answer = requests.get(nginx.base + "/v1/models", headers={"Host": host}, timeout=5)

    assert answer.status_code == (200 if host == "localhost" else 403)
    assert (host == "localhost") or "'router.example.com'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/config/category"),
        ("POST", "/config/model-mapping"),
        ("DELETE", "/config/category/code"),
        ("POST", "/circuit-breaker/reset-all"),
        ("POST", "/circuit-breaker/reset/acme/one"),
        ("POST", "/circuit-breaker/reset/acme%2Fone"),
        ("POST", "//config/category"),
        ("POST", "/%63onfig/category"),
        ("POST", "/config%2Fcategory"),
        ("POST", "/./config/category"),
        ("POST", "/v1/../config/category"),
        ("POST", "http://localhost/config/category"),
    ],
)
def test_admin_routes_are_closed(nginx, method, path):
    status, headers, body = nginx.ask(head_of(method, path, body=json.dumps(POETRY).encode()))

    assert status == 403
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["code"] == "only_local"


SPOOFS = [
    ["X-Forwarded-For: 127.0.0.1"],
    ["X-Real-IP: 127.0.0.1"],
    ["Forwarded: for=127.0.0.1;host=localhost"],
    ["Connection: X-Forwarded-For, X-Real-IP, X-Forwarded-Proto"],
    ["SCRIPT_NAME: /x"],
    ["PATH_INFO: /config/category"],
    ["X-Original-URL: /config/category"],
    ["X-Forwarded-Prefix: /x", "X-Forwarded-Host: localhost"],
    ["X-HTTP-Method-Override: POST"],
]


@pytest.mark.parametrize("headers", SPOOFS, ids=lambda headers: headers[0].split(":")[0])
@pytest.mark.parametrize("path", ["/config/category", "/x/config/category", "/config#/../category"])
def test_no_header_of_a_client_opens_a_change(router, nginx, headers, path):
    data = head_of("POST", path, *headers, body=json.dumps(POETRY).encode())

    status, _, _ = nginx.ask(data)

    assert status in (400, 403, 404, 405)
    assert "poetry" not in router.routes.read_text()


@pytest.mark.parametrize("headers", SPOOFS, ids=lambda headers: headers[0].split(":")[0])
def test_the_router_itself_refuses_when_nginx_forgets_to(router, start, headers):
    open_site = SITE.replace("location ^~ /config/", "location ^~ /forgotten/")
    data = head_of("POST", "/config/category", *headers, body=json.dumps(POETRY).encode())

    status, _, body = start(router.port, open_site).ask(data)

    assert status == 403
    assert "by no proxy" in json.loads(body)["error"]["message"]
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
    nginx.ask(head_of("GET", "/a%2Fb//c?d=%2F", "X-Forwarded-For: 6.6.6.6", "X-Real-IP: 6.6.6.6",
                      "Forwarded: for=6.6.6.6", "Authorization: Bearer mine"))  # fmt: skip
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
    data = head_of("POST", "/config/category", *headers, body=json.dumps(POETRY).encode())

    status, _, body = nginx.ask(data)

    assert status == 403
    assert json.loads(body)["error"]["code"] == "only_local"
    assert "poetry" not in router.routes.read_text()


def test_the_pages_of_errors_are_no_pages(nginx):
    status, _, _ = nginx.ask(head_of("GET", "/llm-router-error/503"))

    assert status == 404
