"""One request, one edit, one message: nothing of it takes the service down."""

from __future__ import annotations

import gc
import itertools
import sys
import time
import weakref

import pytest
from conftest import LocalClient
from helpers import CHAT, answer_to, connected, figures, head_of, user, wait_until
from upstream import chunk, drop_at_once, error, pieces, plain, sse, stream, whole

import router as module
from parts.prompts import clean


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


@pytest.fixture(scope="module")
def few_threads(serve):
    return serve(ROUTER_THREADS="10")


HALF = "Content-Length: 100"
TYPED = ("Content-Type: application/json", HALF)


@pytest.mark.parametrize(
    "heads",
    [
        [head_of("POST", "/route", *TYPED), head_of("POST", "/config/category", *TYPED)] * 6,
        [head_of("POST", CHAT, "Content-Type: text/plain", HALF)] * 20,
    ],
    ids=["half sent", "refused"],
)
def test_half_bodies_leave_threads_for_health(few_threads, heads):
    socks = [connected(few_threads, head + b"{") for head in heads]
    began = time.monotonic()
    status = few_threads.get("/health").status_code

    assert status == 200
    assert time.monotonic() - began < 3
    [sock.close() for sock in socks]


def test_refusals_at_the_door_are_counted_logged_and_named(client):
    answer = client.post(CHAT, data="x", content_type="text/plain")

    shown = figures(client)
    assert answer.status_code == 415
    assert answer.headers["X-Request-Id"]
    assert shown["requests"]["rejected"] == 1
    assert shown["recent_requests"][0]["status"] == 415
    assert shown["avg_choosing_ms"] == 0


def test_a_cancelled_stream_is_no_success_in_the_attempts(client, upstream):
    upstream.default = whole("x")
    response = client.flask.post(CHAT, json={"stream": True, "messages": [user("x")]})

    response.close()

    shown = figures(client)
    assert shown["requests"]["cancelled"] == 1
    assert shown["models"]["acme/one"]["attempts"] == {"client_left": 1}


def test_dry_run_names_the_model_that_gets_the_early_probe(client, upstream):
    upstream.default = plain(503, b"{}")
    [client.chat() for _ in range(3)]
    chain = client.post("/route", {"text": "hello"}).json["chain"]
    upstream.reset()

    real = client.chat()

    assert [m["model"] for m in chain if not m["passed_over"]] == [real.headers["X-Router-Model"]]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_a_key_is_case_insensitive(build, scheme):
    client = build(ROUTER_API_KEY="k1")

    assert client.chat(headers={"Authorization": f"{scheme} k1"}).status_code == 200
    assert client.chat(headers={"Authorization": f"{scheme} k2"}).status_code == 401


def too_many(start: dict, item: object) -> dict:
    return {**start, "messages": [item] * 200_000}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, too_many({}, 0)),
        (CHAT, too_many({"tools": 1}, {"role": "user"})),
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


def test_a_key_in_use_is_masked_although_its_file_has_changed(build, tmp_path, upstream):
    file = tmp_path / "key"
    file.write_text("plain-old-credential")
    client = build(TEST_API_KEY="", TEST_API_KEY_FILE=str(file))
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

    assert 400 <= answer_to(service, data).status < 500

    wait_until(lambda: "event=request_refused" in service.log.read_text()[before:])
    logged = service.log.read_text()[before:]
    assert "MARKER-PROMPT" not in logged


@pytest.mark.parametrize("content", ["", "\n", "  "])
def test_an_empty_key_file_stops_the_start_instead_of_opening_the_door(tmp_path, content):
    file = tmp_path / "key"
    file.write_text(content)

    with pytest.raises(module.SettingsError, match=r"ROUTER_API_KEY_FILE: .* is empty"):
        module.Settings.from_env({"ROUTER_API_KEY_FILE": str(file)})


@pytest.mark.parametrize(
    ("script", "more"),
    [(whole(), {}), (stream(["a"]), {"stream": True}), (error(503), {}), (error(500), {}),
     (error(400), {"stream": True}), (drop_at_once, {}), (stream(["a"], after="cut"), {}),
     (pieces([chunk({"content": "a"})], "cut"), {"stream": True}),
     (pieces([chunk({"content": "a"}), sse({"error": "b"})]), {"stream": True})],
)  # fmt: skip
def test_a_request_that_has_ended_leaves_nothing_for_the_collector(app, upstream, script, more):
    upstream.default = script
    owner, calls = app.extensions["router"], []
    begin = owner.begin
    owner.begin = lambda *args: calls.append(weakref.ref((call := begin(*args)).flight)) or call
    client = LocalClient(app)
    client.chat(**more)
    gc.collect()
    gc.disable()
    try:
        client.chat(**more)
        wait_until(lambda: calls[1]() is None)  # the watcher may be looking at it
    finally:
        gc.enable()

    assert len(calls) == 2
