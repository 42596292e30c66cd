"""Which model is asked next, what a client is told when none answers, and within what time."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from conftest import KEY, LocalClient, Service, settings_for, small_routes
from upstream import (
    Upstream,
    chunk,
    drop_at_once,
    error,
    events,
    hang,
    pieces,
    plain,
    raw,
    reset_at_once,
    slow,
    stream,
    whole,
)  # fmt: skip

import router as module
from parts.logs import EventFormatter

ONE, TWO, THREE = "acme/one", "acme/two", "acme/three"
QUICK = {"connect": 1, "first_token": 0.3, "idle": 0.3, "answer": 0.3, "total": 5}
TOO_LONG = error(400, "maximum context length is 10 tokens", "context_length_exceeded")
FILTERED = error(400, "rejected by our safety system", "content_policy_violation")
Build = Callable[..., LocalClient]


def chain(*models: str, **more: Any) -> dict[str, Any]:
    """The categories of a routes file with one chain."""
    return {"conversation": {"models": list(models), "keywords": ["hello"], **more}}


def breaker(threshold: int = 1, first_retry_sec: float = 5) -> dict[str, Any]:
    return {"failure_threshold": threshold, "recovery_timeout_sec": 300,
            "first_retry_sec": first_retry_sec}  # fmt: skip


@pytest.fixture
def build(tmp_path, upstream) -> Build:
    """A client of a router whose routes file differs from the small one in the parts given."""

    def made(clock: Callable[[], float] = time.monotonic, **changes: Any) -> LocalClient:
        path = tmp_path / "routes.json"
        path.write_text(json.dumps(small_routes(upstream.url, **changes)))
        return LocalClient(module.create_app(settings_for(path), clock=clock))

    return made


@pytest.fixture
def three(build) -> LocalClient:
    return build(categories=chain(ONE, TWO, THREE))


@pytest.fixture
def lines(caplog) -> Iterator[list[str]]:
    """What the router logs, as it is written."""
    log, wording, found = logging.getLogger("llm_router"), EventFormatter(False), []

    def note(record: logging.LogRecord) -> bool:
        found.append(wording.format(record))
        return True

    caplog.set_level("INFO", "llm_router")
    log.addFilter(note)
    yield found
    log.removeFilter(note)


def circuits(client: Any) -> dict[str, Any]:
    answer = client.get("/metrics").json
    return (answer() if callable(answer) else answer)["circuit_breaker"]


def failures(client: Any) -> dict[str, int]:
    return circuits(client)["failures"]


def said_by(answer: Any) -> str:
    return answer.json["choices"][0]["message"]["content"]


def outcomes(answer: Any) -> list[str]:
    return [attempt["outcome"] for attempt in answer.json["error"]["attempts"]]


def until(happens: Callable[[], Any], seconds: float = 3.0) -> bool:
    """True as soon as `happens`, False when it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(happens())


# --- one retry on the same model -----------------------------------------------------------------


@pytest.mark.parametrize(
    "once",
    [reset_at_once, drop_at_once, error(500), error(502)],
    ids=["reset", "drop", "500", "502"],
)
def test_a_passing_fault_is_retried_on_the_same_model_after_a_pause(client, upstream, once):
    upstream.scripts[ONE] = [once, whole("second try")]

    answer = client.chat()

    first, second = upstream.requests
    assert said_by(answer) == "second try"
    assert (first.model, second.model) == (ONE, ONE)
    assert 0.29 < second.at - first.at < 1
    assert failures(client) == {}


@pytest.mark.parametrize("status", [302, 402, 403, 404, 408, 410, 429, 501, 503, 504, 529])
def test_other_faults_go_to_the_next_model_at_once(client, upstream, status):
    upstream.scripts[ONE] = error(status)

    answer = client.chat()

    assert answer.status_code == 200
    assert upstream.models_asked() == [ONE, TWO]


def test_there_is_one_retry_in_a_request_not_one_per_model(client, upstream):
    upstream.default = error(500)

    client.chat()

    assert upstream.models_asked() == [ONE, ONE, TWO]


def test_a_retry_that_fails_is_one_strike(client, upstream):
    upstream.scripts[ONE] = error(500)

    client.chat()

    assert failures(client) == {ONE: 1}


