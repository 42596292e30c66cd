"""Upstreams at their worst against the real gunicorn: what a client sees, and who is blamed."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import requests
from conftest import KEY, Service, calm
from helpers import (
    chat_bytes,
    connected,
    errors_of,
    failures,
    figures,
    in_turn,
    last_attempts,
    open_circuits,
    peak_mib,
    wait_until,
    words_of,
)  # fmt: skip
from service import PATIENT
from upstream import (
    DONE,
    Peer,
    Request,
    Script,
    answer_body,
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
    sse,
    stream,
    whole,
)  # fmt: skip

from parts.judge import VERDICTS

ONE, TWO = "acme/one", "acme/two"
GOOD = "the right answer"
LIMITS = {"connect": 1, "first_token": 0.4, "idle": 0.4, "answer": 0.4, "total": 1.2}
MB = 1 << 20


@pytest.fixture(scope="module")
def shared_quick(serve: Callable[..., Service]) -> Service:
    chain = {"models": [ONE, TWO]}
    categories = {"conversation": chain, "calm": {**chain, "timeouts_sec": PATIENT}}
    return serve(timeouts_sec=LIMITS, categories=categories)


@pytest.fixture
def quick(shared_quick: Service, upstream: Any) -> Service:
    """A service with short limits; its second model always answers well."""
    upstream.default = whole(GOOD)
    return calm(shared_quick)


# --- bad upstreams -------------------------------------------------------------------------------


def loudly(text: str) -> str:
    """A text that tells the key it was called with, as debugging proxies do."""
    return f"{text} Authorization: Bearer {KEY}"


def answer(head: str, body: bytes = b"", after: str = "cut") -> Script:
    """An answer with exactly this head."""
    return raw(b"HTTP/1.1 " + head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body, after)


def html(status: int) -> Script:
    page = f"<html><body><h1>{status}</h1>{loudly('oops')}</body></html>"
    return plain(status, page.encode(), "text/html")


def trickle(data: bytes, pause_s: float = 0.05) -> Script:
    """A byte every `pause_s`, for ever."""

    def script(peer: Peer, request: Request) -> bool:
        for n in range(600):
            peer.send(data[n % len(data) :][:1])
            time.sleep(pause_s)
        return False

    return script


class Flood:
    """Sends `head`, then `piece` again and again up to 300 MB; counts what went out."""

    def __init__(self, head: str, piece: bytes, first: bytes = b""):
        self.head = head.replace("\n", "\r\n").encode()
        self.piece = piece
        self.first = first
        self.sent = 0
        self.over = threading.Event()

    def __call__(self, peer: Peer, request: Request) -> bool:
        self.sent = 0
        self.over.clear()
        try:
            peer.send(self.head + self.first)
            while self.sent < 300 * MB:
                peer.send(self.piece)
                self.sent += len(self.piece)
        finally:
            self.over.set()
        return False


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def typed(kind: str, *more: str, status: str = "200 OK") -> str:
    return "\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *more, "", ""])


GOOD_BODY = json.dumps(answer_body("should not be read")).encode()
BOMB = gzip.compress(b'{"choices": "' + b" " * (100 * MB) + b'"}', 9)
JSON_TYPE, SSE_TYPE = "application/json", "text/event-stream"
CHUNKS = "Transfer-Encoding: chunked"
IN_200 = {"id": "x", "error": {"code": 502, "message": loudly("Provider returned error")}}
FAILED_CHOICE = {"choices": [{"index": 0, "finish_reason": "error", "message": {"content": ""},
                              "error": {"code": 502, "message": "Provider died"}}]}  # fmt: skip

Faults = dict[str, tuple[str, Script]]  # by name: the outcome, and what the upstream does
# In the head: whether a stream is wanted makes no difference, so each comes once.
HEADS: Faults = {
    "500": ("server_error", error(500, loudly("oops"))),
    "500-html": ("server_error", html(500)),
    "503-html": ("server_error", html(503)),
    "504-empty": ("server_error", plain(504, b"", "text/plain")),
    "408": ("server_error", error(408)),
    "999": ("server_error", error(999)),
    "503-retry-after-a-date": ("server_error",
                               error(503, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")),
    "429": ("rate_limited", error(429, loudly("slow down"))),
    "429-retry-after": ("rate_limited", error(429, Retry_After="30")),
    "404-unknown-model": ("unknown_model", error(404, "The model `one` does not exist")),
    "301": ("redirect", plain(301, b"", Location="http://127.0.0.1:1/")),
    "307-to-itself": ("redirect", plain(307, b"", Location="/v1/chat/completions")),
    "304": ("redirect", answer("304 Not Modified")),
    "drop-at-once": ("reset", drop_at_once),
    "reset-at-once": ("reset", reset_at_once),
    "half-a-status-line": ("reset", raw(b"HTTP/1.1 20")),
    "half-a-head": ("reset", raw(b"HTTP/1.1 200 OK\r\nContent-Type: applica")),
    "not-http": ("reset", raw(b"SSH-2.0-OpenSSH_9.2\r\n")),
    "binary": ("reset", raw(bytes(range(256)) * 8)),
    "101": ("reset", answer("101 Switching Protocols\nUpgrade: websocket")),
    "two-content-lengths": ("not_an_answer",
                            answer("200 OK\nContent-Length: 2\nContent-Length: 9", b"{}")),
    "one-huge-header": ("not_an_answer", answer("200 OK\nX-A: " + "a" * 200_000, b"{}")),
    "thousands-of-headers": ("not_an_answer",
                             answer("200 OK\n" + "\n".join(f"X-{n}: a" for n in range(5000)))),
    "204": ("not_an_answer", answer("204 No Content")),
    "206": ("not_an_answer", plain(206, GOOD_BODY)),
    "gzip": ("not_an_answer", plain(200, gzip.compress(GOOD_BODY), Content_Encoding="gzip")),
    "gzip-bomb": ("not_an_answer", plain(200, BOMB, Content_Encoding="gzip")),
    "gzip-bomb-in-an-error": ("server_error", plain(500, BOMB, Content_Encoding="gzip")),
    "gzip-bomb-in-chunks": ("not_an_answer", answer(f"200 OK\nContent-Encoding: gzip\n{CHUNKS}",
                                                    chunked(BOMB))),
    # The request's or the key's fault: nobody gets a strike.
    "400": ("refused", error(400, loudly("bad parameter"))),
    "400-html": ("refused", html(400)),
    "402": ("payment", error(402, loudly("no credit"))),
    "403-html": ("client_error", html(403)),
    "404-html": ("not_found", html(404)),
    "409": ("client_error", error(409)),
    "413-html": ("context_length", html(413)),
    "422-fastapi": ("refused", plain(422, json.dumps({"detail": [{"loc": ["a"], "msg": KEY}]})
                                     .encode())),
    "400-context": ("context_length", error(400, "context length exceeded")),
    "418-with-a-huge-text": ("client_error", error(418, "x" * 1_000_000)),
    "empty-answer": ("empty", whole("")),
}  # fmt: skip
BODIES: Faults = {
    "html": ("not_an_answer", html(200)),
    "text": ("not_an_answer", plain(200, b"hello there", "text/plain")),
    "broken-json": ("not_an_answer", plain(200, b'{"choices": [{"message": {"content": "x"}')),
    "empty": ("not_an_answer", plain(200, b"")),
    "null": ("not_an_answer", plain(200, b"null")),
    "a-list": ("not_an_answer", plain(200, b"[1, 2]")),
    "not-utf8": ("not_an_answer", plain(200, b'{"choices": "\xff\xfe"}')),
    "deep-json": ("not_an_answer", plain(200, b"[" * 200_000)),
    "error": ("server_error", plain(200, json.dumps(IN_200).encode())),
    "error-text": ("server_error", plain(200, b'{"error": "exploded"}')),
    "no-choices": ("not_an_answer", plain(200, b'{"id": "x", "choices": []}')),
    "choices-null": ("not_an_answer", plain(200, b'{"id": "x", "choices": null}')),
    "choices-a-text": ("not_an_answer", plain(200, b'{"id": "x", "choices": "none"}')),
    "gzip-bomb-unannounced": ("not_an_answer", plain(200, BOMB)),
    "length-too-large": ("cut", answer("200 OK\nContent-Length: 99999", GOOD_BODY)),
    "length-too-small": ("not_an_answer", answer("200 OK\nContent-Length: 10", GOOD_BODY)),
    "length-no-number": ("not_an_answer", answer("200 OK\nContent-Length: many", b"{}")),
    "length-negative": ("not_an_answer", answer("200 OK\nContent-Length: -5", b"{}")),
    "cut-in-a-chunk": ("cut", answer(f"200 OK\n{CHUNKS}", b"ff\r\n" + GOOD_BODY[:20])),
    "chunk-size-no-number": ("cut", answer(f"200 OK\n{CHUNKS}", b"zz\r\n{}\r\n0\r\n\r\n")),
    "chunk-size-negative": ("cut", answer(f"200 OK\n{CHUNKS}", b"-5\r\n{}\r\n0\r\n\r\n")),
    "chunk-size-huge": ("cut", answer(f"200 OK\n{CHUNKS}", b"f" * 40 + b"\r\n{}")),
}
ROLE = chunk({"role": "assistant", "content": ""})
OOPS = {"error": {"message": "upstream is sad", "code": 502}}
EVENTS: Faults = {  # of streams, before the first token
    "an-error": ("server_error", pieces([ROLE, sse(OOPS)], "hang")),
    "a-rate-limit": ("rate_limited", pieces([sse({"error": {"message": "slow", "code": 429}})])),
    "an-event-of-errors": ("server_error", pieces([b"event: error\n" + sse({"error": "x"})])),
    "an-error-in-a-choice": ("server_error", pieces([sse(FAILED_CHOICE)])),
    "nothing": ("not_an_answer", plain(200, b"", "text/event-stream")),
    "an-answer": ("not_an_answer", plain(200, GOOD_BODY)),
    "trickle-of-comments": ("first_token", pieces([b": still here\n\n", 0.05] * 100)),
    "a-role-alone": ("first_token", pieces([ROLE], "hang")),
}
WHOLES: Faults = {
    "an-error-in-a-choice": ("server_error", plain(200, json.dumps(FAILED_CHOICE).encode())),
    "trickle-of-spaces": ("answer", pieces([b" ", 0.05] * 100)),
    "late": ("answer", slow(1, whole("late"))),
}
CLOSING = f"200 OK\nContent-Type: {SSE_TYPE}\nConnection: close"
HANGS: dict[str, Script] = {
    "before-the-head": hang,
    "in-the-head": raw(b"HTTP/1.1 200 OK\r\nContent-Ty", "hang"),
    "after-the-head": answer("200 OK\nContent-Length: 100", b"", "hang"),
    "trickle-of-a-head": trickle(b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 100),
    "trickle-of-100-continue": trickle(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    # heads after which http.client would let go of the socket
    "closing-with-a-length": answer(f"{CLOSING}\nContent-Length: 900", b"", "hang"),
    "closing-in-chunks": answer(f"{CLOSING}\n{CHUNKS}", b"", "hang"),
    "closing-with-neither": answer(CLOSING, b"", "hang"),
    "http-1.0": raw(b"HTTP/1.0 200 OK\r\nContent-Length: 900\r\n\r\n", "hang"),
}
TIMED = [("answer", False), ("first_token", True)]

# Odd, but an answer.
HARMLESS: dict[str, Script] = {
    "100-continue-first": raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: "
                              + b"%d\r\n\r\n" % len(GOOD_BODY) + GOOD_BODY),
    "http-1.0": raw(b"HTTP/1.0 200 OK\r\n\r\n" + GOOD_BODY),
    "no-content-type": answer(f"200 OK\nContent-Length: {len(GOOD_BODY)}", GOOD_BODY),
    "wrong-content-type": plain(200, GOOD_BODY, "text/html"),
    "error-null": plain(200, json.dumps({**answer_body("ok"), "error": None}).encode()),
    "hop-by-hop-headers": plain(200, GOOD_BODY, Set_Cookie="a=b", X_Secret=KEY, Server="acme"),
}  # fmt: skip


# --- what a client sees --------------------------------------------------------------------------


def ask(service: Service, **more: Any) -> tuple[requests.Response, float]:
    """The answer, read to its end, and the seconds it took."""
    began = time.monotonic()
    found = service.chat(**more)
    assert found.content is not None
    return found, time.monotonic() - began


def category_for(outcome: str) -> str:
    """Limits are short only where one is what shall end an attempt: the machine may be busy."""
    return "router/conversation" if outcome in LIMITS else "router/calm"


def text_of(body: bytes) -> str:
    """The answer's text; an AssertionError or ValueError unless it is whole and well formed."""
    if not body.startswith(b"data: "):
        return json.loads(body)["choices"][0]["message"]["content"]
    assert body.endswith(DONE)
    return words_of(body)


