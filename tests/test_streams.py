"""Streams through the real gunicorn: the commit, what comes after it, and whole-answer mode."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import requests
from conftest import Service, small_routes
from upstream import (
    DONE,
    Peer,
    Request,
    Upstream,
    answer_body,
    chunk,
    error,
    hang,
    pieces,
    plain,
    raw,
    reset_at_once,
    sse,
    stream,
    whole,
)  # fmt: skip

BEGIN = chunk({"role": "assistant", "content": ""})
WORD = chunk({"content": "word "})
COMMENT = b": OPENROUTER PROCESSING\n\n"
END = [chunk({}, "stop"), DONE]
OOPS = sse({"error": {"message": "upstream is sad", "code": 502}})
WHOLE = {"X-Router-Stream": "whole"}


def wait_until(is_so: Callable[[], Any], seconds: float = 5.0) -> None:
    """Return as soon as `is_so()`; fail when it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


def tool(arguments: str, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}, **more}]}


def blocks_of(data: bytes) -> list[bytes]:
    return [block + b"\n\n" for block in data.split(b"\n\n") if block]


def objects_of(data: bytes) -> list[dict[str, Any]]:
    """The JSON of every event but comments and [DONE]."""
    found = [block for block in blocks_of(data) if block.startswith(b"data: {")]
    return [json.loads(block[6:]) for block in found]


def ask(service: Service, **more: Any) -> requests.Response:
    """A streamed answer, read to its end, so that not even a failing test leaves it open."""
    answer = service.chat(stream=True, **more)
    assert answer.content is not None
    return answer