def test_only_the_second_outcome_is_judged(client, upstream):
    upstream.scripts[ONE] = [error(500), error(400, "bad parameter")]

    answer = client.chat()

    assert answer.status_code == 200
    assert upstream.models_asked() == [ONE, ONE, TWO]
    assert failures(client) == {}


def test_a_short_rate_limit_is_waited_for(client, upstream):
    upstream.scripts[ONE] = [error(429, Retry_After="1"), whole("after the wait")]

    answer = client.chat()

    first, second = upstream.requests
    assert said_by(answer) == "after the wait"
    assert 0.99 < second.at - first.at < 2
    assert failures(client) == {}


def test_a_longer_rate_limit_is_not_waited_for(client, upstream):
    upstream.scripts[ONE] = error(429, Retry_After="2.6")

    client.chat()

    assert upstream.models_asked() == [ONE, TWO]


def test_a_probe_is_not_retried(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = error(500)
    client.chat()
    upstream.requests.clear()

    clock += 5
    client.chat()

    assert upstream.models_asked() == [ONE, TWO]


def test_a_retry_that_would_end_after_the_total_limit_is_not_made(build, upstream):
    client = build(timeouts_sec={**QUICK, "total": 0.2})
    upstream.scripts[ONE] = error(500)

    client.chat()

    assert upstream.models_asked() == [ONE, TWO]


# --- second opinions -----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_gets_a_second_opinion_and_no_strike(client, upstream, status):
    upstream.scripts[ONE] = error(status, "bad parameter")

    answer = client.chat()

    assert answer.status_code == 200
    assert upstream.models_asked() == [ONE, TWO]
    assert failures(client) == {}


@pytest.mark.parametrize("status", [400, 422])
def test_two_refusals_end_the_walk_and_the_first_is_returned(three, upstream, status):
    upstream.scripts[ONE] = error(status, "the first text")
    upstream.scripts[TWO] = error(400, "the second text")

    answer = three.chat()

    assert answer.status_code == status
    assert answer.json["error"]["message"] == "the first text"
    assert outcomes(answer) == ["refused", "refused"]
    assert upstream.models_asked() == [ONE, TWO]


def test_a_second_opinion_that_fails_goes_on(three, upstream):
    upstream.scripts[ONE] = error(400, "bad parameter")
    upstream.scripts[TWO] = error(503)

    answer = three.chat()

    assert answer.status_code == 200
    assert upstream.models_asked() == [ONE, TWO, THREE]


def test_a_lone_refusal_among_failures_is_not_the_clients_to_mend(client, upstream):
    upstream.scripts[ONE] = error(400, "bad parameter")
    upstream.scripts[TWO] = error(503)

    answer = client.chat()

    assert answer.status_code == 500
    assert answer.json["error"]["code"] == "all_models_failed"


@pytest.mark.parametrize(
    ("first", "second"), [("model `x` not found", "model `y` not found"), ("gone", "gone too")]
)
def test_two_404s_are_returned_as_the_first_of_them(client, upstream, first, second):
    upstream.scripts[ONE] = error(404, first)
    upstream.scripts[TWO] = error(404, second)

    answer = client.chat()

    assert answer.status_code == 404
    assert answer.json["error"]["message"] == first


@pytest.mark.parametrize("streams", [False, True])
def test_an_empty_answer_gets_a_second_opinion_and_no_strike(client, upstream, streams):
    upstream.scripts[ONE] = whole("")
    upstream.scripts[TWO] = whole("full")

    answer = client.chat(stream=streams)

    assert b"full" in answer.data
    assert answer.headers["X-Router-Model"] == TWO
    assert failures(client) == {}


@pytest.mark.parametrize("streams", [False, True])
def test_two_empty_answers_are_passed_on(three, upstream, streams):
    upstream.default = whole("")

    answer = three.chat(stream=streams)

    assert answer.status_code == 200
    assert b'"finish_reason": "stop"' in answer.data
    assert upstream.models_asked() == [ONE, TWO]
    assert failures(three) == {}


@pytest.mark.parametrize("streams", [False, True])
def test_an_empty_answer_is_better_than_an_error(client, upstream, streams):
    upstream.scripts[ONE] = whole("")
    upstream.scripts[TWO] = error(503)

    answer = client.chat(stream=streams)

    assert answer.status_code == 200
    assert answer.headers["X-Router-Model"] == ONE


@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_an_empty_answer_that_says_why_is_an_answer(client, upstream, finish):
    upstream.scripts[ONE] = whole("", finish_reason=finish)

    client.chat()

    assert upstream.models_asked() == [ONE]


# --- context length, content filter --------------------------------------------------------------


@pytest.mark.parametrize("refusal", [TOO_LONG, error(413), error(400, "prompt is too long")])
def test_a_long_prompt_is_rescued_by_the_next_model_when_no_size_is_known(
    client, upstream, refusal
):
    upstream.scripts[ONE] = refusal

    answer = client.chat()

    assert answer.headers["X-Router-Model"] == TWO
    assert failures(client) == {}


def test_a_model_known_to_be_no_larger_is_passed_over(build, upstream):
    sizes = {ONE: {"context": 8000}, TWO: {"context": 8000}, THREE: {"context": 9000}}
    client = build(models=sizes, categories=chain(ONE, TWO, THREE))
    upstream.scripts[ONE] = TOO_LONG

    client.chat()

    assert upstream.models_asked() == [ONE, THREE]


def test_a_model_of_unknown_size_is_tried_for_a_long_prompt(build, upstream):
    client = build(models={ONE: {"context": 8000}}, categories=chain(ONE, TWO))
    upstream.scripts[ONE] = TOO_LONG

    assert client.chat().headers["X-Router-Model"] == TWO


@pytest.mark.parametrize(
    ("first", "second"), [(TOO_LONG, TOO_LONG), (TOO_LONG, error(503)), (error(503), TOO_LONG)]
)
def test_a_context_length_refusal_is_returned_whatever_else_failed(client, upstream, first, second):
    upstream.scripts[ONE] = first
    upstream.scripts[TWO] = second

    answer = client.chat()

    assert answer.status_code == 400
    assert answer.json["error"]["code"] == "context_length_exceeded"
    assert answer.json["error"]["message"] == "maximum context length is 10 tokens"


def test_the_first_of_several_context_length_refusals_is_returned(client, upstream):
    upstream.scripts[ONE] = error(413, "the first text")
    upstream.scripts[TWO] = TOO_LONG

    answer = client.chat()

    assert answer.status_code == 413
    assert answer.json["error"]["message"] == "the first text"


@pytest.mark.parametrize(
    "refusal",
    [
        FILTERED,
        error(403, "flagged by moderation"),
        plain(200, b'{"error": {"code": 403, "message": "x", "metadata": {"reasons": ["hate"]}}}'),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_content_filter_is_returned_as_400_after_one_attempt(client, upstream, refusal, streams):
    upstream.default = refusal

    answer = client.chat(stream=streams)

    assert answer.status_code == 400
    assert answer.json["error"]["code"] == "content_filter"
    assert upstream.models_asked() == [ONE]
    assert failures(client) == {}


# --- keys, money, unknown models -----------------------------------------------------------------


def two_upstreams(url: str) -> dict[str, Any]:
    """Models one and two at one upstream, three at another."""
    other = {"base_url": url.replace("/v1", "/other"), "api_key_env": "TEST_API_KEY"}
    local = {"base_url": url, "api_key_env": "TEST_API_KEY"}
    return {"upstreams": {"local": local, "other": other},
            "models": {THREE: {"upstream": "other"}},
            "categories": chain(ONE, TWO, THREE)}  # fmt: skip


@pytest.mark.parametrize("refusal", [error(401), error(403, "your API key is disabled")])
def test_a_refused_key_skips_all_models_of_that_upstream(build, upstream, refusal):
    client = build(**two_upstreams(upstream.url))
    upstream.scripts[ONE] = refusal

    answer = client.chat()

    assert answer.headers["X-Router-Model"] == THREE
    assert upstream.models_asked() == [ONE, THREE]
    assert failures(client) == {}


@pytest.mark.parametrize(
    "refusal", [error(401), plain(200, b'{"error": {"code": 401, "message": "User not found."}}')]
)
def test_a_refused_key_is_shown_in_health_until_it_is_taken_again(client, upstream, refusal):
    upstream.default = refusal
    client.chat()
    refused = client.get("/health").json["upstreams"]["local"]

    upstream.reset()
    client.chat()

    assert "key_refused_since" in refused
    assert "key_refused_since" not in client.get("/health").json["upstreams"]["local"]


@pytest.mark.parametrize("status", [401, 402, 403])
def test_the_client_never_sees_an_upstreams_401_402_or_403(client, upstream, status):
    upstream.default = error(status, "no", x_should_retry="true")

    answer = client.chat()

    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert failures(client) == {}


def test_payment_goes_on_within_the_same_upstream(client, upstream):
    upstream.scripts[ONE] = error(402, "needs more credits")

    assert client.chat().headers["X-Router-Model"] == TWO
    assert failures(client) == {}


@pytest.mark.parametrize(
    ("message", "strikes"), [("The model `x` does not exist", {ONE: 1}), ("Not Found", {})]
)
def test_a_404_is_a_strike_when_it_says_that_the_model_is_unknown(
    client, upstream, message, strikes
):
    upstream.scripts[ONE] = error(404, message)

    assert client.chat().headers["X-Router-Model"] == TWO
    assert failures(client) == strikes


# --- Retry-After, circuits -----------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_a_model_that_said_when_to_come_back_is_left_alone_until_then(
    build, upstream, clock, status
):
    client = build(clock)
    upstream.scripts[ONE] = error(status, Retry_After="60")
    asked = []

    for later_s in (0, 59, 1):
        clock += later_s
        upstream.requests.clear()
        client.chat()
        asked.append(upstream.models_asked())

    assert asked == [[ONE, TWO], [TWO], [ONE, TWO]]


def test_a_hold_is_never_longer_than_recovery_timeout(build, upstream, clock):
    client = build(clock)
    upstream.scripts[ONE] = error(429, Retry_After="86400")

    client.chat()

    assert circuits(client)["open_circuits"][ONE]["retry_in_sec"] == 300


def test_an_open_circuit_is_passed_over_and_probed_by_one_request(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = [error(503), whole("back")]
    client.chat()

    before = client.chat().headers["X-Router-Model"]
    clock += 5
    after = client.chat().headers["X-Router-Model"]

    assert (before, after) == (TWO, ONE)
    assert circuits(client)["open_circuits"] == {}


def test_when_every_circuit_is_open_the_one_due_soonest_is_probed_now(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = error(503)
    client.chat(model=TWO)
    upstream.scripts[TWO] = [error(503), whole("back")]
    client.chat(model=TWO)
    clock += 1
    client.chat(model=ONE)
    upstream.requests.clear()

    answer = client.chat()

    assert said_by(answer) == "back"
    assert upstream.models_asked() == [TWO]


def test_an_early_probe_that_fails_is_the_only_attempt(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.default = error(503)
    client.chat()
    upstream.requests.clear()

    answer = client.chat()

    assert answer.status_code == 500
    assert upstream.models_asked() == [ONE]


def test_no_early_probe_is_made_after_an_attempt(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.default = error(503)
    client.chat(model=TWO)
    upstream.requests.clear()

    client.chat()

    assert upstream.models_asked() == [ONE]


def test_who_comes_while_the_only_probe_is_in_the_air_gets_a_503(build, upstream):
    client = build(circuit_breaker=breaker(), categories=chain(ONE))
    gate = threading.Event()
    upstream.scripts[ONE] = [error(503), lambda p, r: gate.wait(9) and whole("back")(p, r)]
    client.chat()

    with ThreadPoolExecutor(1) as pool:
        probe = pool.submit(client.chat)
        until(lambda: len(upstream.requests) == 2)
        shown, refused = circuits(client)["open_circuits"][ONE], client.chat()
        gate.set()

    assert shown["state"] == "half-open"
    assert refused.status_code == 503
    assert refused.json["error"]["code"] == "all_circuits_open"
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert said_by(probe.result()) == "back"


@pytest.mark.parametrize("path", ["reset/acme/one", "reset/one", "reset-all"])
def test_a_reset_lets_a_model_be_asked_at_once(build, upstream, clock, path):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = [error(503), whole("back")]
    client.chat()

    client.post(f"/circuit-breaker/{path}")

    assert said_by(client.chat()) == "back"


@pytest.mark.parametrize("script", [error(400), error(401), error(402), TOO_LONG, FILTERED])
def test_a_clients_mistake_never_opens_a_circuit(build, upstream, script):
    client = build(circuit_breaker=breaker())
    upstream.default = script

    statuses = [client.chat().status_code for _ in range(4)]

    assert set(statuses) <= {400, 500}
    assert circuits(client)["open_circuits"] == {}
    assert failures(client) == {}


def test_a_stream_that_breaks_after_its_commit_is_a_strike(client, upstream):
    upstream.scripts[ONE] = pieces([chunk({"content": "half"})], after="cut")

    client.chat(stream=True)

    assert failures(client) == {ONE: 1}


def test_the_circuit_of_a_model_taken_out_by_hand_is_forgotten(build, upstream, clock, tmp_path):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = error(503)
    client.chat()
    path = tmp_path / "routes.json"

    path.write_text(json.dumps(small_routes(upstream.url, models={}, categories=chain(TWO))))
    clock += 1
    client.chat()

    assert circuits(client)["open_circuits"] == {}


# --- final answers -------------------------------------------------------------------------------


def test_a_500_says_who_was_asked_and_that_asking_again_is_no_use(client, upstream):
    upstream.scripts[ONE] = error(503)
    upstream.scripts[TWO] = plain(200, b"<html>", "text/html")

    answer = client.chat()

    tried = answer.json["error"]["attempts"]
    assert answer.status_code == 500
    assert answer.json["error"]["code"] == "all_models_failed"
    assert answer.headers["x-should-retry"] == "false"
    assert [(a["model"], a["outcome"], a["status"]) for a in tried] == [
        (ONE, "server_error", 503), (TWO, "not_an_answer", 200),
    ]  # fmt: skip
    assert all(a["ms"] >= 0 for a in tried)
    assert answer.headers["X-Router-Attempts"] == "2"


@pytest.mark.parametrize("streams", [False, True])
def test_a_stream_that_nobody_begins_has_a_true_status(client, upstream, streams):
    upstream.default = error(503)

    answer = client.chat(stream=streams)

    assert answer.status_code == 500
    assert answer.content_type == "application/json"


def test_a_429_tells_the_soonest_time(build, upstream, clock):
    client = build(clock)
    upstream.scripts[ONE] = error(429, Retry_After="50")
    upstream.scripts[TWO] = error(429, Retry_After="20")

    asked, skipped = client.chat(), client.chat()

    assert [asked.status_code, skipped.status_code] == [429, 429]
    assert [asked.headers["Retry-After"], skipped.headers["Retry-After"]] == ["20", "20"]
    assert upstream.models_asked() == [ONE, TWO]
    assert outcomes(asked) == ["rate_limited", "rate_limited"]


def test_a_429_without_a_time_says_one_second_at_least(client, upstream):
    upstream.default = error(429)

    assert client.chat().headers["Retry-After"] == "1"


def test_a_rate_limit_beside_another_failure_is_a_500(client, upstream):
    upstream.scripts[ONE] = error(429)
    upstream.scripts[TWO] = error(503)

    assert client.chat().status_code == 500


def test_a_503_never_asks_to_wait_longer_than_30_seconds(build, upstream, clock):
    client = build(clock)
    upstream.default = error(503, Retry_After="200")
    client.chat()

    answer = client.chat()

    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "30"
    assert upstream.models_asked() == [ONE, TWO]


@pytest.mark.parametrize(
    "script", [error(400), error(401), error(404), error(429), error(503), TOO_LONG, FILTERED]
)
def test_every_refusal_has_the_envelope_and_our_headers(client, upstream, script):
    upstream.default = script

    answer = client.chat()

    assert answer.json["error"].keys() == {"message", "type", "param", "code", "attempts"}
    assert answer.headers["X-Router-Category"] == "conversation"
    assert answer.headers["X-Request-Id"]


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_secrets_in_an_upstreams_text_are_masked(client, upstream, lines, status):
    upstream.default = error(status, f"no {KEY} Bearer abcdefgh sk-or-v1-0123456789abcdef here")

    answer = client.chat()

    told = answer.get_data(as_text=True) + str(answer.headers) + "".join(lines)
    assert answer.status_code == status
    assert "here" in answer.json["error"]["message"]
    assert not [s for s in (KEY, "abcdefgh", "0123456789abcdef") if s in told]


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (hang, "first_token"),
        (pieces([b": OPENROUTER PROCESSING\n\n", 0.1] * 20), "first_token"),
        (pieces([chunk({"role": "assistant", "content": ""})], after="hang"), "first_token"),
    ],
    ids=["no-headers", "comments", "a-role-alone"],
)
def test_first_token_ends_a_stream_that_does_not_begin(build, upstream, script, outcome):
    client = build(timeouts_sec=QUICK)
    upstream.scripts[ONE] = script
    began = time.monotonic()

    answer = client.chat(stream=True)

    recent = client.get("/metrics").json["recent_requests"][0]["attempts"]
    assert answer.headers["X-Router-Model"] == TWO
    assert recent[0]["outcome"] == outcome
    assert time.monotonic() - began < 1.5
    assert failures(client) == {ONE: 1}


@pytest.mark.parametrize(
    "script",
    [hang, pieces([b" ", 0.05] * 40), slow(2, whole("late"))],
    ids=["hang", "trickle", "late"],
)
def test_answer_ends_a_whole_answer_that_does_not_come(build, upstream, script):
    client = build(timeouts_sec=QUICK)
    upstream.scripts[ONE] = script
    began = time.monotonic()

    answer = client.chat()

    assert answer.headers["X-Router-Model"] == TWO
    assert time.monotonic() - began < 1.5
    assert failures(client) == {ONE: 1}


@pytest.mark.parametrize("streams", [False, True])
def test_the_last_usable_candidate_is_waited_for(build, upstream, streams):
    client = build(timeouts_sec=QUICK)
    upstream.scripts[ONE] = error(503)
    upstream.scripts[TWO] = slow(0.8, whole("late but here"))

    answer = client.chat(stream=streams)

    assert b"late but here" in answer.data
    assert TWO not in failures(client)


@pytest.mark.parametrize("streams", [False, True])
def test_a_candidate_followed_only_by_open_circuits_is_the_last_one(build, upstream, streams):
    client = build(timeouts_sec=QUICK, circuit_breaker=breaker(first_retry_sec=60))
    upstream.scripts[TWO] = error(503)
    client.chat(model=TWO)
    upstream.scripts[ONE] = slow(0.8, whole("late but here"))

    answer = client.chat(stream=streams)

    assert b"late but here" in answer.data


@pytest.mark.parametrize("streams", [False, True])
def test_a_probe_is_not_waited_for_even_as_the_last_candidate(build, upstream, streams):
    client = build(timeouts_sec=QUICK, circuit_breaker=breaker(), categories=chain(ONE))
    upstream.scripts[ONE] = [error(503), hang]
    client.chat()
    began = time.monotonic()

    answer = client.chat(stream=streams)

    assert answer.status_code == 500
    assert outcomes(answer) == ["first_token" if streams else "answer"]
    assert time.monotonic() - began < 1.5


def test_first_token_grows_with_the_text(build, upstream):
    client = build(timeouts_sec=QUICK)
    upstream.scripts[ONE] = slow(0.8, whole("read it all"))

    answer = client.chat("hello " * 4000, stream=True)

    assert answer.headers["X-Router-Model"] == ONE


@pytest.mark.parametrize("streams", [False, True])
def test_total_ends_the_request_and_blames_nobody(build, upstream, streams):
    client = build(timeouts_sec={**QUICK, "total": 0.8}, categories=chain(ONE, TWO, THREE))
    upstream.scripts[ONE] = error(503)
    upstream.scripts[TWO] = slow(0.2, error(402))
    upstream.default = hang
    began = time.monotonic()

    answer = client.chat(stream=streams)

    assert answer.status_code == 500
    assert outcomes(answer) == ["server_error", "payment", "total"]
    assert time.monotonic() - began < 2
    assert failures(client) == {ONE: 1}


def test_total_does_not_cut_an_answer_that_has_begun(build, upstream):
    client = build(timeouts_sec={**QUICK, "total": 0.4})
    upstream.default = stream([f"w{n} " for n in range(15)], pause_s=0.05)

    answer = client.chat(stream=True)

    assert b"w14" in answer.data
    assert answer.data.endswith(b"data: [DONE]\n\n")


WHOLE = {"X-Router-Stream": "whole"}


def test_total_ends_a_held_stream_and_blames_nobody(build, upstream):
    client = build(timeouts_sec={**QUICK, "total": 0.8})
    upstream.default = stream([f"w{n} " for n in range(40)], pause_s=0.05)

    answer = client.chat(stream=True, headers=WHOLE)

    assert answer.status_code == 500
    assert outcomes(answer) == ["total"]
    assert failures(client) == {}


@pytest.mark.parametrize("after", ["cut", "hang", "reset"])
def test_a_held_stream_that_breaks_goes_to_the_next_model(build, upstream, after):
    client = build(timeouts_sec=QUICK)
    upstream.scripts[ONE] = pieces([chunk({"content": "half"}), 0.05], after=after)
    upstream.scripts[TWO] = stream(["all ", "of it"])

    answer = client.chat(stream=True, headers=WHOLE)

    assert b"half" not in answer.data
    assert b"of it" in answer.data
    assert failures(client) == {ONE: 1}


@pytest.mark.parametrize("kind", ["first_token", "answer"])
@pytest.mark.parametrize("where", ["model", "category"])
def test_a_model_or_a_category_may_allow_more_time(build, upstream, kind, where):
    more = {"timeouts_sec": {kind: 3}}
    of_model, of_category = (more, {}) if where == "model" else ({}, more)
    client = build(timeouts_sec=QUICK, models={ONE: of_model},
                   categories=chain(ONE, TWO, **of_category))  # fmt: skip
    upstream.scripts[ONE] = slow(0.9, whole("in its time"))

    answer = client.chat(stream=kind == "first_token")

    assert answer.headers["X-Router-Model"] == ONE


@pytest.mark.parametrize("where", ["model", "category"])
def test_a_model_or_a_category_may_allow_longer_pauses(build, upstream, where):
    more = {"timeouts_sec": {"idle": 3}}
    of_model, of_category = (more, {}) if where == "model" else ({}, more)
    client = build(timeouts_sec=QUICK, models={ONE: of_model},
                   categories=chain(ONE, TWO, **of_category))  # fmt: skip
    upstream.scripts[ONE] = pieces([chunk({"content": "a"}), 0.9, *events(["b"])])

    answer = client.chat(stream=True)

    assert answer.data.endswith(b"data: [DONE]\n\n")


def test_a_category_may_allow_less_in_all(build, upstream):
    client = build(timeouts_sec=QUICK, categories=chain(ONE, timeouts_sec={"total": 0.3}))
    upstream.scripts[ONE] = hang
    began = time.monotonic()

    answer = client.chat()

    assert outcomes(answer) == ["total"]
    assert time.monotonic() - began < 1.5


# --- what is shown -------------------------------------------------------------------------------


def test_metrics_show_strikes_before_a_circuit_opens(client, upstream):
    upstream.scripts[ONE] = error(503)

    client.chat()
    client.chat()

    assert circuits(client)["failures"] == {ONE: 2}
    assert circuits(client)["open_circuits"] == {}


def test_metrics_show_why_a_circuit_is_open_and_until_when(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = error(503)
    client.chat()

    clock += 2
    shown = circuits(client)["open_circuits"]

    since = shown[ONE].pop("since")
    assert since.startswith("20")
    assert shown == {
        ONE: {"state": "open", "retry_in_sec": 3, "reason": "server_error", "last_status": 503}
    }


def test_metrics_show_the_status_of_an_answer_that_broke_off(build, upstream):
    client = build(circuit_breaker=breaker())
    upstream.scripts[ONE] = pieces([chunk({"content": "half"})], after="cut")

    client.chat(stream=True)

    shown = circuits(client)["open_circuits"][ONE]
    assert (shown["reason"], shown["last_status"]) == ("cut", 200)


def test_each_change_of_state_is_one_line_in_the_log(build, upstream, clock, lines):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = [error(503), whole("back")]

    client.chat()
    client.chat()
    clock += 5
    client.chat()

    opened = [line for line in lines if "event=circuit_opened" in line]
    closed = [line for line in lines if "event=circuit_closed" in line]
    assert [ONE in line and "server_error" in line and "503" in line for line in opened] == [True]
    assert [ONE in line for line in closed] == [True]


# --- the real openai SDK, a client that leaves ---------------------------------------------------

HELLO: dict[str, Any] = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}


def sdk_of(service: Service) -> openai.OpenAI:
    """The SDK as people use it: two retries of its own."""
    return openai.OpenAI(base_url=service.base + "/v1", api_key="x", max_retries=2)


@pytest.mark.parametrize(
    ("script", "calls", "raised"),
    [
        (error(503), 2, openai.InternalServerError),
        (error(500), 3, openai.InternalServerError),
        (error(400), 2, openai.BadRequestError),
        (error(422), 2, openai.UnprocessableEntityError),
        (error(401), 1, openai.InternalServerError),
        (error(402), 2, openai.InternalServerError),
        (TOO_LONG, 2, openai.BadRequestError),
        (FILTERED, 1, openai.BadRequestError),
    ],
    ids=["503", "500", "400", "422", "401", "402", "context", "filter"],
)
def test_one_call_of_the_sdk_walks_the_chain_once(service, upstream, script, calls, raised):
    upstream.default = script
    began = time.monotonic()

    with sdk_of(service) as sdk, pytest.raises(raised):
        sdk.chat.completions.create(**HELLO)

    assert len(upstream.requests) == calls
    assert time.monotonic() - began < 2


def test_the_sdk_comes_back_when_a_rate_limit_ends(service, upstream):
    upstream.default = error(429)
    upstream.scripts[ONE] = [error(429), whole("back")]
    began = time.monotonic()

    with sdk_of(service) as sdk:
        answer = sdk.chat.completions.create(**HELLO)

    assert answer.choices[0].message.content == "back"
    assert upstream.models_asked() == [ONE, TWO, ONE]
    assert 0.9 < time.monotonic() - began < 3


def leave_after(service: Service, seconds: float, **more: Any) -> None:
    """Ask, wait for `seconds`, and hang up."""
    body = {"messages": [{"role": "user", "content": "hello"}], **more}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: \
application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as sock:
        sock.sendall(head.encode() + data)
        time.sleep(seconds)


def in_air(service: Service) -> int:
    return service.get("/metrics").json()["in_flight"]


@pytest.mark.parametrize(
    "script",
    [
        hang,
        pieces([], after="hang"),
        pieces([chunk({"role": "assistant"})], after="hang"),
        pieces([chunk({"content": "half"})], after="hang"),
    ],
    ids=["before-headers", "before-events", "before-a-token", "after-the-commit"],
)
@pytest.mark.parametrize("streams", [False, True])
def test_the_upstream_is_left_when_the_client_leaves(service, upstream: Upstream, script, streams):
    upstream.scripts[TWO] = script
    cancelled = service.get("/metrics").json()["requests"]["cancelled"]

    leave_after(service, 0.1, stream=streams, model=TWO)

    assert until(lambda: upstream.left, 1.0)
    assert until(lambda: in_air(service) == 0)
    assert failures(service) == {}
    assert service.get("/metrics").json()["requests"]["cancelled"] == cancelled + 1


def test_the_pause_before_a_retry_ends_when_the_client_leaves(service, upstream):
    upstream.scripts[ONE] = error(429, Retry_After="2.4")

    leave_after(service, 0.3)

    assert until(lambda: in_air(service) == 0, 1.0)
    assert upstream.models_asked() == [ONE]


CLOSING = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
SILENT = {  # heads after which http.client lets go of the socket
    "with a length": CLOSING + b"Content-Length: 900\r\n\r\n",
    "in chunks": CLOSING + b"Transfer-Encoding: chunked\r\n\r\n",
    "with neither": CLOSING + b"\r\n",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 900\r\n\r\n",
    "a refusal": CLOSING.replace(b"200 OK", b"500 No") + b"Content-Length: 900\r\n\r\n{",
}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("head", SILENT.values(), ids=SILENT)
def test_limits_hold_for_an_answer_that_ends_with_its_connection(build, upstream, head, streams):
    upstream.scripts[ONE] = raw(head, after="hang")
    client = build(timeouts_sec=QUICK)
    began = time.monotonic()

    answer = client.chat(stream=streams)

    assert answer.status_code == 200
    assert answer.headers["X-Router-Model"] == TWO
    assert time.monotonic() - began < 2
