"""Upstreams at their worst against the real gunicorn: what a client sees, and who is blamed."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import KEY, Service, small_routes
from upstream import (
    DONE,
    Peer,
    Request,
    Script,
    Upstream,
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
    stream,
    whole,
)  # fmt: skip

ONE, TWO = "acme/one", "acme/two"
GOOD = "the right answer"
LIMITS = {"connect": 1, "first_token": 0.4, "idle": 0.4, "answer": 0.4, "total": 1.2}
MB = 1 << 20


@pytest.fixture(scope="module")
def shared_quick(
    shared_upstream: Upstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    routes = small_routes(shared_upstream.url, timeouts_sec=LIMITS)
    service = Service(tmp_path_factory.mktemp("quick"), routes, ROUTER_THREADS="64")
    yield service
    service.stop()


@pytest.fixture
def quick(shared_quick: Service, upstream: Upstream) -> Service:
    """A service with short limits; its second model always answers well."""
    shared_quick.post("/circuit-breaker/reset-all")
    upstream.default = whole(GOOD)
    return shared_quick


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

# Faults of the model: the next one answers, and this one gets a strike.
STRIKES: dict[str, Script] = {
    "500": error(500, loudly("oops")),
    "500-html": html(500),
    "502-html": html(502),
    "503-html": html(503),
    "504-empty": plain(504, b"", "text/plain"),
    "408": error(408),
    "529-overloaded": error(529),
    "429": error(429, loudly("slow down")),
    "429-retry-after": error(429, Retry_After="30"),
    "503-retry-after-a-date": error(503, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT"),
    "404-unknown-model": error(404, "The model `one` does not exist"),
    "301": plain(301, b"", Location="http://127.0.0.1:1/"),
    "307-to-itself": plain(307, b"", Location="/v1/chat/completions"),
    "304": answer("304 Not Modified"),
    "drop-at-once": drop_at_once,
    "reset-at-once": reset_at_once,
    "hang": hang,
    "half-a-status-line": raw(b"HTTP/1.1 20"),
    "half-a-head": raw(b"HTTP/1.1 200 OK\r\nContent-Type: applica"),
    "hang-in-the-head": raw(b"HTTP/1.1 200 OK\r\nContent-Ty", "hang"),
    "hang-after-the-head": answer("200 OK\nContent-Length: 100", b"", "hang"),
    "not-http": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "binary": raw(bytes(range(256)) * 8),
    "200-html": html(200),
    "200-text": plain(200, b"hello there", "text/plain"),
    "200-broken-json": plain(200, b'{"choices": [{"message": {"content": "x"}'),
    "200-empty": plain(200, b""),
    "200-null": plain(200, b"null"),
    "200-a-list": plain(200, b"[1, 2]"),
    "200-not-utf8": plain(200, b'{"choices": "\xff\xfe"}'),
    "200-deep-json": plain(200, b"[" * 200_000),
    "200-error": plain(200, json.dumps(IN_200).encode()),
    "200-error-text": plain(200, b'{"error": "exploded"}'),
    "200-no-choices": plain(200, b'{"id": "x", "choices": []}'),
    "200-choices-null": plain(200, b'{"id": "x", "choices": null}'),
    "200-choices-a-text": plain(200, b'{"id": "x", "choices": "none"}'),
    "200-choice-failed": plain(200, json.dumps(FAILED_CHOICE).encode()),
    "204": answer("204 No Content"),
    "206": plain(206, GOOD_BODY),
    "101": answer("101 Switching Protocols\nUpgrade: websocket"),
    "999": error(999),
    "gzip": plain(200, gzip.compress(GOOD_BODY), Content_Encoding="gzip"),
    "gzip-bomb": plain(200, BOMB, Content_Encoding="gzip"),
    "gzip-bomb-unannounced": plain(200, BOMB),
    "gzip-bomb-in-an-error": plain(500, BOMB, Content_Encoding="gzip"),
    "gzip-bomb-in-chunks": answer(f"200 OK\nContent-Encoding: gzip\n{CHUNKS}", chunked(BOMB)),
    "content-length-too-large": answer("200 OK\nContent-Length: 99999", GOOD_BODY),
    "content-length-too-small": answer("200 OK\nContent-Length: 10", GOOD_BODY),
    "content-length-no-number": answer("200 OK\nContent-Length: many", b"{}"),
    "content-length-negative": answer("200 OK\nContent-Length: -5", b"{}"),
    "two-content-lengths": answer("200 OK\nContent-Length: 2\nContent-Length: 9", b"{}"),
    "cut-in-a-chunk": answer(f"200 OK\n{CHUNKS}", b"ff\r\n" + GOOD_BODY[:20]),
    "chunk-size-no-number": answer(f"200 OK\n{CHUNKS}", b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunk-size-negative": answer(f"200 OK\n{CHUNKS}", b"-5\r\n{}\r\n0\r\n\r\n"),
    "chunk-size-huge": answer(f"200 OK\n{CHUNKS}", b"f" * 40 + b"\r\n{}"),
    "one-huge-header": answer("200 OK\nX-A: " + "a" * 200_000, b"{}"),
    "thousands-of-headers": answer("200 OK\n" + "\n".join(f"X-{n}: a" for n in range(5000))),
    "trickle-of-a-head": trickle(b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 100),
    "trickle-of-100-continue": trickle(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "trickle-of-spaces": pieces([b" ", 0.05] * 100),
    "trickle-of-comments": pieces([b": still here\n\n", 0.05] * 100),
}  # fmt: skip

# The request's or the key's fault: the next model is asked (or none), and nobody gets a strike.
BLAMELESS: dict[str, Script] = {
    "400": error(400, loudly("bad parameter")),
    "400-html": html(400),
    "402": error(402, loudly("no credit")),
    "403-html": html(403),
    "404-html": html(404),
    "409": error(409),
    "413-html": html(413),
    "422-fastapi": plain(422, json.dumps({"detail": [{"loc": ["a"], "msg": KEY}]}).encode()),
    "400-context": error(400, "context length exceeded", "context_length_exceeded"),
    "418-with-a-huge-text": error(418, "x" * 1_000_000),
    "empty-answer": whole(""),
}

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


def failures(service: Service) -> dict[str, int]:
    return service.get("/metrics").json()["circuit_breaker"]["failures"]


def text_of(body: bytes) -> str:
    """The answer's text; an AssertionError or ValueError unless it is whole and well formed."""
    if not body.startswith(b"data: "):
        return json.loads(body)["choices"][0]["message"]["content"]
    datas = [line[6:] for line in body.decode().split("\n\n") if line.startswith("data: ")]
    assert datas.pop() == "[DONE]"
    deltas = [c["delta"] for data in datas for c in json.loads(data)["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


def leaks(service: Service, found: requests.Response) -> bool:
    """True when the upstream's key is in an answer or in what the service wrote."""
    shown = service.get("/metrics").text + service.get("/health").text + service.log.read_text()
    return KEY in found.text + str(found.headers) + shown


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", STRIKES.values(), ids=STRIKES)
def test_the_next_model_answers_for_a_broken_one(quick, upstream, fault, streams):
    upstream.scripts[ONE] = fault

    found, seconds = ask(quick, stream=streams)

    assert found.status_code == 200
    assert text_of(found.content) == GOOD
    assert seconds < 2
    assert failures(quick) == {ONE: 1}
    assert not leaks(quick, found)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", BLAMELESS.values(), ids=BLAMELESS)
def test_the_next_model_answers_and_nobody_is_blamed(quick, upstream, fault, streams):
    upstream.scripts[ONE] = fault

    found, seconds = ask(quick, stream=streams)

    assert found.status_code == 200
    assert text_of(found.content) == GOOD
    assert seconds < 2
    assert failures(quick) == {}
    assert not leaks(quick, found)


@pytest.mark.parametrize("script", HARMLESS.values(), ids=HARMLESS)
def test_an_odd_answer_is_an_answer(quick, upstream, script):
    upstream.scripts[ONE] = script

    found, _ = ask(quick)

    assert text_of(found.content) in ("should not be read", "ok")
    assert found.headers["X-Router-Model"] == ONE
    assert found.headers["Content-Type"] == "application/json"
    assert not {"Set-Cookie", "X-Secret"} & set(found.headers)
    assert failures(quick) == {}


FOR_EVER = {"hang", "hang-in-the-head", "hang-after-the-head"}
FOR_EVER |= {name for name in STRIKES if name.startswith("trickle")}


@pytest.mark.parametrize("fault", [f for n, f in STRIKES.items() if n not in FOR_EVER],
                         ids=[n for n in STRIKES if n not in FOR_EVER])  # fmt: skip
def test_when_all_are_broken_the_answer_is_json(quick, upstream, fault):
    upstream.default = fault

    found, seconds = ask(quick)

    assert found.status_code in (404, 429, 500)
    assert found.headers["Content-Type"] == "application/json"
    assert len(found.json()["error"]["attempts"]) >= 2
    assert seconds < 2
    assert not leaks(quick, found)


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", ["hang", "trickle-of-a-head", "trickle-of-comments"])
def test_when_all_hang_the_answer_is_json_within_the_total_limit(quick, upstream, name, streams):
    upstream.default = STRIKES[name]

    found, seconds = ask(quick, stream=streams)

    assert found.status_code == 500
    assert found.json()["error"]["code"] == "all_models_failed"
    assert seconds < 3
    assert failures(quick) == {ONE: 1}


@pytest.mark.parametrize("fault", BLAMELESS.values(), ids=BLAMELESS)
def test_when_all_refuse_the_answer_is_json_and_nobody_is_blamed(quick, upstream, fault):
    upstream.default = fault

    found, _ = ask(quick)

    assert found.headers["Content-Type"] == "application/json"
    assert {"error", "choices"} & found.json().keys()
    assert found.status_code not in (401, 402, 403)
    assert failures(quick) == {}
    assert not leaks(quick, found)


def test_headers_that_are_none_and_tell_the_key_stay_out_of_the_log(quick, upstream):
    head = f"200 OK\nno colon here {KEY}\n\tfolded {KEY}\nContent-Length: {len(GOOD_BODY)}"
    upstream.default = answer(head, GOOD_BODY)

    found, _ = ask(quick)

    assert found.status_code in (200, 500)
    assert not leaks(quick, found)


# --- hundreds of megabytes -----------------------------------------------------------------------

TOLD = f"Content-Length: {300 * MB}"
BLANKS, COMMENT = b" " * MB, b": %s\n\n" % (b"c" * 1000)
FLOODS = {
    "whole": (False, Flood(typed(JSON_TYPE, TOLD), BLANKS)),
    "whole-in-chunks": (False, Flood(typed(JSON_TYPE, CHUNKS), chunked(BLANKS))),
    "whole-without-length": (False, Flood(typed(JSON_TYPE), BLANKS)),
    "an-error": (False, Flood(typed(JSON_TYPE, TOLD, status="500 X"), BLANKS)),
    "an-error-of-a-stream": (True, Flood(typed("text/html", status="503 X"), BLANKS)),
    "one-event": (True, Flood(typed(SSE_TYPE), b"x" * MB, b"data: ")),
    "comments": (True, Flood(typed(SSE_TYPE, CHUNKS), chunked(COMMENT * 1000))),
    "json-for-a-stream": (True, Flood(typed(JSON_TYPE, TOLD), BLANKS)),
    "a-head": (False, Flood("HTTP/1.1 200 OK\n", b"X-Y: z\r\n" * 10_000)),
    "a-header": (False, Flood("HTTP/1.1 200 OK\nX-Y: ", b"z" * MB)),
    "100-continue": (False, Flood("", b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)),
}


@pytest.mark.parametrize(("streams", "flood"), FLOODS.values(), ids=FLOODS)
def test_a_flood_is_not_read_to_its_end(quick, upstream, streams, flood):
    upstream.scripts[ONE] = flood

    found, seconds = ask(quick, stream=streams)

    assert text_of(found.content) == GOOD
    assert seconds < 2.5
    flood.over.wait(0.5)  # a kernel may tell the sender of a closed connection much later
    assert flood.sent < 100 * MB
    assert failures(quick) == {ONE: 1}


def peak_mb(service: Service) -> float:
    """The most memory that the worker process has ever had, in MB."""
    pid = service.process.pid
    worker = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    lines = Path(f"/proc/{worker}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def test_floods_and_bombs_do_not_fill_the_memory(quick, upstream):
    upstream.scripts[ONE] = [FLOODS["whole"][1], STRIKES["gzip-bomb"], FLOODS["one-event"][1]]

    for streams in (False, False, True):
        ask(quick, stream=streams)

    assert peak_mb(quick) < 300


def test_a_flood_after_the_commit_ends_with_an_error_event(quick, upstream):
    flood = Flood(typed(SSE_TYPE), b"x" * MB, chunk({"content": "half"}) + b"data: ")
    upstream.scripts[ONE] = flood

    found, seconds = ask(quick, stream=True)

    assert last_event(found)["error"]["message"]
    assert seconds < 2.5
    assert flood.over.wait(2)
    assert flood.sent < 100 * MB


# --- after the commit ----------------------------------------------------------------------------

HALF = chunk({"content": "half"})
AFTER_COMMIT: dict[str, Script] = {
    "cut": pieces([HALF], after="cut"),
    "ends-without-a-finish": pieces([HALF], after="end"),
    "reset": pieces([HALF, 0.05], after="reset"),
    "stall": pieces([HALF], after="hang"),
    "trickle": pieces([HALF, *([b"d", 0.05] * 100)]),
    "comments-for-ever": pieces([HALF, *([b": still here\n\n", 0.05] * 100)]),
    "error-event": pieces([HALF, b'data: {"error": {"message": "%s"}}\n\n' % KEY.encode(), DONE]),
    "error-in-a-chunk": pieces([HALF, chunk({}, "error", error={"code": 502, "message": KEY})]),
    "broken-chunk": answer(
        f"200 OK\nContent-Type: {SSE_TYPE}\n{CHUNKS}", chunked(HALF) + b"zz\r\n"
    ),
}


def last_event(found: requests.Response) -> dict[str, Any]:
    return json.loads(found.text.strip().split("\n\n")[-1].removeprefix("data: "))


@pytest.mark.parametrize("fault", AFTER_COMMIT.values(), ids=AFTER_COMMIT)
def test_a_stream_that_breaks_after_its_commit_says_so(quick, upstream, fault):
    upstream.scripts[ONE] = fault

    found, seconds = ask(quick, stream=True)

    assert found.status_code == 200
    assert b"half" in found.content
    assert last_event(found)["error"]["message"]
    assert b"[DONE]" not in found.content
    assert seconds < 2
    assert failures(quick) == {ONE: 1}
    assert not leaks(quick, found)


@pytest.mark.parametrize("after", ["cut", "end", "reset", "hang"])
def test_a_stream_that_has_told_its_finish_is_a_success_however_it_ends(quick, upstream, after):
    upstream.scripts[ONE] = pieces([*events(["all of it"], usage=None, done=False), 0.05], after)

    found, seconds = ask(quick, stream=True)

    assert text_of(found.content) == "all of it"
    assert seconds < 2
    assert failures(quick) == {}


@pytest.mark.parametrize(
    "odd",
    [b"data: {broken\n\n", b"nonsense\n\n", b"data: [1]\n\n", b"\n\n\n\n", b"event: ping\n\n",
     b"data: \xff\xfe\n\n", b'data: {"choices": 5}\n\n', b'data: {"choices": [null]}\n\n',
     b'data: {"choices": [{"delta": null}]}\n\n', b'data: {"usage": []}\n\n'],
)  # fmt: skip
def test_one_odd_event_does_not_end_a_stream(quick, upstream, odd):
    upstream.scripts[ONE] = pieces([odd, HALF, odd, *events([" more"])])

    found, _ = ask(quick, stream=True)

    assert found.content.count(b"half") == 1
    assert b" more" in found.content
    assert found.content.endswith(DONE)
    assert failures(quick) == {}


# --- the same fault again and again --------------------------------------------------------------


@pytest.mark.parametrize("name", ["reset-at-once", "200-html", "503-html", "gzip"])
def test_a_broken_model_is_soon_passed_over(quick, upstream, name):
    upstream.scripts[ONE] = STRIKES[name]

    answers = [ask(quick)[0] for _ in range(4)]

    shown = quick.get("/metrics").json()["circuit_breaker"]["open_circuits"]
    assert [found.status_code for found in answers] == [200] * 4
    assert list(shown) == [ONE]
    assert answers[-1].headers["X-Router-Attempts"] == "1"


@pytest.mark.parametrize("name", BLAMELESS)
def test_a_model_that_did_nothing_wrong_is_never_passed_over(quick, upstream, name):
    upstream.scripts[ONE] = [*[BLAMELESS[name]] * 4, stream(["fine"])]

    for _ in range(4):
        ask(quick)
    found, _ = ask(quick, stream=True)

    assert found.headers["X-Router-Model"] == ONE


def test_a_fault_leaves_nothing_in_the_connection_for_the_next_request(quick, upstream):
    smuggled = plain(200, json.dumps(answer_body("smuggled")).encode())
    faults: list[Callable[..., Any]] = [STRIKES["content-length-too-small"], smuggled]
    upstream.scripts[ONE] = lambda p, r: [fault(p, r) for fault in faults][-1]

    ask(quick)
    upstream.scripts[ONE] = whole("its own answer")
    found, _ = ask(quick)

    assert text_of(found.content) == "its own answer"


def test_nothing_is_left_in_the_air(quick):
    assert quick.get("/metrics").json()["in_flight"] == 0
