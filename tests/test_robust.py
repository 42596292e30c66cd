"""One request, one edit, one message: nothing of it takes the service down."""

from __future__ import annotations

import gc
import itertools
import json
import os
import socket
import sys
import time
import weakref

import pytest
from conftest import LocalClient, Service, settings_for, small_routes
from upstream import answer_body, drop_at_once, error, pieces, plain, sse, stream, whole

import router as module
from parts.errors import Full, RoutesError
from parts.exchange import retry_after_of
from parts.judge import judge
from parts.prompts import clean
from parts.table import load_table


@pytest.mark.parametrize("model", ["\\ud800", "a\\ud800b"])
def test_a_lone_surrogate_in_a_header_leaks_no_permit(client, model):
    data = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "hello"}}]}}'

    answer = client.post("/v1/chat/completions", data=data, content_type="application/json")

    assert answer.status_code == 200
    assert client.get("/metrics").json["in_flight"] == 0


@pytest.mark.parametrize("keyword", ["^3", "*", "*^2", "...", "^", "!?"])
def test_a_keyword_without_a_word_is_a_422_and_changes_nothing(client, keyword):
    body = {"name": "haiku", "models": ["acme/one"], "keywords": [keyword]}

    answer = client.post("/config/category", body)

    assert answer.status_code == 422
    assert client.chat("any text").status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        "a (untrusted metadata):\n```json" + "\n" * 50_000,
        "x ⟦openclaw:ctx⟧\n```json\n" + "\n " * 25_000,
        "(untrusted metadata):\n```json\n" * 1_600,
    ],
)
def test_hostile_group_metadata_is_stripped_in_linear_time(text):
    def took(part: str) -> float:
        began = time.process_time()
        clean(part)
        return time.process_time() - began

    short, long = took(text[:12_500]), took(text)

    assert long < 8 * short + 0.05


@pytest.mark.parametrize("paths", [(b"/route", b"/config/category"), (b"/config/model-mapping",)])
def test_half_sent_admin_bodies_leave_threads_for_health(tmp_path, upstream, paths):
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="10")
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    socks = []
    try:
        for path in paths * 12:
            sock = socket.create_connection(("127.0.0.1", service.port), timeout=5)
            sock.sendall(head % path + b"Content-Length: 100\r\n\r\n{")
            socks.append(sock)

        assert service.get("/health").status_code == 200
    finally:
        [sock.close() for sock in socks]
        service.stop()


def test_few_changes_are_uploaded_at_once_and_each_of_them_in_ten_seconds(clock):
    flights = module.Flights(64, clock)
    air = [module.Flight(None, clock) for _ in range(5)]
    [flights.board(flight, counted=False) for flight in air[:4]]
    with pytest.raises(Full, match="4 changes are being sent already"):
        flights.board(air[4], counted=False)

    clock += 10
    flights.look()

    assert [flight.why for flight in air] == ["client_left"] * 4 + [None]
    flights.land(air[0])
    flights.board(air[4], counted=False)


@pytest.mark.parametrize("cost", ["1" + "0" * 400, "1e308", "-1", '"x"', "NaN"])
def test_a_nonsensical_cost_is_no_cost(client, upstream, cost):
    body = json.dumps(answer_body("x")).replace('"total_tokens": 30', f'"cost": {cost}')
    upstream.default = plain(200, body.encode())

    answer = client.chat()

    assert answer.status_code in (200, 500)
    assert client.get("/metrics").json["total_cost_usd"] < 1
    assert client.get("/metrics").json["in_flight"] == 0


def test_a_deadline_that_was_replaced_fells_nothing(clock):
    flight = module.Flight(None, clock)
    flight.limit("first_token", clock() + 1)
    read_before = flight.due
    flight.limit("idle", clock() + 60)

    flight.end("first_token", read_before)

    assert flight.why is None


@pytest.mark.parametrize(
    "text",
    [
        "The model could not fetch the image: URL not found",
        "Invalid model parameter: temperature",
        "tools[0].description is too long",
    ],
)
def test_a_clients_mistake_is_only_a_refusal(text):
    assert judge(400, text) == "refused"


@pytest.mark.parametrize("origin", ["http://[", "null", "http://evil.example", "//"])
def test_a_foreign_or_broken_origin_is_a_403(client, origin):
    assert client.get("/health", headers={"Origin": origin}).status_code == 403