def leaks(service: Service, found: requests.Response) -> bool:
    """True when the upstream's key is in an answer or in what the service wrote."""
    shown = service.get("/metrics").text + service.get("/health").text + service.log.read_text()
    return KEY in found.text + str(found.headers) + shown


def assert_passed_over(service: Service, found: requests.Response, outcome: str) -> None:
    """The second model has answered for the first, which is blamed for what was its own fault."""
    assert found.status_code == 200
    assert text_of(found.content) == GOOD
    assert {(ONE, outcome), (TWO, "success")} <= set(last_attempts(service))
    assert failures(service) == dict.fromkeys([ONE] * VERDICTS[outcome].strike, 1)
    assert not leaks(service, found)


@pytest.mark.parametrize(
    ("streams", "outcome", "fault"),
    [*in_turn(HEADS, False, True), *in_turn(BODIES, False), *in_turn(BODIES, True),
     *in_turn(EVENTS, True), *in_turn(WHOLES, False)],
)  # fmt: skip
def test_the_next_model_answers_for_a_broken_one(quick, upstream, streams, outcome, fault):
    upstream.scripts[ONE] = fault

    found, seconds = ask(quick, stream=streams, model=category_for(outcome))

    assert_passed_over(quick, found, outcome)
    assert seconds < 2


