"""Errors end where the next step begins: which key, which host, which URL; unknown paths, too."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import ROOT, LocalClient, free_port, settings_for, small_routes
from helpers import answer_to
from upstream import Upstream, error, plain

import router as module

BODY = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def client_of(tmp_path):
    """A client of a router whose upstream is at this base URL."""

    def make(url: str) -> LocalClient:
        path = tmp_path / "routes.json"
        path.write_text(json.dumps(small_routes(url)))
        return LocalClient(module.create_app(settings_for(path)))

    return make


def said(client: LocalClient) -> str:
    return client.chat().json["error"]["message"]


# --- upstreams ----


def test_a_refused_key_is_told_by_its_variable_and_its_upstream(client, upstream):
    upstream.default = error(401, "no auth credentials found")

    assert "TEST_API_KEY is refused by local" in said(client)
    told = client.get("/health").json["upstreams"]["local"]
    assert told["message"] == "TEST_API_KEY is refused by local"


def test_an_upstream_that_wants_a_key_it_was_not_given_is_told(tmp_path, upstream):
    routes = small_routes(upstream.url, upstreams={"local": {"base_url": upstream.url}})
    (tmp_path / "routes.json").write_text(json.dumps(routes))
    upstream.default = error(401, "who are you?")

    client = LocalClient(module.create_app(settings_for(tmp_path / "routes.json")))

    assert "local wants a key: name its variable as api_key_env" in said(client)


def test_an_upstream_that_wants_payment_is_told_in_its_own_words(client, upstream):
    upstream.default = error(402, "Insufficient credits. Add more at the shop.")

    assert "acme/one wants payment: Insufficient credits. Add more at the shop." in said(client)


def test_a_host_that_refuses_connections_is_told_once(client_of):
    port = free_port()

    text = said(client_of(f"http://127.0.0.1:{port}/v1"))

    assert text.endswith(f"local could not be reached: 127.0.0.1:{port}: connection refused")
    assert text.count("refused") == 1


def test_a_name_that_does_not_exist_is_told(client_of):
    text = said(client_of("http://no-such-host.invalid/v1"))

    assert text.endswith("local could not be reached: the name no-such-host.invalid cannot be "
                         "resolved")  # fmt: skip


def test_a_certificate_of_a_stranger_is_told_with_its_reason(client_of):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server = Upstream(context)

    text = said(client_of(server.url.replace("http:", "https:")))
    server.close()

    assert "local could not be reached: 127.0.0.1:" in text
    assert "self-signed certificate" in text or "unable to get local issuer" in text


@pytest.mark.parametrize(
    "answer",
    [
        plain(404, b"404 page not found", "text/plain"),
        plain(404, b"<html>nginx</html>", "text/html"),
        plain(404, b'{"detail": "Not Found"}'),
        plain(404, b'{"error": {"message": "Invalid URL (POST /chat/completions)"}}'),
        plain(404, b'{"error": "Cannot POST /chat/completions"}'),
    ],
)
def test_a_path_that_the_upstream_does_not_know_is_told_with_its_url(client, upstream, answer):
    upstream.default = answer

    url = f"{upstream.url}/chat/completions"
    assert said(client) == f"{url} was not found (404): is base_url right?"


def test_an_upstreams_own_words_about_a_404_are_kept(client, upstream):
    upstream.default = error(404, "the deployment is gone")

    assert said(client) == "the deployment is gone"


def test_it_is_not_ready_while_every_key_is_refused_but_not_for_ever(routes, upstream, clock):
    client = LocalClient(module.create_app(settings_for(routes), clock=clock))
    upstream.default = error(401, "no")

    client.chat()

    assert client.get("/health/ready").status_code == 503
    clock += 301
    assert client.get("/health/ready").status_code == 200


# --- Ollama ----


def warmed_up(folder: Path, ollama_url: str) -> dict[str, Any]:
    """What /health says of the classifier after the start."""
    ollama = {"base_url": ollama_url}
    routes = small_routes("http://127.0.0.1:1/v1", routing_mode="hybrid", ollama=ollama)
    (folder / "routes.json").write_text(json.dumps(routes))
    app = module.create_app(settings_for(folder / "routes.json"))
    module.warm_up(app.extensions["router"])
    return LocalClient(app).get("/health").json["classifier"]


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        (plain(404, b'{"error":"model \\"qwen2.5:0.5b\\" not found, try pulling it first"}'),
         "no_model", "ollama pull qwen2.5:0.5b"),
        (plain(404, b"404 page not found", "text/plain"), "not_found",
         "is Ollama's base_url right?"),
        (plain(500, b'{"error":"out of memory"}'), "status 500", "out of memory"),
    ],
)  # fmt: skip
def test_the_warm_up_says_what_ollama_lacks_before_the_first_request(
    tmp_path, upstream, capsys, answer, reason, words
):
    upstream.default = answer

    told = warmed_up(tmp_path, upstream.url.removesuffix("/v1"))

    assert (told["status"], told["reason"]) == ("failing", reason)
    assert words in told["message"]
    log = capsys.readouterr().err
    assert sum("classifier_failing" in line for line in log.splitlines()) == 1


def test_an_ollama_that_is_not_there_is_told_with_both_ways_out(tmp_path):
    told = warmed_up(tmp_path, f"http://127.0.0.1:{free_port()}")

    assert told["reason"] == "connect"
    assert "start it" in told["message"]
    assert '"routing_mode": "keywords"' in told["message"]


# --- unknown paths ----


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/v1/chat/completions", "/v1 twice"), ("/v1/v1/models", "/v1/models is meant"),
        ("/v1/completions", "text completions are not spoken here; POST /v1/chat/completions is"),
        ("/v1/images/generations", "images are not spoken here"),
        ("/v1/audio/speech", "audio is not spoken here"), ("/moderations", "moderations are"),
        ("/api/chat", "Ollama's own API is not spoken here"),
        ("/openai/v1/chat/completions", "the base URL should end in /v1"),
        ("/v1/chat/completion", "did you mean '/v1/chat/completions'"),
        ("/healthz", "did you mean '/health'"), ("/nowhere", "GET / lists them"),
    ],
)  # fmt: skip
def test_an_unknown_path_is_answered_with_what_is_meant(client, path, words):
    answer = client.post(path, BODY)

    assert answer.status_code == 404
    assert words in answer.json["error"]["message"]


def test_an_unknown_path_leaves_one_line_and_a_count_but_not_its_words(routes, capsys):
    client = LocalClient(module.create_app(settings_for(routes)))
    client.post("/v1/v1/chat/completions", BODY)
    client.get("/v1/MARKER-SECRET/chat")

    lines = [line for line in capsys.readouterr().err.splitlines() if "event=request" in line]
    assert "outcome=rejected status=404" in lines[0]
    assert "POST /v1/v1/chat/completions" in lines[0]
    assert "GET /v1/*/chat" in lines[1]
    assert client.get("/metrics").json["requests"]["rejected"] == 2
    assert len(client.get("/metrics").json["recent_requests"]) == 2


@pytest.mark.parametrize("path", ["//chat/completions", "/v1//chat/completions", "///v1/models"])
def test_a_slash_too_many_is_forgiven(client, path):
    method = "GET" if path.endswith("models") else "POST"

    answer = client.open(method, "/", json=BODY, environ_overrides={"PATH_INFO": path})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "//config"), ("GET", "/metrics//"), ("POST", "//v1//chat/completions"),
     ("POST", "//config/category"), ("POST", "/circuit-breaker//reset-all")],
)  # fmt: skip
def test_a_slash_too_many_opens_no_door(routes, method, path):
    keys = {"ROUTER_API_KEY": "k" * 20, "ROUTER_ADMIN_TOKEN": "t" * 20}
    client = LocalClient(module.create_app(settings_for(routes, **keys)))

    answer = client.open(method, "/", json=BODY, environ_overrides={"PATH_INFO": path})

    assert answer.status_code in (401, 404)


def test_a_load_balancer_asks_in_http_1_0_without_a_host(service):
    answer = answer_to(service, b"GET /health HTTP/1.0\r\n\r\n")

    assert (answer.status, answer.json["status"]) == (200, "healthy")


def test_http_1_1_without_a_host_is_refused_as_before(service):
    assert answer_to(service, b"GET /health HTTP/1.1\r\n\r\n").status in (400, 403)


# --- the command line ----


def test_without_its_packages_it_says_what_to_do_instead_of_a_traceback(tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("router.py", "parts/bootstrap.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = [sys.executable, "-S", "-E", str(tmp_path / "router.py"), "check"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=30)

    assert done.stderr == "router: the packages are not installed yet; run: make install\n"
    assert done.returncode == 1


def test_any_python_goes_on_with_the_virtual_environments(tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("router.py", "parts/bootstrap.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "the one: $*"\n')
    python.chmod(0o755)
    command = [sys.executable, "-S", "-E", str(tmp_path / "router.py"), "route", "a b"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=30)

    assert done.stdout == f"the one: {tmp_path}/router.py route a b\n"


def test_make_route_takes_any_text(tmp_path):
    text = 'why "this"? $HOME `ls` it\'s 5% #1'
    copy = tmp_path / "Makefile"
    copy.write_text(
        (ROOT / "Makefile").read_text().replace("$(BIN)/python router.py", "printf %s:")
    )
    (tmp_path / ".venv").mkdir()
    for mark in (".installed", "bin/python"):
        (tmp_path / ".venv" / mark).parent.mkdir(exist_ok=True)
        (tmp_path / ".venv" / mark).write_text("")
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / ".venv" / ".installed").touch()

    done = subprocess.run(
        ["make", "-s", "route", f"TEXT={text}"],
        cwd=tmp_path,
        capture_output=True,
        timeout=30,
        text=True,
    )

    assert done.stdout.endswith(f":{text}") or text in done.stdout


def test_route_without_a_service_warms_nothing_up_and_logs_nothing(tmp_path, upstream):
    routes = small_routes(upstream.url, routing_mode="hybrid",
                          ollama={"base_url": upstream.url.removesuffix("/v1")})  # fmt: skip
    (tmp_path / "routes.json").write_text(json.dumps(routes))

    done = route("refactor this python please", tmp_path)

    assert "category  code" in done.stdout
    assert "circuit unknown" in done.stdout
    assert done.stderr == ""
    assert upstream.requests == []


def route(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "ROUTER_ROUTES": str(folder / "routes.json"),
           "ROUTER_BIND": f"127.0.0.1:{free_port()}", "TEST_API_KEY": "k"}  # fmt: skip
    command = [sys.executable, str(ROOT / "router.py"), "route", text]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)


# --- check --live ----


def live(folder: Path, routes: dict, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    (folder / "routes.json").write_text(json.dumps(routes))
    clean = {"PATH": "/usr/bin:/bin", "ROUTER_ROUTES": str(folder / "routes.json")}
    command = [sys.executable, str(ROOT / "router.py"), "check", "--live", *args]
    return subprocess.run(
        command, env={**clean, "TEST_API_KEY": "k" * 20, **env}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def models(*ids: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": id_} for id_ in ids]}).encode()


def by_path(**answers):
    """A script that answers by the last part of the path; what is not named is a 404."""

    def script(peer, request):
        name = request.path.rpartition("/")[2]
        return answers.get(name, plain(404, b"nothing here", "text/plain"))(peer, request)

    return script


@pytest.mark.parametrize(
    ("answers", "status", "words"),
    [
        ({"models": plain(200, models("acme/one", "acme/two"))}, 0, "2 models at"),
        ({"models": plain(200, models("acme/one", "acme/too"))}, 1, "did you mean 'acme/too'"),
        ({"models": error(401, "no")}, 1, "TEST_API_KEY is refused (401)"),
        ({"models": error(402, "no")}, 1, "no credit is left"),
        ({}, 1, "is not found (404): is base_url right?"),
        ({"models": plain(200, b"<html>hello", "text/html")}, 1, "holds no list of models"),
        ({"models": error(503, "no")}, 1, "answers with status 503"),
        ({"models": plain(200, models("acme/one", "acme/two")), "key": error(401, "no")},
         1, "TEST_API_KEY is refused (401)"),
        ({"models": plain(200, models("acme/one", "acme/two")),
          "key": plain(200, b'{"data": {"limit_remaining": 0}}')}, 1, "the key's limit is spent"),
    ],
)  # fmt: skip
def test_live_says_what_is_wrong_with_an_upstream(tmp_path, upstream, answers, status, words):
    upstream.default = by_path(**answers)

    done = live(tmp_path, small_routes(upstream.url))

    assert words in done.stdout
    assert done.returncode == status
    asked = [request for request in upstream.requests if request.method != "GET"]
    assert {request.raw for request in asked} <= {b"{}"}  # which no model answers


@pytest.mark.parametrize(
    ("answer", "speaks", "status", "words"),
    [
        (error(404), ["chat", "messages"], 1, "take messages out of `speaks`"),
        (error(405), ["messages"], 1, "take messages out of `speaks`"),
        (error(400, "model: Field required"), ["chat"], 0, "`speaks` may name messages"),
        (error(422), ["chat", "messages"], 0, "2 models at"),
    ],
)
def test_live_says_which_formats_an_upstream_speaks(
    tmp_path, upstream, answer, speaks, status, words
):
    upstream.default = by_path(models=plain(200, models("acme/one", "acme/two")), messages=answer)
    routes = small_routes(upstream.url)
    routes["upstreams"]["local"]["speaks"] = speaks

    done = live(tmp_path, routes)

    assert words in done.stdout
    assert done.returncode == status


def test_live_says_that_a_key_is_missing_or_a_host_away(tmp_path):
    port = free_port()
    routes = small_routes(f"http://127.0.0.1:{port}/v1")

    away, no_key = live(tmp_path, routes), live(tmp_path, routes, TEST_API_KEY="")

    assert f"could not be reached: 127.0.0.1:{port}: connection refused" in away.stdout
    assert "set TEST_API_KEY" in no_key.stdout
    assert (away.returncode, no_key.returncode) == (1, 1)


@pytest.mark.parametrize(
    ("tags", "mode", "status", "words"),
    [
        (["qwen2.5:0.5b"], "ollama", 0, "qwen2.5:0.5b at"),
        (["other:1b"], "hybrid", 0, "ollama pull qwen2.5:0.5b"),
        (["other:1b"], "ollama", 1, "ollama pull qwen2.5:0.5b"),
    ],
)
def test_live_asks_ollama_for_its_model(tmp_path, upstream, tags, mode, status, words):
    listed = json.dumps({"models": [{"name": name} for name in tags]}).encode()
    upstream.default = by_path(
        models=plain(200, models("acme/one", "acme/two")), tags=plain(200, listed)
    )
    ollama = {"base_url": upstream.url.removesuffix("/v1")}

    done = live(tmp_path, small_routes(upstream.url, routing_mode=mode, ollama=ollama))

    assert words in done.stdout
    assert done.returncode == status


def test_live_as_json_holds_the_same_rows_and_never_the_key(tmp_path, upstream):
    upstream.default = by_path(models=error(401, "k" * 20))

    done = live(tmp_path, small_routes(upstream.url), "--json")

    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert report["live"][0]["what"] == "local"
    assert "k" * 20 not in done.stdout + done.stderr


# --- apps of other origins ----


@pytest.fixture
def apps(routes, upstream):
    origins = "app://obsidian.md, http://LocalHost:3000/ https://a.example:443"
    keys = {"ROUTER_ALLOWED_ORIGINS": origins, "ROUTER_API_KEY": "k" * 20}
    return LocalClient(module.create_app(settings_for(routes, **keys)))


ORIGINS = ["app://obsidian.md", "http://localhost:3000", "https://a.example"]


@pytest.mark.parametrize("origin", ORIGINS)
def test_an_app_of_an_allowed_origin_is_served_and_told_so(apps, origin):
    headers = {"Origin": origin, "Authorization": f"Bearer {'k' * 20}",
               "Sec-Fetch-Site": "cross-site"}  # fmt: skip

    for answer in (apps.chat(headers=headers), apps.chat(stream=True, headers=headers)):
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Vary"] == "Origin"


def test_an_app_of_an_allowed_origin_can_read_its_errors(apps):
    answer = apps.chat(headers={"Origin": ORIGINS[0]})

    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGINS[0]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/chat/completions", "/v1/models", "/health"]
)
def test_a_browser_may_ask_first_what_an_app_may_send(apps, path):
    headers = {"Origin": ORIGINS[0], "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
               "Access-Control-Request-Private-Network": "true"}  # fmt: skip

    answer = apps.open("OPTIONS", path, headers=headers)

    assert answer.status_code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGINS[0]
    assert answer.headers["Access-Control-Allow-Headers"].endswith("x-stainless-os")
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Private-Network"] == "true"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/config"), ("GET", "/metrics"), ("POST", "/config/category"),
     ("OPTIONS", "/config/category"), ("POST", "/circuit-breaker/reset-all")],
)  # fmt: skip
def test_no_app_gets_at_the_operators_routes(apps, method, path):
    answer = apps.open(method, path, headers={"Origin": ORIGINS[0]}, json={})

    assert answer.status_code == 403
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("origin", ["app://obsidian.md.evil", "http://localhost:3001", "null", ""])
def test_another_origin_is_refused_by_the_name_of_the_setting(apps, origin):
    answer = apps.chat(headers={"Origin": origin, "Authorization": f"Bearer {'k' * 20}"})

    assert answer.status_code == 403
    assert "ROUTER_ALLOWED_ORIGINS" in answer.json["error"]["message"]
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_program_that_says_cors_without_an_origin_is_let_in(client):
    assert client.chat(headers={"Sec-Fetch-Mode": "cors"}).status_code == 200


def test_without_the_setting_no_answer_has_headers_for_other_origins(client):
    answer = client.chat()

    assert [name for name, _ in answer.headers if name.startswith("Access-Control")] == []


# --- our own keys ----


@pytest.mark.parametrize(
    ("sent", "said"),
    [({}, "no key was sent; send the value of ROUTER_API_KEY as a Bearer token"),
     ({"Authorization": "Bearer wrong"},
      "the key that was sent is not the value of ROUTER_API_KEY"),
     ({"Authorization": "Basic a:b"}, "no key was sent; send the value")],
)  # fmt: skip
def test_a_missing_key_and_a_wrong_one_are_told_apart(apps, sent, said):
    answer = apps.chat(headers=sent)

    assert answer.status_code == 401
    assert said in answer.json["error"]["message"]