def test_an_error_in_a_choice_of_a_stream_fails_over(client, upstream):
    broken = {"choices": [{"delta": {}, "finish_reason": "error", "error": {"code": 502}}]}
    upstream.scripts["acme/one"] = pieces([sse(broken)])

    answer = client.chat(stream=True)

    assert answer.headers["X-Router-Model"] == "acme/two"


@pytest.mark.parametrize(
    ("content", "fits"),
    [
        ([{"type": "input_audio", "input_audio": {"data": "A" * 50_000}}], True),
        ("ж" * 3_000, True),
        ("word " * 3_000, False),
    ],
)
def test_what_surely_fits_is_not_passed_over(tmp_path, upstream, content, fits):
    path = tmp_path / "routes.json"
    limits = {"acme/one": {"context": 1000}, "acme/two": {"context": 1000}}
    path.write_text(json.dumps(small_routes(upstream.url, models=limits)))
    client = LocalClient(module.create_app(settings_for(path)))

    answer = client.chat(messages=[{"role": "user", "content": content}])

    assert answer.status_code == (200 if fits else 422)


def test_refusals_at_the_door_are_counted_logged_and_named(client):
    answer = client.post("/v1/chat/completions", data="x", content_type="text/plain")

    figures = client.get("/metrics").json
    assert answer.status_code == 415
    assert answer.headers["X-Request-Id"]
    assert figures["requests"]["rejected"] == 1
    assert figures["recent_requests"][0]["status"] == 415
    assert figures["avg_choosing_ms"] == 0


def test_a_cancelled_stream_is_no_success_in_the_attempts(client, upstream):
    upstream.default = whole("x")
    response = client.flask.post(
        "/v1/chat/completions",
        json={"stream": True, "messages": [{"role": "user", "content": "x"}]},
    )

    response.close()

    figures = client.get("/metrics").json
    assert figures["requests"]["cancelled"] == 1
    assert figures["models"]["acme/one"]["attempts"] == {"client_left": 1}


def test_dry_run_names_the_model_that_gets_the_early_probe(client, upstream):
    for script in ("acme/one", "acme/two"):
        upstream.scripts[script] = plain(503, b"{}")
    [client.chat() for _ in range(3)]
    chain = client.post("/route", {"text": "hello"}).json["chain"]
    upstream.scripts.clear()

    real = client.chat()

    assert [m["model"] for m in chain if not m["passed_over"]] == [real.headers["X-Router-Model"]]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_key_is_case_insensitive(routes, scheme):
    client = LocalClient(module.create_app(settings_for(routes, ROUTER_API_KEY="k1")))

    assert client.chat(headers={"Authorization": f"{scheme} k1"}).status_code == 200
    assert client.chat(headers={"Authorization": f"{scheme} k2"}).status_code == 401


def test_a_browser_library_gets_json(client):
    accept = {"Accept": "application/json, text/plain, */*"}

    assert client.get("/metrics", headers=accept).is_json


def test_a_key_file_that_cannot_be_read_stops_the_start_by_its_name(tmp_path):
    env = {"TEST_API_KEY": "", "TEST_API_KEY_FILE": str(tmp_path / "none")}

    with pytest.raises(AssertionError, match="TEST_API_KEY_FILE"):
        Service(tmp_path, small_routes("http://127.0.0.1:1"), **env)


@pytest.mark.parametrize("header", ["SCRIPT_NAME: /zzz", "Script_Name: /health", "PATH_INFO: /x"])
def test_no_header_of_a_client_changes_the_path(service, header):
    head = f"GET /health HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n"

    answer = service.raw(head.encode())

    status = int(answer.split(b" ")[1])
    assert status == 200 or (status == 400 and b'{"error"' in answer)


def test_refused_half_bodies_give_their_threads_back(tmp_path, upstream):
    service = Service(tmp_path, small_routes(upstream.url), ROUTER_THREADS="10")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
    socks = []
    try:
        for _ in range(20):
            sock = socket.create_connection(("127.0.0.1", service.port), timeout=5)
            sock.sendall(head + b"Content-Length: 100\r\n\r\n{")
            socks.append(sock)

        began = time.monotonic()
        assert service.get("/health").status_code == 200
        assert time.monotonic() - began < 3
    finally:
        [sock.close() for sock in socks]
        service.stop()