@pytest.mark.parametrize(("timed", "fault"), in_turn(HANGS, *TIMED))
def test_the_next_model_answers_in_time_for_one_that_hangs(quick, upstream, timed, fault):
    upstream.scripts[ONE] = fault
    outcome, streams = timed

    found, seconds = ask(quick, stream=streams)

    assert_passed_over(quick, found, outcome)
    assert seconds < 2


@pytest.mark.parametrize("script", HARMLESS.values(), ids=HARMLESS)
def test_an_odd_answer_is_an_answer(quick, upstream, script):
    upstream.scripts[ONE] = script

    found, _ = ask(quick)

    assert text_of(found.content) in ("should not be read", "ok")
    assert found.headers["X-Router-Model"] == ONE
    assert found.headers["Content-Type"] == "application/json"
    assert not {"Set-Cookie", "X-Secret"} & set(found.headers)
    assert failures(quick) == {}


TELLING = [  # those that tell the key, and one of each other outcome
    *("500", "500-html", "429", "404-unknown-model", "301", "drop-at-once", "204", "400"),
    *("400-html", "402", "403-html", "404-html", "409", "413-html", "422-fastapi", "empty-answer"),
]


@pytest.mark.parametrize("name", TELLING)
def test_when_all_are_broken_the_answer_is_json_and_tells_no_key(quick, upstream, name):
    outcome, upstream.default = HEADS[name]

    found, seconds = ask(quick)

    assert found.headers["Content-Type"] == "application/json"
    assert {"error", "choices"} & found.json().keys()
    assert found.status_code not in (401, 402, 403)
    assert failures(quick) == dict.fromkeys([ONE, TWO] * VERDICTS[outcome].strike, 1)
    assert seconds < 2
    assert not leaks(quick, found)