def words_of(data: bytes) -> str:
    choices = [choice for body in objects_of(data) for choice in body.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def errors_of(data: bytes) -> list[dict[str, Any]]:
    return [body["error"] for body in objects_of(data) if "error" in body]


def strikes(service: Service) -> dict[str, int]:
    return service.get("/metrics").json()["circuit_breaker"]["failures"]


def last_attempts(service: Service) -> list[tuple[str, str]]:
    """(model, outcome) of each attempt of the last request, once it is booked."""
    wait_until(lambda: service.get("/metrics").json()["in_flight"] == 0)
    attempts = service.get("/metrics").json()["recent_requests"][0]["attempts"]
    return [(attempt["model"], attempt["outcome"]) for attempt in attempts]


@pytest.fixture(scope="module")
def shared_held(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service whose categories say how they stream, and how long they may take."""
    routes = small_routes(shared_upstream.url)
    chain = {"models": ["acme/one", "acme/two"]}
    brief = {"first_token": 1, "idle": 1, "answer": 1, "total": 1.5}
    routes["categories"]["held"] = {**chain, "stream": "whole"}
    routes["categories"]["brief"] = {**chain, "stream": "whole", "timeouts_sec": brief}
    routes["categories"]["hurried"] = {**chain, "timeouts_sec": brief}
    patient = {"first_token": 20, "idle": 20, "answer": 20, "total": 60}  # 36 MB take a second
    routes["categories"]["patient"] = {**chain, "timeouts_sec": patient}
    service = Service(tmp_path_factory.mktemp("held"), routes)
    yield service
    service.stop()


@pytest.fixture
def held(shared_held: Service, upstream: Upstream) -> Service:
    shared_held.post("/circuit-breaker/reset-all")
    return shared_held


# --- the commit ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        [BEGIN],
        [COMMENT, COMMENT],
        [BEGIN, COMMENT, chunk({}), chunk({"content": None, "tool_calls": []})],
        [b"data: {oops\n\n"],
        [b"event: ping\n\n"],
        [chunk({"content": "", "reasoning": "", "reasoning_content": None})],
        [],
    ],
)
@pytest.mark.parametrize("after", ["cut", "end", "reset"])
def test_what_ends_before_the_first_token_fails_over_unseen(service, upstream, before, after):
    upstream.scripts["acme/one"] = pieces(before, after)
    upstream.scripts["acme/two"] = stream(["from two"])

    answer = ask(service)

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert answer.content == b"".join([BEGIN, chunk({"content": "from two"}), *END])


@pytest.mark.parametrize(
    "token",
    [
        chunk({"content": "x"}),
        chunk({"reasoning": "hm"}),
        chunk({"reasoning_content": "hm"}),
        chunk(tool("", id="c1", type="function")),
        chunk({}, "length"),
        chunk({}, "content_filter"),
        chunk({}, "tool_calls"),
    ],
)
def test_each_kind_of_token_commits(service, upstream, token):
    gate = threading.Event()
    upstream.scripts["acme/one"] = pieces([BEGIN, token, gate.wait, *END])

    answer = service.chat(stream=True)
    gate.set()

    assert answer.headers["X-Router-Model"] == "acme/one"
    assert answer.content == b"".join([BEGIN, token, *END])
    assert upstream.models_asked() == ["acme/one"]


@pytest.mark.parametrize("kept_alive_by", [BEGIN, COMMENT])
def test_a_role_or_comments_do_not_stop_the_clock_of_the_first_token(
    service, upstream, kept_alive_by
):
    upstream.scripts["acme/one"] = pieces([kept_alive_by, 0.2] * 30)
    upstream.scripts["acme/two"] = stream(["from two"])

    answer = ask(service)

    assert words_of(answer.content) == "from two"
    assert last_attempts(service) == [("acme/one", "first_token"), ("acme/two", "success")]


def test_comments_before_the_commit_are_passed_on(service, upstream):
    upstream.default = pieces([COMMENT, BEGIN, WORD, COMMENT, WORD, *END])

    assert ask(service).content == b"".join([COMMENT, BEGIN, WORD, COMMENT, WORD, *END])


def test_a_total_failure_of_streams_has_a_true_status(service, upstream):
    upstream.default = pieces([BEGIN], "cut")

    answer = ask(service)

    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == "application/json"
    assert [a["outcome"] for a in answer.json()["error"]["attempts"]] == ["cut", "cut"]


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (pieces([BEGIN, OOPS], "hang"), "server_error"),
        (pieces([sse({"error": {"message": "slow down", "code": 429}})]), "rate_limited"),
        (pieces([b"event: error\n" + sse({"error": {"message": "x"}})]), "server_error"),
        (plain(200, json.dumps(answer_body("whole, not a stream")).encode()), "not_an_answer"),
        (plain(200, b"<html>busy</html>", "text/html"), "not_an_answer"),
        (plain(200, b"", "text/event-stream"), "not_an_answer"),
        (reset_at_once, "reset"),
        (hang, "first_token"),
    ],
)
def test_no_stream_in_a_200_fails_over(service, upstream, script, outcome):
    upstream.scripts["acme/one"] = script
    upstream.scripts["acme/two"] = stream(["from two"])

    answer = ask(service)

    assert words_of(answer.content) == "from two"
    assert last_attempts(service)[-2:] == [("acme/one", outcome), ("acme/two", "success")]


# --- after the commit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "after", "outcome"),
    [
        ([BEGIN, WORD], "cut", "cut"),
        ([BEGIN, WORD], "end", "cut"),
        ([BEGIN, WORD], "reset", "cut"),
        ([BEGIN, WORD], "hang", "idle"),
        ([BEGIN, WORD, OOPS, WORD], "hang", "server_error"),
        ([BEGIN, WORD, OOPS, *END], "end", "server_error"),
    ],
)
def test_a_break_after_the_commit_is_told_and_never_hidden(
    service, upstream, parts, after, outcome
):
    upstream.scripts["acme/one"] = pieces(parts, after)

    answer = ask(service).content

    assert words_of(answer) == "word "
    assert "acme/one" in errors_of(answer)[0]["message"]
    assert b"[DONE]" not in answer
    assert len(errors_of(answer)) == 1
    assert upstream.models_asked() == ["acme/one"]
    assert last_attempts(service) == [("acme/one", outcome)]
    assert strikes(service) == {"acme/one": 1}


def test_the_sdk_raises_on_a_stream_that_broke(service, upstream):
    upstream.default = pieces([BEGIN, WORD], "cut")
    got = []

    with (
        openai.OpenAI(base_url=service.base + "/v1", api_key="x", max_retries=0) as sdk,
        pytest.raises(openai.APIError, match="acme/one"),
    ):
        messages: Any = [{"role": "user", "content": "hello"}]
        stream_ = sdk.chat.completions.create(model="router", messages=messages, stream=True)
        got += [c.choices[0].delta.content for c in stream_]

    assert upstream.models_asked() == ["acme/one"]


@pytest.mark.parametrize(
    ("reason", "after"),
    [("stop", "end"), ("stop", "cut"), ("stop", "reset"), ("stop", "hang"),
     ("length", "end"), ("tool_calls", "cut"), ("content_filter", "reset")],
)  # fmt: skip
def test_any_end_after_a_finish_reason_is_a_success(service, upstream, reason, after):
    finish = chunk({}, reason)
    upstream.scripts["acme/one"] = pieces([BEGIN, WORD, finish], after)

    answer = ask(service).content

    assert answer == b"".join([BEGIN, WORD, finish, DONE])
    assert last_attempts(service) == [("acme/one", "success")]
    assert strikes(service) == {}


def test_an_upstream_that_lingers_after_done_is_left_soon(service, upstream):
    upstream.default = pieces([BEGIN, WORD, *END], "hang")

    answer = ask(service).content

    assert answer.endswith(DONE)
    wait_until(lambda: upstream.left, 2.0)
    assert last_attempts(service) == [("acme/one", "success")]


@pytest.mark.parametrize("bad", [b"data: {oops\n\n", b"data: \xff\n\n", b"data: [1]\n\n"])
def test_a_malformed_event_is_dropped_and_harms_nothing(service, upstream, bad):
    upstream.default = pieces([BEGIN, WORD, bad, WORD, *END])

    assert ask(service).content == b"".join([BEGIN, WORD, WORD, *END])


def test_comments_after_the_commit_are_passed_on(service, upstream):
    upstream.default = pieces([WORD, *[COMMENT, 0.1] * 5, WORD, COMMENT, *END])

    answer = ask(service).content

    assert answer == b"".join([WORD, *[COMMENT] * 5, WORD, COMMENT, *END])


def test_an_upstream_that_only_says_it_is_alive_is_idle(service, upstream):
    upstream.scripts["acme/one"] = pieces([WORD, *[COMMENT, 0.2] * 30], "hang")

    answer = ask(service).content

    assert "stopped in mid-answer" in errors_of(answer)[0]["message"]
    assert last_attempts(service) == [("acme/one", "idle")]


def test_a_long_answer_that_keeps_coming_is_not_cut_by_any_limit(held, upstream):
    upstream.scripts["acme/one"] = pieces([WORD, 0.3] * 7 + END)

    answer = ask(held, model="router/hurried").content

    assert words_of(answer) == "word " * 7
    assert answer.endswith(DONE)


@pytest.mark.parametrize("asked", [None, {"include_usage": False}, {"x": 1}])
def test_usage_is_hidden_from_who_did_not_ask(service, upstream, asked):
    upstream.default = stream(["word "])
    more = {"stream_options": asked} if asked else {}

    answer = ask(service, **more).content

    assert upstream.requests[-1].body["stream_options"] == {**(asked or {}), "include_usage": True}
    assert answer == b"".join([BEGIN, WORD, *END])


def test_usage_beside_a_choice_is_no_event_of_ours_to_drop(service, upstream):
    last = chunk({}, "stop", usage={"prompt_tokens": 1, "completion_tokens": 2})
    upstream.default = pieces([WORD, last, DONE])

    assert ask(service).content == b"".join([WORD, last, DONE])


def test_tool_call_deltas_come_through_to_the_byte(service, upstream):
    first = tool("", id="c1", type="function")
    parts = [first, tool('{"ci'), tool('ty": "Zü'), tool('rich"}'), tool('{"b":', 1), tool("2}", 1)]
    sent = [BEGIN, *(chunk(part) for part in parts), chunk({}, "tool_calls"), DONE]
    upstream.default = pieces(sent)

    assert ask(service).content == b"".join(sent)


def test_big_integers_odd_spacing_and_unknown_fields_survive(service, upstream):
    odd = b'data:{"choices" : [{"delta":{"content":"x"}}], "n":123456789012345678901234567890}\n\n'
    odder = b'id: 7\ndata: {"x":[1.10, 1e400], "choices":[]}\n\n'
    upstream.default = pieces([odd, odder, *END])

    assert ask(service).content == b"".join([odd, odder, *END])


@pytest.mark.parametrize("size", [1, 3])
def test_a_character_split_across_chunks_stays_whole(service, upstream, size):
    sent = 'data: {"choices": [{"delta": {"content": "é€😀"}}]}\n\n'.encode() + b"".join(END)
    upstream.default = pieces([sent[at : at + size] for at in range(0, len(sent), size)])

    assert ask(service).content == sent


def test_windows_line_ends_are_passed_on(service, upstream):
    sent = b"".join([BEGIN, WORD, *END]).replace(b"\n", b"\r\n")
    upstream.default = pieces([sent])

    assert ask(service).content == sent


def test_an_upstream_that_closes_instead_of_chunking_is_relayed_as_it_comes(service, upstream):
    gate = threading.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

    def script(peer: Peer, request: Request) -> None:
        peer.send(head + BEGIN + WORD)
        gate.wait(5)
        peer.send(b"".join(END))

    upstream.default = script
    lines = service.chat(stream=True).iter_lines(chunk_size=1)
    first = [next(lines) for _ in range(3)]
    was_open = not gate.is_set()
    gate.set()

    assert b"word" in first[2]
    assert was_open
    assert b"data: [DONE]" in list(lines)


def test_a_stream_says_that_nobody_on_the_way_may_hold_it(service):
    headers = ask(service).headers

    assert headers["X-Accel-Buffering"] == "no"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Content-Type"].startswith("text/event-stream")


# --- whole-answer mode ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (pieces([BEGIN, WORD, WORD], "cut"), "cut"),
        (pieces([BEGIN, WORD, WORD], "end"), "cut"),
        (pieces([BEGIN, WORD, WORD, DONE], "end"), "cut"),
        (pieces([BEGIN, WORD, WORD], "reset"), "cut"),
        (pieces([BEGIN, WORD, WORD], "hang"), "idle"),
        (pieces([BEGIN, WORD, *[COMMENT, 0.2] * 30], "hang"), "idle"),
        (pieces([BEGIN, WORD, OOPS], "hang"), "server_error"),
        (pieces([BEGIN, chunk(tool('{"a": ')), chunk({}, "tool_calls"), DONE]), "cut"),
        (pieces([BEGIN, chunk(tool('{"a": 1}')), chunk(tool('{"b"', 1)), *END]), "cut"),
    ],
)
def test_in_whole_answer_mode_what_is_not_complete_fails_over(service, upstream, script, outcome):
    upstream.scripts["acme/one"] = script
    upstream.scripts["acme/two"] = stream(["from ", "two"])

    answer = ask(service, headers=WHOLE)

    assert answer.headers["X-Router-Model"] == "acme/two"
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert words_of(answer.content) == "from two"
    assert last_attempts(service)[-2:] == [("acme/one", outcome), ("acme/two", "success")]


def test_a_held_stream_is_released_as_the_bytes_that_came(service, upstream):
    sent = [COMMENT, BEGIN, chunk(tool('{"a"')), chunk(tool(": 1}")), chunk({}, "tool_calls"), DONE]
    upstream.default = pieces(sent)

    assert ask(service, headers=WHOLE).content == b"".join(sent)


def test_nothing_of_a_held_answer_is_seen_before_it_is_complete(service, upstream):
    gate = threading.Event()
    upstream.default = pieces([BEGIN, WORD, lambda: gate.wait(0.6), *END])
    began = time.monotonic()

    ask(service, headers=WHOLE)

    assert time.monotonic() - began >= 0.6


@pytest.mark.parametrize("after", ["end", "cut", "reset", "hang"])
def test_a_held_answer_with_its_finish_reason_is_complete_however_it_ends(service, upstream, after):
    upstream.scripts["acme/one"] = pieces([BEGIN, WORD, chunk({}, "stop")], after)

    answer = ask(service, headers=WHOLE)

    assert answer.headers["X-Router-Model"] == "acme/one"
    assert answer.content == b"".join([BEGIN, WORD, *END])


def test_tool_calls_of_two_choices_are_not_taken_for_one_broken_call(service, upstream):
    first, second = json.loads(chunk(tool('{"a": 1}'))[6:]), json.loads(chunk(tool('{"a": 2}'))[6:])
    second["choices"][0]["index"] = 1
    sent = [sse(first), sse(second), chunk({}, "tool_calls"), DONE]
    upstream.default = pieces(sent)

    answer = ask(service, n=2, headers=WHOLE)

    assert answer.headers["X-Router-Model"] == "acme/one"
    assert answer.content == b"".join(sent)


def test_a_tool_call_numbered_by_nonsense_is_no_bug_of_ours(service, upstream):
    odd = {"tool_calls": [{"index": {}, "function": {"arguments": "{}"}}]}
    upstream.default = pieces([chunk(odd), chunk({}, "tool_calls"), DONE])

    answer = ask(service, headers=WHOLE)

    assert answer.status_code == 200
    assert service.get("/metrics").json()["in_flight"] == 0


def test_a_held_answer_that_was_cut_by_its_length_may_hold_half_a_tool_call(service, upstream):
    sent = [BEGIN, chunk(tool('{"a": ')), chunk({}, "length"), DONE]
    upstream.default = pieces(sent)

    assert ask(service, headers=WHOLE).content == b"".join(sent)


def test_a_held_answer_is_bounded_in_size(held, upstream):
    upstream.scripts["acme/one"] = pieces([chunk({"content": "x" * 1_000_000})] * 36 + END)
    upstream.scripts["acme/two"] = stream(["small"])

    answer = ask(held, model="router/patient", headers=WHOLE)

    assert words_of(answer.content) == "small"
    assert last_attempts(held) == [("acme/one", "not_an_answer"), ("acme/two", "success")]


def test_a_category_can_ask_for_whole_answers(held, upstream):
    upstream.scripts["acme/one"] = pieces([BEGIN, WORD], "cut")
    upstream.scripts["acme/two"] = stream(["from two"])

    answer = ask(held, model="router/held")

    assert words_of(answer.content) == "from two"
    assert answer.content.endswith(DONE)


def test_a_live_category_beside_it_stays_live(held, upstream):
    upstream.scripts["acme/one"] = pieces([BEGIN, WORD], "cut")

    answer = ask(held, model="router/conversation")

    assert len(errors_of(answer.content)) == 1


@pytest.mark.parametrize("category", ["router/held", "router/conversation"])
def test_a_whole_answer_stays_whole_in_every_category(held, upstream, category):
    upstream.default = whole("plain")

    answer = held.chat(model=category, headers=WHOLE)

    assert answer.json()["choices"][0]["message"]["content"] == "plain"


def test_a_half_tool_call_in_a_whole_answer_fails_over(service, upstream):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    half = whole(None, message={"tool_calls": [call]}, finish_reason="tool_calls")
    upstream.scripts["acme/one"] = half

    answer = service.chat(headers=WHOLE)

    assert answer.headers["X-Router-Model"] == "acme/two"


def test_a_held_answer_that_outlasts_the_request_is_no_strike(held, upstream):
    upstream.default = pieces([WORD, 0.2] * 30 + END)

    answer = ask(held, model="router/brief")

    assert [a["outcome"] for a in answer.json()["error"]["attempts"]] == ["total"]
    assert strikes(held) == {}


@pytest.mark.parametrize("headers", [None, WHOLE])
def test_the_last_model_may_take_its_time_for_the_first_token(service, upstream, headers):
    upstream.scripts["acme/one"] = error(503)
    upstream.scripts["acme/two"] = pieces([BEGIN, 1.6, WORD, *END])

    answer = ask(service, headers=headers)

    assert words_of(answer.content) == "word "


def test_an_endless_line_without_an_event_is_bounded(held, upstream):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: "
    upstream.scripts["acme/one"] = raw(head + b"x" * (10 << 20))
    upstream.scripts["acme/two"] = stream(["small"])

    answer = ask(held, model="router/patient")

    assert words_of(answer.content) == "small"
    assert last_attempts(held) == [("acme/one", "not_an_answer"), ("acme/two", "success")]


@pytest.mark.parametrize("headers", [{}, {"X-Router-Stream": "whole"}])
def test_nothing_behind_the_end_of_a_stream_is_passed_on(service, upstream, headers):
    parts = [BEGIN, WORD, chunk({}, "stop"), DONE, chunk({"content": "behind"})]
    upstream.default = pieces([b"".join(parts)])

    answer = service.chat(stream=True, headers=headers).content

    assert words_of(answer) == "word "
    assert answer.endswith(DONE)
