"""Streams through the real gunicorn: the commit, what comes after it, and whole-answer mode."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import requests
from conftest import Service, calm, small_routes
from helpers import WHOLE, errors_of, failures, in_turn, last_attempts, user, wait_until, words_of
from upstream import DONE, Peer, Request, Upstream, chunk, error, pieces, raw, sse, stream, whole

ONE, TWO = "acme/one", "acme/two"
BEGIN = chunk({"role": "assistant", "content": ""})
WORD = chunk({"content": "word "})
COMMENT = b": OPENROUTER PROCESSING\n\n"
END = [chunk({}, "stop"), DONE]
OOPS = sse({"error": {"message": "upstream is sad", "code": 502}})


def tool(arguments: str, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}, **more}]}


def ask(service: Service, **more: Any) -> requests.Response:
    """A streamed answer, read to its end, so that not even a failing test leaves it open."""
    answer = service.chat(stream=True, **more)
    assert answer.content is not None
    return answer


@pytest.fixture(scope="module")
def shared_held(serve: Callable[..., Service]) -> Service:
    """A service whose categories say how they stream, and how long they may take."""
    chain = {"models": [ONE, TWO]}
    brief = {"first_token": 1, "idle": 1, "answer": 1, "total": 0.8}
    patient = {"first_token": 20, "idle": 20, "answer": 20, "total": 60}  # 36 MB take a second
    categories = {
        **small_routes("")["categories"],
        "held": {**chain, "stream": "whole"},
        "brief": {**chain, "stream": "whole", "timeouts_sec": brief},
        "patient": {**chain, "timeouts_sec": patient},
    }
    return serve(categories=categories)


@pytest.fixture
def held(shared_held: Service, upstream: Upstream) -> Service:
    return calm(shared_held)


# --- the commit ----------------------------------------------------------------------------------


BEFORE = {
    "a-role": [BEGIN],
    "comments": [COMMENT, COMMENT],
    "empty-deltas": [BEGIN, COMMENT, chunk({}), chunk({"content": None, "tool_calls": []})],
    "a-broken-event": [b"data: {oops\n\n"],
    "no-data": [b"event: ping\n\n"],
    "empty-words": [chunk({"content": "", "reasoning": "", "reasoning_content": None})],
    "nothing": [],
}


@pytest.mark.parametrize(
    ("after", "before"),
    [*in_turn(BEFORE, "cut", "end", "reset"), *in_turn(BEFORE, "end", "reset", "cut")],
)
def test_what_ends_before_the_first_token_fails_over_unseen(service, upstream, before, after):
    upstream.scripts |= {ONE: pieces(before, after), TWO: stream(["from two"])}

    answer = ask(service)

    assert answer.headers["X-Router-Model"] == TWO
    assert answer.content == b"".join([BEGIN, chunk({"content": "from two"}), *END])


@pytest.mark.parametrize(
    "token",
    [chunk({"content": "x"}), chunk({"reasoning": "hm"}), chunk({"reasoning_content": "hm"}),
     chunk(tool("", id="c1", type="function")), chunk({}, "length"), chunk({}, "content_filter"),
     chunk({}, "tool_calls")],
)  # fmt: skip
def test_each_kind_of_token_commits(service, upstream, token):
    gate = threading.Event()
    upstream.scripts[ONE] = pieces([BEGIN, token, gate.wait, *END])

    answer = service.chat(stream=True)
    gate.set()

    assert answer.headers["X-Router-Model"] == ONE
    assert answer.content == b"".join([BEGIN, token, *END])
    assert upstream.models_asked() == [ONE]


# --- after the commit ----------------------------------------------------------------------------


def test_the_sdk_raises_on_a_stream_that_broke(service, upstream):
    import openai  # takes 1.5 s, in the one test process that needs it

    upstream.default = pieces([BEGIN, WORD], "cut")
    got = []

    with (
        openai.OpenAI(base_url=service.base + "/v1", api_key="x", max_retries=0) as sdk,
        pytest.raises(openai.APIError, match=ONE),
    ):
        messages: Any = [user("hello")]
        stream_ = sdk.chat.completions.create(model="router", messages=messages, stream=True)
        got += [c.choices[0].delta.content for c in stream_]

    assert upstream.models_asked() == [ONE]


@pytest.mark.parametrize(
    ("reason", "after"),
    [("stop", "end"), ("stop", "cut"), ("stop", "reset"), ("stop", "hang"),
     ("length", "end"), ("tool_calls", "cut"), ("content_filter", "reset")],
)  # fmt: skip
def test_any_end_after_a_finish_reason_is_a_success(service, upstream, reason, after):
    finish = chunk({}, reason)
    upstream.scripts[ONE] = pieces([BEGIN, WORD, finish], after)

    answer = ask(service).content

    assert answer == b"".join([BEGIN, WORD, finish, DONE])
    assert last_attempts(service) == [(ONE, "success")]
    assert failures(service) == {}


def test_an_upstream_that_lingers_after_done_is_left_soon(service, upstream):
    upstream.default = pieces([BEGIN, WORD, *END], "hang")

    answer = ask(service).content

    assert answer.endswith(DONE)
    wait_until(lambda: upstream.left, 2.0)
    assert last_attempts(service) == [(ONE, "success")]


@pytest.mark.parametrize(
    ("asked", "shown"),
    [(None, False), ({"include_usage": False}, False), ({"x": 1}, False),
     ({"include_usage": True}, True)],
)  # fmt: skip
def test_usage_is_asked_for_and_hidden_from_who_did_not_ask(service, upstream, asked, shown):
    upstream.default = stream(["word "])
    more = {"stream_options": asked} if asked else {}

    answer = ask(service, **more).content

    assert upstream.requests[-1].body["stream_options"] == {**(asked or {}), "include_usage": True}
    assert (b'"usage"' in answer) == shown
    assert shown or answer == b"".join([BEGIN, WORD, *END])


def in_bytes(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


ACCENTS = 'data: {"choices": [{"delta": {"content": "é€😀"}}]}\n\n'.encode() + b"".join(END)
TOOL_CALLS = [tool("", id="c1", type="function"), tool('{"ci'), tool('ty": "Zü'), tool('rich"}'),
              tool('{"b":', 1), tool("2}", 1)]  # fmt: skip
AS_SENT: dict[str, list[bytes]] = {
    "comments": [COMMENT, BEGIN, WORD, *[COMMENT] * 5, WORD, COMMENT, *END],
    "usage beside a choice": [WORD, chunk({}, "stop", usage={"prompt_tokens": 1}), DONE],
    "tool calls": [BEGIN, *(chunk(part) for part in TOOL_CALLS), chunk({}, "tool_calls"), DONE],
    "big integers, odd spacing, unknown fields": [
        b'data:{"choices" : [{"delta":{"content":"x"}}], "n":123456789012345678901234567890}\n\n',
        b'id: 7\ndata: {"x":[1.10, 1e400], "choices":[]}\n\n', *END],
    "characters split into bytes": in_bytes(ACCENTS, 1),
    "characters split across chunks": in_bytes(ACCENTS, 3),
    "line ends of Windows": [b"".join([BEGIN, WORD, *END]).replace(b"\n", b"\r\n")],
}  # fmt: skip


@pytest.mark.parametrize("sent", AS_SENT.values(), ids=AS_SENT)
def test_a_stream_comes_through_to_the_byte(service, upstream, sent):
    upstream.default = pieces(sent)

    assert ask(service).content == b"".join(sent)


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
        (pieces([BEGIN, WORD, WORD], "reset"), "cut"),
        (pieces([BEGIN, WORD, WORD], "hang"), "idle"),
        (pieces([BEGIN, WORD, *[COMMENT, 0.2] * 30], "hang"), "idle"),
        (pieces([BEGIN, WORD, OOPS], "hang"), "server_error"),
        (pieces([BEGIN, chunk(tool('{"a": ')), chunk({}, "tool_calls"), DONE]), "cut"),
        (pieces([BEGIN, chunk(tool('{"a": 1}')), chunk(tool('{"b"', 1)), *END]), "cut"),
    ],
)
def test_in_whole_answer_mode_what_is_not_complete_fails_over(service, upstream, script, outcome):
    upstream.scripts[ONE] = script
    upstream.scripts[TWO] = stream(["from ", "two"])

    answer = ask(service, headers=WHOLE)

    assert answer.headers["X-Router-Model"] == TWO
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert words_of(answer.content) == "from two"
    assert last_attempts(service)[-2:] == [(ONE, outcome), (TWO, "success")]


def of_choice(n: int, part: dict[str, Any]) -> bytes:
    """One event of another choice than the first."""
    body = json.loads(chunk(part)[6:])
    body["choices"][0]["index"] = n
    return sse(body)


ODD = {"tool_calls": [{"index": {}, "function": {"arguments": "{}"}}]}
COMPLETE: dict[str, list[bytes]] = {
    "a call in pieces": [COMMENT, BEGIN, chunk(tool('{"a"')), chunk(tool(": 1}")),
                         chunk({}, "tool_calls"), DONE],
    "calls of two choices": [of_choice(0, tool('{"a": 1}')), of_choice(1, tool('{"a": 2}')),
                             chunk({}, "tool_calls"), DONE],
    "a call numbered by nonsense": [chunk(ODD), chunk({}, "tool_calls"), DONE],
    "a call cut by the length": [BEGIN, chunk(tool('{"a": ')), chunk({}, "length"), DONE],
}  # fmt: skip


@pytest.mark.parametrize("sent", COMPLETE.values(), ids=COMPLETE)
def test_a_held_stream_that_is_complete_is_released_as_the_bytes_that_came(service, upstream, sent):
    upstream.default = pieces(sent)

    answer = ask(service, n=2, headers=WHOLE)

    assert answer.headers["X-Router-Model"] == ONE
    assert answer.content == b"".join(sent)


def test_nothing_of_a_held_answer_is_seen_before_it_is_complete(service, upstream):
    gate = threading.Event()
    upstream.default = pieces([BEGIN, WORD, lambda: gate.wait(0.3), *END])
    began = time.monotonic()

    ask(service, headers=WHOLE)

    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("after", ["end", "cut", "reset", "hang"])
def test_a_held_answer_with_its_finish_reason_is_complete_however_it_ends(service, upstream, after):
    upstream.scripts[ONE] = pieces([BEGIN, WORD, chunk({}, "stop")], after)

    answer = ask(service, headers=WHOLE)

    assert answer.headers["X-Router-Model"] == ONE
    assert answer.content == b"".join([BEGIN, WORD, *END])


ENDLESS_LINE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: "


@pytest.mark.parametrize(
    ("script", "headers"),
    [
        (pieces([chunk({"content": "x" * 1_000_000})] * 36 + END), WHOLE),
        (raw(ENDLESS_LINE + b"x" * (10 << 20)), None),
    ],
    ids=["a held answer", "a line without an end"],
)
def test_what_is_held_is_bounded_in_size(held, upstream, script, headers):
    upstream.scripts |= {ONE: script, TWO: stream(["small"])}

    answer = ask(held, model="router/patient", headers=headers)

    assert words_of(answer.content) == "small"
    assert last_attempts(held) == [(ONE, "not_an_answer"), (TWO, "success")]


@pytest.mark.parametrize(("category", "words"), [("held", "from two"), ("conversation", "word ")])
def test_a_category_can_ask_for_whole_answers(held, upstream, category, words):
    upstream.scripts |= {ONE: pieces([BEGIN, WORD], "cut"), TWO: stream(["from two"])}

    answer = ask(held, model=f"router/{category}").content

    assert words_of(answer) == words
    assert answer.endswith(DONE) == (errors_of(answer) == []) == (category == "held")


@pytest.mark.parametrize("category", ["router/held", "router/conversation"])
def test_a_whole_answer_stays_whole_in_every_category(held, upstream, category):
    upstream.default = whole("plain")

    answer = held.chat(model=category, headers=WHOLE)

    assert answer.json()["choices"][0]["message"]["content"] == "plain"


def test_a_half_tool_call_in_a_whole_answer_fails_over(service, upstream):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    half = whole(None, message={"tool_calls": [call]}, finish_reason="tool_calls")
    upstream.scripts[ONE] = half

    answer = service.chat(headers=WHOLE)

    assert answer.headers["X-Router-Model"] == TWO


def test_a_held_answer_that_outlasts_the_request_is_no_strike(held, upstream):
    upstream.default = pieces([WORD, 0.2] * 30 + END)

    answer = ask(held, model="router/brief")

    assert [a["outcome"] for a in answer.json()["error"]["attempts"]] == ["total"]
    assert failures(held) == {}


def test_the_last_model_may_take_its_time_for_a_held_stream(service, upstream):
    upstream.scripts |= {ONE: error(503), TWO: pieces([BEGIN, 1.4, WORD, *END])}

    answer = ask(service, headers=WHOLE)

    assert words_of(answer.content) == "word "


@pytest.mark.parametrize("headers", [None, WHOLE])
def test_nothing_behind_the_end_of_a_stream_is_passed_on(service, upstream, headers):
    parts = [BEGIN, WORD, chunk({}, "stop"), DONE, chunk({"content": "behind"})]
    upstream.default = pieces([b"".join(parts)])

    answer = service.chat(stream=True, headers=headers).content

    assert words_of(answer) == "word "
    assert answer.endswith(DONE)