@pytest.mark.parametrize(
    ("fault", "streams"),
    [(hang, False), (HANGS["trickle-of-a-head"], True), (EVENTS["trickle-of-comments"][1], True)],
)
def test_when_all_hang_the_answer_is_json_within_the_total_limit(quick, upstream, fault, streams):
    upstream.default = fault

    found, seconds = ask(quick, stream=streams)

    assert found.status_code == 500
    assert found.json()["error"]["code"] == "all_models_failed"
    assert seconds < 3
    assert failures(quick) == {ONE: 1}


def test_headers_that_are_none_and_tell_the_key_stay_out_of_the_log(quick, upstream):
    head = f"200 OK\nno colon here {KEY}\n\tfolded {KEY}\nContent-Length: {len(GOOD_BODY)}"
    upstream.default = answer(head, GOOD_BODY)

    found, _ = ask(quick)

    assert found.status_code in (200, 500)
    assert not leaks(quick, found)


# --- hundreds of megabytes -----------------------------------------------------------------------

TOLD = f"Content-Length: {300 * MB}"
BLANKS, COMMENT = b" " * MB, b": %s\n\n" % (b"c" * 1000)
LITTLE, SOME = 25, 75  # MB: what lies in the sockets on the way; with an answer of 32 MB read
# what is asked for, the flood, how much of it may be sent
FLOODS: dict[str, tuple[dict[str, Any], Flood, int]] = {
    "whole": ({}, Flood(typed(JSON_TYPE, TOLD), BLANKS), SOME),
    "whole-in-chunks": ({}, Flood(typed(JSON_TYPE, CHUNKS), chunked(BLANKS)), SOME),
    "whole-without-length": ({}, Flood(typed(JSON_TYPE), BLANKS), SOME),
    "compressed": ({}, Flood(typed(JSON_TYPE, "Content-Encoding: gzip"), BLANKS), LITTLE),
    "an-error": ({}, Flood(typed(JSON_TYPE, TOLD, status="500 X"), BLANKS), LITTLE),
    "an-error-of-a-stream": ({"stream": True}, Flood(typed("text/html", status="503 X"), BLANKS),
                             LITTLE),
    "one-event": ({"stream": True}, Flood(typed(SSE_TYPE), b"x" * MB, b"data: "), SOME),
    "comments": ({"stream": True}, Flood(typed(SSE_TYPE, CHUNKS), chunked(COMMENT * 1000)), SOME),
    "json-for-a-stream": ({"stream": True}, Flood(typed(JSON_TYPE, TOLD), BLANKS), SOME),
    "a-head": ({}, Flood("HTTP/1.1 200 OK\n", b"X-Y: z\r\n" * 10_000), LITTLE),
    "a-header": ({}, Flood("HTTP/1.1 200 OK\nX-Y: ", b"z" * MB), LITTLE),
    "100-continue": ({}, Flood("", b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000), SOME),
}  # fmt: skip


