"""Signs of life while no model answers: in time, failover behind them, and an honest end."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
import weakref
from typing import Any

import pytest
from formats import FORMATS, read_events
from helpers import connected, figures, head_of, in_flight, last_attempts, wait_until
from test_dialects import SPEAKS_ALL
from upstream import error, hang, pieces, slow

from parts.dialects import DIALECT_AT
from parts.keepalive import Walk

EVERY = tuple(FORMATS)
CHAIN = ["acme/one", "acme/two"]
SLOW = {"connect": 2, "first_token": 0.9, "idle": 5, "answer": 5, "total": 8}


def categories(keepalive_s: float) -> dict[str, Any]:
    alive = {"models": CHAIN, "keywords": ["hello"], "keepalive_sec": keepalive_s}
    return {"conversation": alive, "code": {"models": CHAIN, "keywords": ["python"]}}


@pytest.fixture(scope="module")
def service(serve, shared_upstream):
    local = {"base_url": shared_upstream.url, "api_key_env": "TEST_API_KEY", "speaks": SPEAKS_ALL}
    return serve(
        categories=categories(0.2), timeouts_sec=SLOW, upstreams={"local": local},
        circuit_breaker={"failure_threshold": 100, "recovery_timeout_sec": 9, "first_retry_sec": 9},
    )  # fmt: skip


def ask(service: Any, form: Any, text: str = "hello", whole: bool = False) -> Any:
    headers = {"X-Router-Stream": "whole"} if whole else {}
    return service.post(form.path, form.ask(text, stream=True), headers=headers, stream=True)


def read(answer: Any) -> tuple[bytes, float]:
    """All that came, and the longest time in which nothing did."""
    data, at, longest_s = b"", time.monotonic(), 0.0
    for piece in answer.iter_content(None):
        now = time.monotonic()
        data, longest_s, at = data + piece, max(longest_s, now - at), now
    return data, longest_s


def sign(form: Any) -> bytes:
    return DIALECT_AT[form.path].sign


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_a_slow_chain_shows_signs_of_life_and_fails_over_behind_them(
    service, upstream, form, whole
):
    upstream.scripts["acme/one"] = hang
    upstream.scripts["acme/two"] = slow(0.5, form.good(["a ", "good ", "answer"]))

    answer = ask(service, form, whole=whole)
    data, _ = read(answer)

    assert answer.status_code == 200
    assert not {"X-Router-Model", "X-Router-Attempts"} & answer.headers.keys()
    assert answer.headers["X-Router-Category"] == "conversation"
    assert data.startswith(sign(form))
    assert form.read_stream(data.replace(sign(form), b"")) == ("a good answer", "", True)
    assert form.read_stream(data).text == "a good answer"
    wait_until(lambda: in_flight(service) == 0)
    assert last_attempts(service) == [("acme/one", "first_token"), ("acme/two", "success")]


def test_a_chats_sign_has_all_that_strict_clients_want_of_a_chunk():
    [chunk] = read_events(sign(FORMATS["chat"]))

    assert {name: type(chunk[name]) for name in ("id", "model", "created", "choices")} == {
        "id": str, "model": str, "created": int, "choices": list,
    }  # fmt: skip
    assert (chunk["id"], chunk["model"]) == ("", ""), "nothing is made up"
    assert chunk["choices"] == [{"index": 0, "delta": {}, "finish_reason": None}]


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_silence_in_mid_answer_is_filled_too(service, upstream, form):
    upstream.default = pieces([*form.begun(["a "]), 1.5, *form.end()])

    data, longest_s = read(ask(service, form))

    assert data.count(sign(form)) > (form.name == "messages")  # which has one of its own
    assert form.read_stream(data)[1:] == ("", True)
    assert longest_s < 1.2


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_when_nobody_answers_the_stream_ends_with_the_formats_error(service, upstream, form):
    upstream.default = slow(0.4, form.refuses(503))

    data, _ = read(ask(service, form))

    told = form.read_stream(data)
    assert told.error.startswith("no model of conversation answered: acme/one failed")
    assert (told.text, told.complete) == ("", False)
    assert read_events(data)[-1]["error"]["message"] == told.error, "where OpenAI's SDKs look"
    wait_until(lambda: in_flight(service) == 0)
    entry = figures(service)["recent_requests"][0]
    assert (entry["outcome"], entry["status"]) == ("failed", 500)


@pytest.mark.parametrize("form", FORMATS.values(), ids=EVERY)
def test_what_is_quick_has_its_true_status_and_all_headers(service, upstream, form):
    upstream.default = form.good()
    good = ask(service, form)
    upstream.default = form.refuses(503)
    bad = ask(service, form)

    assert good.headers["X-Router-Model"] == "acme/one"
    assert not read(good)[0].startswith(sign(form))
    assert bad.status_code == {"messages": 503, "responses": 400}.get(form.name, 500)
    assert bad.headers["X-Router-Attempts"] == "2"


def test_other_categories_wait_in_silence(service, upstream):
    form = FORMATS["chat"]
    upstream.default = slow(0.6, form.good())

    data, _ = read(ask(service, form, "python"))

    assert sign(form) not in data


def test_a_client_that_leaves_ends_the_walk(service, upstream):
    upstream.default = hang
    body = json.dumps(FORMATS["chat"].ask(stream=True)).encode()

    with connected(service, head_of("POST", "/v1/chat/completions", body=body)) as sock:
        wait_until(lambda: b"delta" in sock.recv(65536))

    wait_until(lambda: in_flight(service) == 0, 2)
    wait_until(lambda: upstream.left)
    assert figures(service)["recent_requests"][0]["outcome"] == "cancelled"


def test_a_response_that_is_never_started_ends_its_walk(build, upstream):
    client = build(categories=categories(0.1), timeouts_sec=SLOW)
    upstream.default = hang

    answer = client.flask.post(
        "/v1/chat/completions", json=FORMATS["chat"].ask(stream=True), buffered=False
    )
    answer.close()

    assert in_flight(client) == 0


def test_it_is_shown_and_checked(build):
    client = build(categories=categories(3))

    assert client.get("/config").json["categories"]["conversation"]["keepalive_sec"] == 3
    assert client.get("/config").json["categories"]["code"]["keepalive_sec"] is None


@pytest.mark.parametrize("status", [500, 503])
def test_codex_is_told_by_the_code_whether_to_ask_again(service, upstream, status):
    form = FORMATS["responses"]
    upstream.default = slow(0.4, error(status, "went wrong"))

    data, _ = read(ask(service, form))

    assert re.search(rb'"code": "invalid_prompt"', data)


def alone(build: Any, upstream: Any) -> Any:
    local = {"base_url": upstream.url, "api_key_env": "TEST_API_KEY", "speaks": SPEAKS_ALL}
    return build(categories=categories(0.1), timeouts_sec=SLOW, upstreams={"local": local})


def test_without_a_thread_the_answer_comes_all_the_same(build, upstream, monkeypatch):
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name == "walk":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)

    answer = alone(build, upstream).chat(stream=True)

    assert FORMATS["chat"].read_stream(answer.data).complete


def test_a_client_that_leaves_leaves_nothing_for_the_collector(build, upstream, monkeypatch):
    upstream.default, walks, begin = hang, [], Walk.__init__

    def noted(self: Walk, *args: Any) -> None:
        walks.append(weakref.ref(self))
        begin(self, *args)

    monkeypatch.setattr(Walk, "__init__", noted)
    client = alone(build, upstream)
    gc.collect()
    gc.disable()
    try:
        answer = client.flask.post("/v1/chat/completions", json=FORMATS["chat"].ask(stream=True))
        answer.close()
        del answer
        wait_until(lambda: walks[0]() is None)
    finally:
        gc.enable()