def test_a_pipe_instead_of_the_routes_file_keeps_the_last_good_table(routes, client, clock):
    client.app.extensions["router"].store._next_look = 0.0
    routes.unlink()
    os.mkfifo(routes)

    health = client.get("/health").json

    assert health["config"]["error"] == "cannot be read: not a regular file"
    assert client.chat().status_code == 200


def test_a_lone_surrogate_in_the_file_is_refused():
    text = json.dumps(small_routes("http://h")).replace("refactor*", "caf\\\\ud800 zz")

    with pytest.raises(RoutesError, match="surrogate"):
        load_table(text.replace("\\\\ud800", "\\ud800"))


@pytest.mark.parametrize(
    ("value", "seconds"), [("inf", 1e10), ("9" * 400, 1e10), ("nan", None), ("-5", 0)]
)
def test_retry_after_is_bounded_whatever_it_says(value, seconds):
    assert retry_after_of(value) == seconds


def too_many(start: dict, item: object) -> dict:
    return {**start, "messages": [item] * 200_000}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", too_many({}, 0)),
        ("/v1/chat/completions", too_many({"tools": 1}, {"role": "user"})),
        ("/route", too_many({}, 0)),
        ("/config/category", {"name": "a", "models": [{"a": [n]} for n in range(5_000)]}),
    ],
)
def test_an_invalid_body_of_many_parts_costs_no_more_than_reading_it(client, path, body):
    calls = itertools.count()
    sys.setprofile(lambda frame, event, arg: next(calls))
    try:
        answer = client.post(path, body)
    finally:
        sys.setprofile(None)

    assert answer.status_code == 422
    assert 1 <= len(answer.json["detail"]) <= 20
    assert next(calls) < 10_000_000  # 30 for each part; the validator takes hundreds


def test_no_certificates_where_they_are_said_to_be_stop_the_start(tmp_path):
    with pytest.raises(module.SettingsError, match="REQUESTS_CA_BUNDLE"):
        module.Settings.from_env({"REQUESTS_CA_BUNDLE": str(tmp_path / "none")})


def test_a_key_in_use_is_masked_although_its_file_has_changed(tmp_path, routes, upstream):
    file = tmp_path / "key"
    file.write_text("plain-old-credential")
    env = {"ROUTER_ROUTES": str(routes), "TEST_API_KEY_FILE": str(file)}
    client = LocalClient(module.create_app(module.Settings.from_env(env)))
    client.chat()
    file.write_text("plain-new-credential")
    upstream.default = error(400, "what is plain-old-credential?")

    assert "plain-old-credential" not in client.chat().text


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization Bearer MARKER-PROMPT\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: MARKER-PROMPT\r\n\r\n",
        b"GET /health?key=MARKER-PROMPT\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /x?p=my prompt MARKER-PROMPT HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b'{"MARKER-PROMPT":1} / HTTP/1.1\r\n\r\n',
    ],
)
def test_what_gunicorn_refuses_is_logged_by_place_not_by_text(service, data):
    before = len(service.log.read_text())

    assert b" 4" in service.raw(data)[:12]

    logged = service.log.read_text()[before:]
    assert "event=request_refused" in logged
    assert "MARKER-PROMPT" not in logged


@pytest.mark.parametrize("content", ["", "\n", "  "])
def test_an_empty_key_file_stops_the_start_instead_of_opening_the_door(tmp_path, content):
    file = tmp_path / "key"
    file.write_text(content)

    with pytest.raises(module.SettingsError, match=r"ROUTER_API_KEY_FILE: .* is empty"):
        module.Settings.from_env({"ROUTER_API_KEY_FILE": str(file)})


WHOLE = whole()


@pytest.mark.parametrize("more", [{}, {"stream": True}])
@pytest.mark.parametrize("script", [WHOLE, error(503), error(400), drop_at_once])
def test_a_request_that_has_ended_leaves_nothing_for_the_collector(app, upstream, script, more):
    upstream.default = stream(["a"]) if more and script is WHOLE else script
    owner, calls = app.extensions["router"], []
    begin = owner.begin
    owner.begin = lambda client: calls.append(weakref.ref(call := begin(client))) or call
    client = LocalClient(app)
    client.chat(**more)
    gc.collect()
    gc.disable()
    try:
        client.chat(**more)
    finally:
        gc.enable()

    assert len(calls) == 2
    assert calls[1]() is None