@pytest.mark.parametrize(("more", "flood", "most_mb"), FLOODS.values(), ids=FLOODS)
def test_a_flood_is_neither_read_to_its_end_nor_kept(quick, upstream, more, flood, most_mb):
    upstream.scripts[ONE] = flood

    found, seconds = ask(quick, **more)

    assert text_of(found.content) == GOOD
    assert seconds < 2.5
    flood.over.wait(0.5)  # a kernel may tell the sender of a closed connection much later
    assert flood.sent < most_mb * MB
    assert failures(quick) == {ONE: 1}
    assert peak_mib(quick) < 300


def test_a_flood_after_the_commit_ends_with_an_error_event(quick, upstream):
    flood = Flood(typed(SSE_TYPE), b"x" * MB, HALF + b"data: ")
    upstream.scripts[ONE] = flood

    found, seconds = ask(quick, stream=True)

    assert errors_of(found.content)[-1]["message"]
    assert seconds < 2.5
    flood.over.wait(0.5)
    assert flood.sent < SOME * MB


# --- after the commit ----------------------------------------------------------------------------

HALF = chunk({"content": "half"})
TELLS_THE_KEY = sse({"error": {"message": KEY, "code": 502}})
AFTER_COMMIT: Faults = {
    "cut": ("cut", pieces([ROLE, HALF], after="cut")),
    "ends-without-a-finish": ("cut", pieces([HALF], after="end")),
    "reset": ("cut", pieces([HALF, 0.05], after="reset")),
    "stall": ("idle", pieces([HALF], after="hang")),
    "trickle": ("idle", pieces([HALF, *([b"d", 0.05] * 100)])),
    "comments-for-ever": ("idle", pieces([HALF, *([b": still here\n\n", 0.05] * 100)])),
    "error-event": ("server_error", pieces([HALF, TELLS_THE_KEY, HALF], after="hang")),
    "error-event-and-an-end": ("server_error", pieces([HALF, TELLS_THE_KEY, DONE])),
    "error-in-a-chunk": ("server_error",
                         pieces([HALF, chunk({}, "error", error={"code": 502, "message": KEY})])),
    "broken-chunk": ("cut", answer(f"200 OK\nContent-Type: {SSE_TYPE}\n{CHUNKS}",
                                   chunked(HALF) + b"zz\r\n")),
}  # fmt: skip


