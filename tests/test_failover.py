"""Which model is asked next, what a client is told when none answers, and within what time."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import KEY, LocalClient, small_routes
from helpers import circuits, failures, in_turn, open_circuits, wait_until
from upstream import (
    chunk,
    drop_at_once,
    error,
    events,
    hang,
    pieces,
    plain,
    reset_at_once,
    slow,
    stream,
    whole,
)  # fmt: skip

ONE, TWO, THREE = "acme/one", "acme/two", "acme/three"
QUICK = {"connect": 1, "first_token": 0.3, "idle": 0.3, "answer": 0.3, "total": 5}
TOO_LONG = error(400, "maximum context length is 10 tokens", "context_length_exceeded")
FILTERED = error(400, "rejected by our safety system", "content_policy_violation")
GOOD = whole("well")


def chain(*models: str, **more: Any) -> dict[str, Any]:
    """The categories of a routes file with one chain."""
    return {"conversation": {"models": list(models), "keywords": ["hello"], **more}}


def breaker(threshold: int = 1, first_retry_sec: float = 5) -> dict[str, Any]:
    return {"failure_threshold": threshold, "recovery_timeout_sec": 300,
            "first_retry_sec": first_retry_sec}  # fmt: skip


@pytest.fixture
def three(build) -> LocalClient:
    return build(categories=chain(ONE, TWO, THREE))


def said_by(answer: Any) -> str:
    return answer.json["choices"][0]["message"]["content"]


def outcomes(answer: Any) -> list[str]:
    return [attempt["outcome"] for attempt in answer.json["error"]["attempts"]]


# --- who is asked ------------------------------------------------------------------------------

# what one and two do, whom that leads to (the last of them answers), who gets a strike
WALKS: dict[str, tuple[Any, Any, list[str], list[str]]] = {
    "a reset is tried again": ([reset_at_once, GOOD], GOOD, [ONE, ONE], []),
    "a drop is tried again": ([drop_at_once, GOOD], GOOD, [ONE, ONE], []),
    "a 500 is tried again": ([error(500), GOOD], GOOD, [ONE, ONE], []),
    "a 502 is tried again": ([error(502), GOOD], GOOD, [ONE, ONE], []),
    "once": (error(500), GOOD, [ONE, ONE, TWO], [ONE]),
    "once in a request": (error(500), error(500), [ONE, ONE, TWO, THREE], [ONE, TWO]),
    "and judged by its second end": ([error(500), error(400)], GOOD, [ONE, ONE, TWO], []),
    **{f"a {status} is not": (error(status), GOOD, [ONE, TWO], [ONE])
       for status in (302, 408, 429, 501, 503, 504, 529)},
    **{f"a {status} is not and is no strike": (error(status), GOOD, [ONE, TWO], [])
       for status in (400, 402, 403, 404, 410, 413, 422)},
    "a rate limit of over 2.5 s": (error(429, Retry_After="2.6"), GOOD, [ONE, TWO], [ONE]),
    "an unknown model": (error(404, "The model `x` does not exist"), GOOD, [ONE, TWO], [ONE]),
    "a refusal and a failure": (error(400), error(503), [ONE, TWO, THREE], [TWO]),
    "a prompt that is too long": (TOO_LONG, GOOD, [ONE, TWO], []),
    "the same in words alone": (error(400, "prompt is too long"), GOOD, [ONE, TWO], []),
    "an empty answer": (whole(""), GOOD, [ONE, TWO], []),
    "an empty stream": (whole(""), GOOD, [ONE, TWO], []),
    "an empty answer of no length": (whole("", finish_reason="length"), GOOD, [ONE], []),
    "an empty answer that was filtered": (whole("", finish_reason="content_filter"), GOOD, [ONE],
                                          []),
}  # fmt: skip


@pytest.mark.parametrize(("streams", "one", "two", "asked", "struck"), in_turn(WALKS, True, False))
def test_a_failure_leads_to_the_same_model_or_the_next(three, upstream, streams, one, two, asked,
                                                       struck):  # fmt: skip
    upstream.scripts |= {ONE: one, TWO: two}

    answer = three.chat(stream=streams)

    assert answer.status_code == 200
    assert answer.headers["X-Router-Model"] == asked[-1]
    assert upstream.models_asked() == asked
    assert failures(three) == dict.fromkeys(struck, 1)


@pytest.mark.parametrize(
    ("once", "at_least_s"), [(error(500), 0.29), (error(429, Retry_After="1"), 0.99)]
)
def test_a_model_is_tried_again_after_a_pause(client, upstream, once, at_least_s):
    upstream.scripts[ONE] = [once, whole("after the wait")]

    answer = client.chat()

    first, second = upstream.requests
    assert said_by(answer) == "after the wait"
    assert (first.model, second.model) == (ONE, ONE)
    assert at_least_s < second.at - first.at < at_least_s + 1
    assert failures(client) == {}


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


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("twice", "status", "told"),
    [(whole(""), 200, b'"finish_reason": "stop"'), (error(400, "bad parameter"), 400, b"bad")],
)
def test_two_doubtful_ends_are_passed_on(three, upstream, twice, status, told, streams):
    upstream.default = twice

    answer = three.chat(stream=streams)

    assert answer.status_code == status
    assert told in answer.data
    assert upstream.models_asked() == [ONE, TWO]
    assert failures(three) == {}


@pytest.mark.parametrize("streams", [False, True])
def test_an_empty_answer_is_better_than_an_error(client, upstream, streams):
    upstream.scripts |= {ONE: whole(""), TWO: error(503)}

    answer = client.chat(stream=streams)

    assert answer.status_code == 200
    assert answer.headers["X-Router-Model"] == ONE


@pytest.mark.parametrize(
    ("sizes", "asked"),
    [({ONE: 8000, TWO: 8000, THREE: 9000}, [ONE, THREE]), ({ONE: 8000, THREE: 9000}, [ONE, TWO])],
)
def test_a_model_known_to_be_no_larger_is_passed_over_for_a_long_prompt(
    build, upstream, sizes, asked
):
    models = {model: {"context": size} for model, size in sizes.items()}
    client = build(models=models, categories=chain(ONE, TWO, THREE))
    upstream.scripts[ONE] = TOO_LONG

    client.chat()

    assert upstream.models_asked() == asked


@pytest.mark.parametrize("refusal", [error(401), error(403, "your API key is disabled")])
def test_a_refused_key_skips_all_models_of_that_upstream(build, upstream, refusal):
    local = {"base_url": upstream.url, "api_key_env": "TEST_API_KEY"}
    other = {**local, "base_url": upstream.url.replace("/v1", "/other")}
    client = build(upstreams={"local": local, "other": other},
                   models={THREE: {"upstream": "other"}},
                   categories=chain(ONE, TWO, THREE))  # fmt: skip
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


# --- what a client is told when nobody answers ---------------------------------------------------

FAILED, LONG = "all_models_failed", "context_length_exceeded"
REASONS = b'{"error": {"code": 403, "message": "x", "metadata": {"reasons": ["hate"]}}}'
# what one and two do; status, code and text of the answer; how many were asked; open circuits
ENDS: dict[str, tuple[Any, Any, int, str, str, int, list[str]]] = {
    "two refusals": (error(400, "first text"), error(400, "second"), 400,
                     "invalid_request_error", "first text", 2, []),
    "two kinds of refusals": (error(422, "first text"), error(400, "second"), 422,
                              "invalid_request_error", "first text", 2, []),
    "two unknown models": (error(404, "model `x` not found"), error(404, "model `y` not found"),
                           404, "invalid_request_error", "`x`", 2, [ONE, TWO]),
    "two that are gone": (error(404, "gone"), error(404, "gone too"), 404,
                          "invalid_request_error", "gone", 2, []),
    "a lone refusal": (error(400), error(503), 500, FAILED, "", 2, [TWO]),
    "too long twice": (TOO_LONG, TOO_LONG, 400, LONG, "length is 10 tokens", 2, []),
    "too long, then down": (TOO_LONG, error(503), 400, LONG, "length is 10 tokens", 2, [TWO]),
    "down, then too long": (error(503), TOO_LONG, 400, LONG, "length is 10 tokens", 2, [ONE]),
    "too large, then too long": (error(413, "first text"), TOO_LONG, 413, LONG, "first text", 2,
                                 []),
    "filtered": (FILTERED, GOOD, 400, "content_filter", "safety", 1, []),
    "moderated": (error(403, "flagged"), GOOD, 400, "content_filter", "flagged", 1, []),
    "moderated in a 200": (plain(200, REASONS), GOOD, 400, "content_filter", "x", 1, []),
    "a refused key": (error(401, x_should_retry="true"), GOOD, 500, FAILED, "refused by local",
                      1, []),
    "no money": (error(402), error(402), 500, FAILED, "payment", 2, []),
    "forbidden": (error(403, "no"), error(403, "no"), 500, FAILED, "refused", 2, []),
    "down": (error(503), error(503), 500, FAILED, "failed", 2, [ONE, TWO]),
    "limited, then down": (error(429), error(503), 500, FAILED, "rate limited", 2, [ONE, TWO]),
    "limited": (error(429), error(429), 429, "rate_limited", "try again", 2, [ONE, TWO]),
}  # fmt: skip


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("one", "two", "status", "code", "text", "asked", "opened"), ENDS.values(), ids=ENDS
)
def test_the_answer_says_best_why_nobody_answered(build, upstream, one, two, status, code, text,
                                                  asked, opened, streams):  # fmt: skip
    client = build(circuit_breaker=breaker())
    upstream.scripts |= {ONE: one, TWO: two}

    answer = client.chat(stream=streams)

    told = answer.json["error"]
    assert (answer.status_code, told["code"]) == (status, code)
    assert text in told["message"]
    assert told.keys() == {"message", "type", "param", "code", "attempts"}
    assert answer.content_type == "application/json"
    assert answer.headers["X-Router-Category"] == "conversation"
    assert answer.headers["X-Request-Id"]
    assert upstream.models_asked() == [ONE, TWO][:asked]
    assert list(open_circuits(client)) == opened
    assert answer.headers.get("x-should-retry") == ("false" if status == 500 else None)


def test_a_500_says_who_was_asked(client, upstream):
    upstream.scripts |= {ONE: error(503), TWO: plain(200, b"<html>", "text/html")}

    answer = client.chat()

    tried = answer.json["error"]["attempts"]
    assert [(a["model"], a["outcome"], a["status"]) for a in tried] == [
        (ONE, "server_error", 503), (TWO, "not_an_answer", 200),
    ]  # fmt: skip
    assert all(a["ms"] >= 0 for a in tried)
    assert answer.headers["X-Router-Attempts"] == "2"


def test_a_429_tells_the_soonest_time_and_one_second_at_least(build, upstream, clock):
    client = build(clock)
    upstream.scripts |= {ONE: error(429, Retry_After="50"), TWO: error(429, Retry_After="20")}
    asked, skipped = client.chat(), client.chat()
    client.post("/circuit-breaker/reset-all")
    upstream.scripts = {ONE: error(429), TWO: error(429)}

    untimed = client.chat()

    answers = (asked, skipped, untimed)
    assert [answer.status_code for answer in answers] == [429] * 3
    assert [answer.headers["Retry-After"] for answer in answers] == ["20", "20", "1"]
    assert upstream.models_asked() == [ONE, TWO] * 2
    assert outcomes(asked) == ["rate_limited"] * 2


def test_a_503_never_asks_to_wait_longer_than_30_seconds(build, upstream, clock):
    client = build(clock)
    upstream.default = error(503, Retry_After="200")
    client.chat()

    answer = client.chat()

    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "30"
    assert upstream.models_asked() == [ONE, TWO]


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_secrets_in_an_upstreams_text_are_masked(client, upstream, lines, status):
    upstream.default = error(status, f"no {KEY} Bearer abcdefgh sk-or-v1-0123456789abcdef here")

    answer = client.chat()

    told = answer.get_data(as_text=True) + str(answer.headers) + "".join(lines)
    assert answer.status_code == status
    assert "here" in answer.json["error"]["message"]
    assert not [s for s in (KEY, "abcdefgh", "0123456789abcdef") if s in told]


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


def test_an_open_circuit_is_passed_over_and_probed_by_one_request(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = [error(503), whole("back")]
    client.chat()

    before = client.chat().headers["X-Router-Model"]
    clock += 5
    after = client.chat().headers["X-Router-Model"]

    assert (before, after) == (TWO, ONE)
    assert open_circuits(client) == {}


def test_when_every_circuit_is_open_the_one_due_soonest_is_probed_now(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts |= {ONE: error(503), TWO: [error(503), whole("back")]}
    client.chat(model=TWO)
    clock += 1
    client.chat(model=ONE)
    upstream.requests.clear()

    answer = client.chat()

    assert said_by(answer) == "back"
    assert upstream.models_asked() == [TWO]


@pytest.mark.parametrize("opened_before", [None, TWO])
def test_one_early_probe_and_no_other_after_an_attempt(build, upstream, clock, opened_before):
    client = build(clock, circuit_breaker=breaker())
    upstream.default = error(503)
    client.chat(**({"model": opened_before} if opened_before else {}))
    upstream.requests.clear()

    answer = client.chat()

    assert answer.status_code == 500
    assert upstream.models_asked() == [ONE]


def test_who_comes_while_the_only_probe_is_in_the_air_gets_a_503(build, upstream):
    client = build(circuit_breaker=breaker(), categories=chain(ONE))
    gate = threading.Event()
    upstream.scripts[ONE] = [error(503), lambda p, r: gate.wait(9) and whole("back")(p, r)]
    client.chat()

    with ThreadPoolExecutor(1) as pool:
        probe = pool.submit(client.chat)
        wait_until(lambda: len(upstream.requests) == 2)
        shown, refused = open_circuits(client)[ONE], client.chat()
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


def test_the_circuit_of_a_model_taken_out_by_hand_is_forgotten(build, routes, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts[ONE] = error(503)
    client.chat()

    routes.write_text(json.dumps(small_routes(upstream.url, models={}, categories=chain(TWO))))
    clock += 1
    client.chat()

    assert open_circuits(client) == {}


def test_metrics_show_why_a_circuit_is_open_and_until_when(build, upstream, clock):
    client = build(clock, circuit_breaker=breaker())
    upstream.scripts |= {ONE: error(503), TWO: pieces([chunk({"content": "half"})], after="cut")}
    client.chat(stream=True)

    clock += 2
    shown = open_circuits(client)

    assert all(told.pop("since").startswith("20") for told in shown.values())
    assert shown == {
        ONE: {"state": "open", "retry_in_sec": 3, "reason": "server_error", "last_status": 503},
        TWO: {"state": "open", "retry_in_sec": 3, "reason": "cut", "last_status": 200},
    }
    assert circuits(client)["failures"] == {ONE: 1, TWO: 1}


# --- limits --------------------------------------------------------------------------------------

LATE = slow(0.7, whole("late but here"))  # 0.3 s and a tick of the watcher are over by then


def test_the_last_usable_candidate_is_waited_for(build, upstream):
    client = build(timeouts_sec=QUICK)
    upstream.scripts |= {ONE: error(503), TWO: LATE}

    answer = client.chat()

    assert said_by(answer) == "late but here"
    assert TWO not in failures(client)


def test_a_candidate_followed_only_by_open_circuits_is_the_last_one(build, upstream):
    client = build(timeouts_sec=QUICK, circuit_breaker=breaker(first_retry_sec=60))
    upstream.scripts |= {ONE: LATE, TWO: error(503)}
    client.chat(model=TWO)

    answer = client.chat(stream=True)

    assert b"late but here" in answer.data


@pytest.mark.parametrize(("streams", "outcome"), [(True, "first_token"), (False, "answer")])
def test_a_probe_is_not_waited_for_even_as_the_last_candidate(build, upstream, streams, outcome):
    client = build(timeouts_sec=QUICK, circuit_breaker=breaker(), categories=chain(ONE))
    upstream.scripts[ONE] = [error(503), hang]
    client.chat()
    began = time.monotonic()

    answer = client.chat(stream=streams)

    assert answer.status_code == 500
    assert outcomes(answer) == [outcome]
    assert time.monotonic() - began < 1.5


def test_first_token_grows_with_the_text(build, upstream):
    client = build(timeouts_sec=QUICK)
    upstream.scripts[ONE] = LATE

    answer = client.chat("hello " * 4000, stream=True)

    assert answer.headers["X-Router-Model"] == ONE


def test_total_ends_the_request_and_blames_nobody(build, upstream):
    client = build(timeouts_sec={**QUICK, "total": 0.8}, categories=chain(ONE, TWO, THREE))
    upstream.scripts |= {ONE: error(503), TWO: slow(0.2, error(402))}
    upstream.default = hang
    began = time.monotonic()

    answer = client.chat(stream=True)

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


SILENT_BETWEEN = pieces([chunk({"content": "a"}), 0.7, *events(["b"])])


@pytest.mark.parametrize(
    ("where", "kind", "script"),
    [("model", "first_token", LATE), ("category", "answer", LATE), ("model", "idle",
     SILENT_BETWEEN), ("category", "idle", SILENT_BETWEEN)],
)  # fmt: skip
def test_a_model_or_a_category_may_allow_more_time(build, upstream, where, kind, script):
    more = {"timeouts_sec": {kind: 3}}
    of_model, of_category = (more, {}) if where == "model" else ({}, more)
    client = build(timeouts_sec=QUICK, models={ONE: of_model},
                   categories=chain(ONE, TWO, **of_category))  # fmt: skip
    upstream.scripts[ONE] = script

    answer = client.chat(stream=kind != "answer")

    assert answer.headers["X-Router-Model"] == ONE
    assert b'"error"' not in answer.data


def test_a_category_may_allow_less_in_all(build, upstream):
    client = build(timeouts_sec=QUICK, categories=chain(ONE, timeouts_sec={"total": 0.3}))
    upstream.scripts[ONE] = hang
    began = time.monotonic()

    answer = client.chat()

    assert outcomes(answer) == ["total"]
    assert time.monotonic() - began < 1.5