@pytest.mark.parametrize(("outcome", "fault"), AFTER_COMMIT.values(), ids=AFTER_COMMIT)
def test_a_stream_that_breaks_after_its_commit_says_so(quick, upstream, outcome, fault):
    upstream.scripts[ONE] = fault

    found, seconds = ask(quick, stream=True, model=category_for(outcome))

    [told] = errors_of(found.content)
    assert found.status_code == 200
    assert words_of(found.content) == "half"
    assert ONE in told["message"] and VERDICTS[outcome].says in told["message"]
    assert b"[DONE]" not in found.content
    assert seconds < 2
    assert last_attempts(quick) == [(ONE, outcome)]
    assert failures(quick) == {ONE: 1}
    assert not leaks(quick, found)


@pytest.mark.parametrize(
    ("odd", "goes_on"),
    [(b"data: {broken\n\n", False), (b"nonsense\n\n", False), (b"data: [1]\n\n", False),
     (b"data: \xff\xfe\n\n", False), (b"\n\n\n\n", True), (b"event: ping\n\n", True),
     (b'data: {"choices": 5}\n\n', True), (b'data: {"choices": [null]}\n\n', True),
     (b'data: {"choices": [{"delta": null}]}\n\n', True), (b'data: {"usage": []}\n\n', True)],
)  # fmt: skip
def test_one_odd_event_does_not_end_a_stream(quick, upstream, odd, goes_on):
    more = events([" more"], usage=None)
    upstream.scripts[ONE] = pieces([odd, HALF, odd, *more])

    found, _ = ask(quick, stream=True)

    assert found.content == b"".join([odd * goes_on, HALF, odd * goes_on, *more])
    assert failures(quick) == {}


def test_a_client_that_stops_reading_is_let_go_after_the_total_limit(quick, upstream):
    upstream.scripts[ONE] = Flood(typed(SSE_TYPE, CHUNKS), chunked(chunk({"content": "x" * MB})))
    before = figures(quick)["requests"]["cancelled"]

    with connected(quick, chat_bytes(stream=True)):
        wait_until(lambda: figures(quick)["requests"]["cancelled"] == before + 1, 20)

    assert figures(quick)["in_flight"] == 0
    assert failures(quick) == {}


# --- the same fault again and again --------------------------------------------------------------


def test_a_broken_model_is_soon_passed_over(quick, upstream):
    upstream.scripts[ONE] = BODIES["html"][1]

    answers = [ask(quick)[0] for _ in range(4)]

    assert [found.status_code for found in answers] == [200] * 4
    assert list(open_circuits(quick)) == [ONE]
    assert answers[-1].headers["X-Router-Attempts"] == "1"


def test_a_model_that_did_nothing_wrong_is_never_passed_over(quick, upstream):
    blameless = [fault for outcome, fault in HEADS.values() if not VERDICTS[outcome].strike]
    upstream.scripts[ONE] = [*blameless, stream(["fine"])]

    for _ in blameless:
        ask(quick)
    found, _ = ask(quick, stream=True)

    assert found.headers["X-Router-Model"] == ONE


def test_a_fault_leaves_nothing_in_the_connection_for_the_next_request(quick, upstream):
    smuggled = plain(200, json.dumps(answer_body("smuggled")).encode())
    faults: list[Callable[..., Any]] = [BODIES["length-too-small"][1], smuggled]
    upstream.scripts[ONE] = lambda p, r: [fault(p, r) for fault in faults][-1]

    ask(quick)
    upstream.scripts[ONE] = whole("its own answer")
    found, _ = ask(quick)

    assert text_of(found.content) == "its own answer"


def test_nothing_is_left_in_the_air(quick):
    assert figures(quick)["in_flight"] == 0
